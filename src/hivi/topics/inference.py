"""Latents of documents, seen or new: their own parameters are fitted with everything else as it is."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound, Elbo
from hivi._compile import compiled
from hivi._estimators.base import AbstractStrategy
from hivi._families.base import AbstractFamily, AbstractProposal
from hivi._families.hierarchical import Hierarchical
from hivi._fit.rowwise import row_bounds
from hivi._fit.stream import ROW_RATE, Schedule, at_blocks, conditioned, row_moments, split_rows
from hivi._fit.streaming import Stream, advance, in_order, open_stream, per_block
from hivi._likelihoods.poisson import MAX_LOG_RATE
from hivi._target.base import Target
from hivi._tree import Key
from hivi.topics.batches import CorpusSource, Documents
from hivi.topics.fitting import TopicFit, flat, grown_rows, proposal_for, strategies, with_weights
from hivi.topics.model import Architecture, build_target, z_name

LOCAL_PASSES = 60
REFINING_RATE, REFINING_DRAWS = 0.1, 4
"""Of documents that start at an inference network's answer: chosen on documents held out of training."""
FINE = 0.1
"""Of the usual size of documents' steps, once they are near their optimum. Chosen on training documents: 1,600 of reuters21578
gained 1.3 nats each by 60 such steps after 60 of the usual size; by 120 more of the usual size, whose noise stays, half of it."""
LOCAL_BATCH = 128


class Inference(NamedTuple):
    """What is known of some documents.

    Attributes:
        layers: posterior means of the latents, one array (documents, units) per layer.
        bound: each document's share of the bound, in nats: E[log p(x, z) - log q(z)], under E over q of the weights.
    """

    layers: list[np.ndarray]
    bound: np.ndarray


def infer(
    fit: TopicFit,
    documents: Documents,
    *,
    key: Key,
    passes: int | None = None,
    samples: int = 16,
    bound: AbstractBound | None = None,
) -> Inference:
    """Latents of documents, seen or new: their own parameters are fitted with everything else as it is.

    Args:
        fit: the trained model.
        documents: any documents over its vocabulary.
        key: a JAX random key.
        passes: gradient steps per document; 60 if None. With parameters of their own as many small steps follow; documents of
            a hierarchy take the former as mean-field ones, and grow from there. From an inference network's answer all are
            gentle; with 0 that answer stands as it is.
        samples: draws per document for the bound, and for posterior means that have no closed form.
        bound: which bound; `Elbo()` if None.
    """
    k1, k2 = jax.random.split(key)
    stream, chosen = inferred(fit, documents, key=k1, passes=passes)
    return read(stream, fit.architecture, chosen, key=k2, samples=samples, bound=bound)


def inferred(
    fit: TopicFit, documents: Documents, *, key: Key, passes: int | None = None
) -> tuple[Stream, dict[str, AbstractStrategy]]:
    """Documents with fitted parameters of their own, and the strategies of that fit; see `infer`."""
    size = 1
    while size < min(documents.n_documents, LOCAL_BATCH):
        size *= 2
    k1, k2 = jax.random.split(key)
    grows = isinstance(fit.family, Hierarchical)
    stream = opened(fit, documents, size, key=k1, family=flat(fit.family) if grows else None)
    steps = LOCAL_PASSES if passes is None else passes
    if stream.proposal(stream.source.blocks()[0]).amortised:
        return _moved(localised(stream), steps, REFINING_RATE, REFINING_DRAWS)
    found = _moved(stream, steps, ROW_RATE)
    if grows:
        stream = grown_rows(found[0], fit.architecture, fit.family, k2)
        found = _with_shared(stream, fit), found[1]
    return _moved(found[0], steps, FINE * ROW_RATE)


def _moved(stream: Stream, steps: int, rate: float, samples: int = 1) -> tuple[Stream, dict[str, AbstractStrategy]]:
    """Gradient steps of every document's parameters."""
    chosen, rng = strategies(stream.target, stream.proposal(stream.source.blocks()[0])), np.random.default_rng(0)
    schedule = Schedule(rows=rate, shared=False)
    return advance(stream, steps, strategies=chosen, schedule=schedule, samples=samples, rng=rng), chosen


def opened(fit: TopicFit, documents: Documents, size: int, *, key: Key, family: AbstractFamily | None = None) -> Stream:
    """A stream over other documents, `size` at once, with the weights of a fit; the documents start afresh.

    Of another family, as long as one is given: of the fit's shared parameters it has the weights alone.
    """
    k1, k2 = jax.random.split(key)
    source = CorpusSource(documents, size, fit.architecture.observations, local=True)
    target = build_target(fit.architecture, source, fit.statistics)
    stream = open_stream(target, proposal_for(target, fit.architecture, family or fit.family, k1), k2)
    if family is None:
        return _with_shared(stream, fit)
    shared = with_weights(stream.state.shared, fit.stream.state.shared)
    stream.state = dataclasses.replace(stream.state, shared=shared)
    return stream


def _with_shared(stream: Stream, fit: TopicFit) -> Stream:
    """The stream with all shared parameters of a fit."""
    leaves = jax.tree.leaves(fit.stream.state.shared)
    shared = jax.tree.unflatten(jax.tree.structure(stream.state.shared), leaves)
    stream.state = dataclasses.replace(stream.state, shared=shared)
    return stream


def localised(stream: Stream) -> Stream:
    """Documents with parameters of their own in place of an inference network, which start at its answer.

    Semi-amortised inference (Kim et al. 2018): the answer is a good start, and a poor end for long documents. From there the
    steps are gentle: large ones lose what the network knows of short documents.
    """
    opened: Stream | None = None
    for ids, here in at_blocks(stream.target):
        local = conditioned(here, stream.proposal(ids))
        if opened is None:
            opened = open_stream(stream.target, local, stream.state.key)
        own, _ = split_rows(local)
        opened.records.write(ids, np.asarray(opened.layout.pack((own, row_moments(own)))))
    assert opened is not None
    return opened


def read(
    stream: Stream,
    architecture: Architecture,
    chosen: dict[str, AbstractStrategy],
    *,
    key: Key,
    samples: int = 16,
    bound: AbstractBound | None = None,
) -> Inference:
    """Posterior means and bounds of all documents of a stream, as their parameters are now."""
    lean, wanted = tuple(chosen.items()), Elbo() if bound is None else bound

    def bounds(target: Target, proposal: AbstractProposal, k: Key) -> Array:
        return row_bounds(target, proposal, k, lean, wanted, samples)[0]

    found = in_order(stream.source, per_block(stream, bounds, key))
    return Inference(posterior_means(stream, architecture, key=key, samples=samples), found.astype(np.float64))


def posterior_means(
    stream: Stream, architecture: Architecture, *, key: Key, samples: int = 16
) -> list[Float[np.ndarray, "documents _"]]:
    """E[z] of every document of a stream, one array per layer, as their parameters are now."""
    found = per_block(stream, latent_means, key, architecture, samples)
    names = [z_name(k) for k in range(1, architecture.depth + 1)]
    return [in_order(stream.source, [means[name] for means in found]) for name in names]


@compiled
def latent_means(
    target: Target, proposal: AbstractProposal, key: Key, architecture: Architecture, samples: int
) -> dict[str, Array]:
    """E[z] of every layer under q, in the model's own space: over draws of lambda, exact given lambda."""
    proposal = conditioned(target, proposal)

    def one(k: Key) -> dict[str, Array]:
        _, context = proposal.propose(k)
        out = {}
        for name, c in proposal.conditionals(context).items():
            if not name.startswith("z"):
                continue
            if architecture.latent == "gamma":
                out[name] = jnp.exp(c.lam[..., 0] + 0.5 * jnp.exp(2 * c.lam[..., 1]))
            elif architecture.latent == "poisson":
                out[name] = jnp.exp(jnp.minimum(c.lam[..., 0], MAX_LOG_RATE))
            else:
                out[name] = jax.nn.sigmoid(c.lam[..., 0])
        return out

    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.lax.map(one, jax.random.split(key, samples)))
