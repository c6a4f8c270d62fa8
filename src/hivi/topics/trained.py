"""A trained deep exponential family without its documents: what it takes to infer, to go on, and to save."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.sparse as sp
from jaxtyping import Float

from hivi._families.base import AbstractFamily
from hivi._families.hierarchical import Hierarchical
from hivi._fit import store
from hivi._fit.stream import AFTER_WARM_UP, FINAL, ROW_RATE, Schedule, at_blocks
from hivi._fit.streaming import Stream, advance, open_stream
from hivi._space import Plate
from hivi._target.base import Target
from hivi._tree import Key
from hivi.topics.batches import PLATE, CorpusSource, Counts, Documents
from hivi.topics.fitting import GROWN_DRAWS, TopicFit, flat, grow, proposal_for, start, strategies, train
from hivi.topics.inference import LOCAL_PASSES, Inference, inferred, latent_means, posterior_means, read
from hivi.topics.model import Architecture, build_target, corpus_statistics, z_name
from hivi.topics.passes import Watch

SAMPLES = 4
"""Draws of the latents at the step that moves the weights, for a stream of documents: each is met once."""
MEAN_SAMPLES = 16
"""Draws of lambda for posterior means; mean-field needs none."""
_INFER, _LEARN, _START = range(3)


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Shared parameters and configuration, as NumPy arrays and plain values; it can be pickled.

    Attributes:
        architecture: layers, kinds, priors.
        family: variational family of a document's latents.
        statistics: word frequencies and mean length of the training documents.
        arrays: shared parameters, the moments of their optimiser and a random key, by their path.
        documents: number of documents of the whole corpus, seen or not.
        steps: conjugate steps so far: their sizes fall with it.
        settled: whether a fit has converged, and further documents may move it only a little.
        passes: passes over the data so far, or parts of a stream.
        seed: of everything random.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> from hivi.topics.batches import Counts
        >>> from hivi.topics.fitting import amortised
        >>> from hivi.topics.model import Architecture
        >>> from hivi.topics.trained import latents, learn, without_documents
        >>> x, architecture = sp.csr_array(np.kron(np.eye(2, dtype=int), np.full((20, 4), 3))), Architecture(layers=(2,))
        >>> fit = learn(Counts(x), architecture, amortised(architecture), seed=0, passes=2, warm_up=0, batch=40)
        >>> trained = without_documents(fit, documents=40, seed=0)
        >>> [z.shape for z in latents(trained, Counts(x[:3]))]
        [(3, 2)]
    """

    architecture: Architecture
    family: AbstractFamily
    statistics: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    documents: int
    steps: int
    settled: bool
    passes: int
    seed: int

    @functools.cached_property
    def fit(self) -> TopicFit:
        """The fit on one empty document, with these parameters."""
        n_words = len(self.statistics["frequencies"])
        blank = Counts(sp.csr_array((1, n_words), dtype=np.int32))
        key = _key(self.seed, _START)
        fit = start(blank, self.architecture, self.family, key=key, batch=1, statistics=self.statistics)
        fit.stream.state = store.unpack(fit.stream.state, self.arrays, Path("parameters"))
        fit.passes = self.passes
        return fit

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def learn(
    documents: Documents,
    architecture: Architecture,
    family: AbstractFamily,
    *,
    seed: int,
    passes: int,
    warm_up: int,
    batch: int,
    watch: Watch | None = None,
) -> TopicFit:
    """Train on a corpus: a hierarchical family grows from a mean-field fit after half of the passes that follow the warm-up."""
    rng = np.random.default_rng(seed)
    grows = isinstance(family, Hierarchical)
    fit = start(documents, architecture, flat(family), key=_key(seed, _START), batch=batch)
    before = warm_up + (passes - warm_up) // 2 if grows else passes
    train(fit, before, rng=rng, warm_up=warm_up, watch=watch)
    if grows:
        history = fit.stream.elbo
        fit = grow(fit, family, key=_key(seed, _LEARN))
        fit.stream.elbo = history
        train(fit, passes - before, rng=rng, samples=GROWN_DRAWS, watch=watch)
    return fit


def without_documents(fit: TopicFit, documents: int, seed: int) -> Trained:
    """What stays of a fit."""
    stream = fit.stream
    return Trained(
        fit.architecture, fit.family, fit.statistics, store.pack(stream.state), documents, stream.steps,
        stream.settled or fit.passes > 0, fit.passes, seed,
    )  # fmt: skip


def blank(
    documents: Documents, architecture: Architecture, family: AbstractFamily, *, seed: int, total: int
) -> Trained:
    """Before the first part of a stream of documents, which gives the word frequencies and the mean length."""
    statistics = corpus_statistics(documents, architecture.observations)
    fit = start(documents, architecture, family, key=_key(seed, _START), batch=1, statistics=statistics)
    return Trained(
        architecture, family, statistics, store.pack(fit.stream.state), total, 0, False, 0, seed
    )  # fmt: skip


def absorb(
    trained: Trained, documents: Documents, *, batch: int, passes: int | None = None
) -> tuple[Trained, float, list[Float[np.ndarray, " _"]]]:
    """Learn from a part of a stream of documents: one conjugate step per minibatch.

    The documents' own parameters are fitted first, with the weights as they are; then the weights take a step of size
    (delay + t)^-0.6 towards those at which the whole corpus, of `trained.documents` documents, is like the minibatch.

    Args:
        trained: where to go on from; it stays as it is.
        documents: of the same vocabulary.
        batch: documents per minibatch.
        passes: gradient steps per document; 60 if None. No small steps follow: the weights take their step there.

    Returns:
        What is learnt, the bound for the whole corpus in nats, and the mean of every unit of each layer over the documents.

    Source: Hoffman, Blei, Wang & Paisley (2013), Stochastic Variational Inference, figure 4.
    """
    a, number = trained.architecture, trained.passes
    source = CorpusSource(documents, min(batch, documents.n_documents), a.observations)
    whole = copy.copy(source)
    whole.plate = Plate(PLATE, max(trained.documents, documents.n_documents), source.plate.batch)
    target = dataclasses.replace(build_target(a, whole, trained.statistics), source=source)
    stream = _opened(trained, target, _key(trained.seed, _LEARN, number))
    proposal = stream.proposal(source.blocks()[0])
    chosen, rng = strategies(target, proposal), np.random.default_rng((trained.seed, number))
    own = LOCAL_PASSES if passes is None else passes
    advance(stream, 0 if proposal.amortised else own, strategies=chosen, schedule=Schedule(shared=False), rng=rng)
    local = len(stream.elbo)
    stream.steps = trained.steps
    delay = AFTER_WARM_UP if trained.settled else 1.0
    schedule = Schedule(rows=FINAL * ROW_RATE, delay=delay)
    advance(stream, 1, strategies=chosen, schedule=schedule, samples=SAMPLES, rng=rng)
    moved = dataclasses.replace(trained, arrays=store.pack(stream.state), steps=stream.steps, passes=trained.passes + 1)
    return moved, float(np.nanmean(stream.elbo[local:])), unit_means(stream, a, _key(trained.seed, _INFER))


def infer(
    trained: Trained, documents: Documents, *, passes: int | None = None, samples: int = MEAN_SAMPLES
) -> Inference:
    """Latents of documents, and each one's share of the bound; see `hivi.topics.inference.infer`.

    Args:
        trained: the model; the same model and documents give the same answer.
        documents: any documents over its vocabulary.
        passes: gradient steps per document; None as `hivi.topics.infer` takes it.
        samples: draws per document for the bound.
    """
    k1, k2 = jax.random.split(_key(trained.seed, _INFER))
    stream, chosen = inferred(trained.fit, documents, key=k1, passes=passes)
    return read(stream, trained.architecture, chosen, key=k2, samples=samples)


def latents(
    trained: Trained, documents: Documents, *, passes: int | None = None
) -> list[Float[np.ndarray, "documents _"]]:
    """The latents of `infer` alone, one array per layer."""
    k1, k2 = jax.random.split(_key(trained.seed, _INFER))
    stream, _ = inferred(trained.fit, documents, key=k1, passes=passes)
    return posterior_means(stream, trained.architecture, key=k2)


def mean_latents(fit: TopicFit, seed: int) -> list[Float[np.ndarray, " _"]]:
    """E[z] of every unit of each layer, on average over the documents of a fit."""
    return unit_means(fit.stream, fit.architecture, _key(seed, _INFER))


def unit_means(stream: Stream, architecture: Architecture, key: Key) -> list[Float[np.ndarray, " _"]]:
    """E[z] of every unit of each layer, on average over a stream's documents; in memory there is one block of them."""
    sums = {z_name(k): np.zeros(units) for k, units in enumerate(architecture.layers, 1)}
    for number, (ids, here) in enumerate(at_blocks(stream.target)):
        block = jax.random.fold_in(key, number)
        means = latent_means(here, stream.proposal(ids), block, architecture, MEAN_SAMPLES)
        for name, total in sums.items():
            total += np.asarray(means[name])[ids >= 0].sum(axis=0, dtype=np.float64)
    return [total / max(stream.source.rows, 1) for total in sums.values()]


def _opened(trained: Trained, target: Target, key: Key) -> Stream:
    """A stream over new documents with the trained parameters; its documents start afresh."""
    stream = open_stream(target, proposal_for(target, trained.architecture, trained.family, key), key)
    leaves = jax.tree.leaves(trained.fit.stream.state)
    stream.state = jax.tree.unflatten(jax.tree.structure(stream.state), leaves)
    return stream


def _key(seed: int, *numbers: int) -> Key:
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
