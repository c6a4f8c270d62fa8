"""Fits of deep exponential families: the engine's streamed passes in the order that this model needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from optax.tree_utils import tree_get, tree_set

from hivi._bounds import Elbo
from hivi._estimators.auto import Auto
from hivi._estimators.base import AbstractStrategy
from hivi._estimators.expectation import Expectation
from hivi._families.amortised import Amortised
from hivi._families.auxiliary import InverseFlow
from hivi._families.base import AbstractFamily, AbstractProposal
from hivi._families.flow import Flow
from hivi._families.gamma import MeanFieldGamma
from hivi._families.hierarchical import Hierarchical
from hivi._families.mean_field import MeanField
from hivi._families.product import build_proposal
from hivi._fit.stream import AFTER_WARM_UP, Schedule, conditioned, row_moments, split_rows
from hivi._fit.streamed import of_a_batch
from hivi._fit.streaming import Stream, advance, open_stream
from hivi._target.base import Target
from hivi._tree import Key, PyTree, structure
from hivi.topics.batches import CorpusSource, Documents
from hivi.topics.model import BATCH, Architecture, background, build_target, corpus_statistics, w_name
from hivi.topics.passes import Watch
from hivi.topics.revival import part_of, revive

GROWN_DRAWS = 3
"""Draws per step of a hierarchy that has grown: with one, its noise costs the weights 0.08 nats per document of reuters21578;
mean-field gains nothing by more."""
MOST_CHOSEN = 64
_chosen: dict[Hashable, dict[str, AbstractStrategy]] = {}
"""Structure of a target and a proposal -> strategies: to choose takes as long as a pass over a small corpus."""


def amortised(architecture: Architecture, family: AbstractFamily | None = None, hidden: int = 128) -> Amortised:
    """An inference network instead of parameters per document, over mean-field or `hierarchical()`."""
    first = architecture.layers[0]
    skip = first if architecture.latent == "poisson" else 0
    return Amortised(MeanField() if family is None else family, features=first + 1, hidden=hidden, skip=skip)


def hierarchical(layers: int = 2, inverse_layers: int = 10) -> Hierarchical:
    """The paper's family over a document's latents: a flow of length 2, an inverse flow of length 10, shared by documents."""
    return Hierarchical(
        prior=Flow(layers=layers), auxiliary=InverseFlow(layers=inverse_layers), spread=0.1, shared=True
    )


@dataclasses.dataclass
class TopicFit:
    """A deep exponential family being fitted.

    Attributes:
        architecture: layers, kinds, priors.
        family: variational family of a document's latents.
        statistics: word frequencies and mean length of the training documents.
        stream: the engine's streamed fit: shared parameters, documents' records, history.
        passes: passes over the data so far.
        batch: documents per minibatch.
    """

    architecture: Architecture
    family: AbstractFamily
    statistics: dict[str, np.ndarray]
    stream: Stream
    passes: int = 0
    batch: int = BATCH

    @property
    def elbo(self) -> np.ndarray:
        """Estimate of the bound at every step, in nats."""
        return np.asarray(self.stream.elbo)

    def weights(self, layer: int = 0) -> Float[np.ndarray, "children parents"]:
        """Posterior mean of the weights from latent layer `layer + 1` down, as they act in the rates."""
        return weight_means(self.architecture, self.stream.state.shared, layer)

    def floor(self) -> Float[np.ndarray, " words"]:
        """The rate of each word that no topic explains."""
        fixed = self.statistics
        return np.asarray(background(self.architecture.priors, fixed["frequencies"], fixed["length"]))


def weight_family(architecture: Architecture) -> dict[str, AbstractFamily]:
    """Site -> family of the weights: Gamma with closed forms where the model allows, else Normal in free coordinates."""
    out: dict[str, AbstractFamily] = {}
    for layer in range(architecture.depth):
        closed = architecture.weights == "gamma" and (layer == 0 or architecture.latent == "poisson")
        out[w_name(layer)] = MeanFieldGamma(tied=True) if closed else MeanField()
    return out | ({"b.*": MeanField()} if architecture.signed(1) and architecture.depth > 1 else {})


def start(
    documents: Documents,
    architecture: Architecture,
    family: AbstractFamily | None = None,
    *,
    key: Key,
    batch: int = BATCH,
    statistics: dict[str, np.ndarray] | None = None,
) -> TopicFit:
    """A fit before its first pass; weights start at the corpus' word frequencies, unequal between topics."""
    family = MeanField() if family is None else family
    statistics = corpus_statistics(documents, architecture.observations) if statistics is None else statistics
    source = CorpusSource(documents, min(batch, documents.n_documents), architecture.observations)
    target = build_target(architecture, source, statistics)
    k1, k2 = jax.random.split(key)
    stream = open_stream(target, proposal_for(target, architecture, family, k1), k2)
    return TopicFit(architecture, family, statistics, stream, batch=batch)


def proposal_for(target: Target, architecture: Architecture, family: AbstractFamily, key: Key) -> AbstractProposal:
    """The starting proposal of one minibatch."""
    families = {**weight_family(architecture), "z.*": family}
    return build_proposal(families, of_a_batch(target.sites), key).near(target.starts)


def strategies(target: Target, proposal: AbstractProposal, plug_in: bool = False) -> dict[str, AbstractStrategy]:
    """`Auto`'s choice, one for all of the same structure; in the warm-up, closed forms are plugged in."""
    alike = structure((dataclasses.replace(target, source=None, starts={}), proposal))
    found = _chosen.get(alike)
    if found is None:
        if len(_chosen) >= MOST_CHOSEN:
            _chosen.clear()
        found = _chosen[alike] = Auto().resolve(target, conditioned(target, proposal), Elbo())
    return {n: Expectation(plug_in=plug_in) if isinstance(s, Expectation) else s for n, s in found.items()}


def train(
    fit: TopicFit,
    passes: int,
    *,
    rng: np.random.Generator,
    warm_up: int = 0,
    samples: int = 1,
    watch: Watch | None = None,
) -> TopicFit:
    """Passes over the corpus: first `warm_up` with point estimates of the weights, then with their posterior.

    Topics that died in the warm-up come to life again between the two (`hivi.topics.revival`).

    Args:
        fit: where to go on from; it is moved on.
        passes: all passes, warm-up included.
        rng: order of the documents.
        warm_up: passes of the warm-up; only weights with closed forms have one.
        samples: draws of the latents per step.
        watch: called after every few steps with (passes done, bound in nats).
    """
    per_pass = len(fit.stream.source.passes(np.random.default_rng(0)))

    def report(done: int, of: int, bound: float) -> None:
        if watch is not None:
            watch(len(fit.stream.elbo) / per_pass, bound)

    proposal = fit.stream.proposal(fit.stream.source.blocks()[0])
    closed = proposal_closed(fit)
    warm = min(warm_up, passes) if closed else 0
    for count, plug_in in ((warm, True), (passes - warm, False)):
        if count <= 0:
            continue
        settled = not plug_in and fit.passes > 0
        if settled and not fit.stream.settled:
            fit.stream.steps, fit.stream.settled = 0, True
        schedule = Schedule(delay=AFTER_WARM_UP) if settled else Schedule()
        chosen = strategies(fit.stream.target, proposal, plug_in)
        advance(fit.stream, count, strategies=chosen, schedule=schedule, samples=samples, rng=rng, report=report)
        fit.passes += count
        if plug_in and passes > warm:
            revive(fit.stream, fit.architecture, np.random.default_rng(fit.passes))
    return fit


def proposal_closed(fit: TopicFit) -> bool:
    """Whether some weights have closed forms."""
    return any(isinstance(f, MeanFieldGamma) for f in weight_family(fit.architecture).values())


def grow(fit: TopicFit, family: AbstractFamily, *, key: Key) -> TopicFit:
    """A fit of a hierarchical family that starts at a mean-field fit's optimum: same weights, lambda narrow around its own."""
    grown = grown_rows(fit.stream, fit.architecture, family, key)
    grown.state = dataclasses.replace(grown.state, shared=with_weights(grown.state.shared, fit.stream.state.shared))
    grown.steps, grown.settled = fit.stream.steps, fit.stream.settled
    return TopicFit(fit.architecture, family, fit.statistics, grown, fit.passes, fit.batch)


def flat(family: AbstractFamily) -> AbstractFamily:
    """The mean-field family from which a hierarchical one grows; any other itself."""
    if not isinstance(family, Hierarchical):
        return family
    return MeanField(concentration=family.concentration, dispersed=family.dispersed)


def grown_rows(stream: Stream, architecture: Architecture, family: AbstractFamily, key: Key) -> Stream:
    """A stream of a hierarchical family, each document at its mean-field optimum; shared parameters are fresh.

    Adam keeps what it knows of lambda: without it the first steps are as long as those from a far start. It knows nothing yet of
    what mean-field has not, such as scales, which are slow.
    """
    k1, k2 = jax.random.split(key)
    fresh: PyTree = proposal_for(stream.target, architecture, family, k1)
    grown = open_stream(stream.target, fresh, k2)

    def placed(own: PyTree, how: Callable[[AbstractProposal, dict[str, Array]], AbstractProposal]) -> PyTree:
        lam = eqx.combine(own, stream.state.shared).parameters()
        parts = tuple(how(p, lam) if p.sites[0].local is not None else p for p in fresh.parts)
        return split_rows(eqx.tree_at(lambda p: p.parts, fresh, parts))[0]

    def along(p: AbstractProposal, lam: dict[str, Array]) -> AbstractProposal:
        return p.along_lambda(lam)

    for ids in stream.source.blocks():
        own, known = stream.layout.unpack(jnp.asarray(stream.records.read(ids)))
        start = placed(own, lambda p, lam: p.grown(lam))
        mu, nu = (eqx.filter(placed(tree_get(known, name), along), eqx.is_inexact_array) for name in ("mu", "nu"))
        nu = jax.tree.map(lambda x: jnp.maximum(x, 0.0), nu)  # of a difference, with its rounding
        moments = tree_set(row_moments(start), count=tree_get(known, "count"), mu=mu, nu=nu)
        grown.records.write(ids, np.asarray(grown.layout.pack((start, moments))))
    return grown


def with_weights(shared: PyTree, trained: PyTree) -> PyTree:
    """The shared parameters with the weights of another fit, be it of other documents."""
    known = {tuple(s.name for s in p.sites if s.local is None): p for p in trained.parts}
    parts = []
    for p in shared.parts:
        source = known[tuple(s.name for s in p.sites)] if p.sites[0].local is None else p
        parts.append(jax.tree.unflatten(jax.tree.structure(p), jax.tree.leaves(source)))
    return eqx.tree_at(lambda p: p.parts, shared, tuple(parts))


def weight_means(architecture: Architecture, shared: PyTree, layer: int) -> np.ndarray:
    """E[w] as it acts, of one layer, from the shared parameters of a proposal."""
    name = w_name(layer)
    part = part_of(shared, name)
    if part.closed_form:
        return np.asarray(part.means()[name])
    location, log_scale = np.moveaxis(np.asarray(part.lam[name], np.float64), -1, 0)
    if architecture.signed(layer):
        return location.astype(np.float32)
    if architecture.weights == "gamma":
        return np.exp(location + 0.5 * np.exp(2 * log_scale)).astype(np.float32)
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    points = location[..., None] + np.exp(log_scale)[..., None] * nodes
    return (np.logaddexp(0, points) @ (weights / weights.sum())).astype(np.float32)
