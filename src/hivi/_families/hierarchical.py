"""Hierarchical variational models (Ranganath, Tran & Blei 2016): q(z) = integral of prod q(z_i|lambda_i) q(lambda; theta)."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from hivi._errors import FamilyError, message, require_positive
from hivi._families.auxiliary import (
    LAM,
    AbstractAuxiliary,
    AbstractAuxiliaryState,
    Component,
    InverseFlow,
    Linearised,
    Link,
)
from hivi._families.base import (
    AbstractFamily,
    AbstractProposal,
    Conditional,
    Directions,
    require_spread,
    scattered,
    with_counts,
)
from hivi._families.flow import Flow
from hivi._families.full_rank import FullRank
from hivi._families.low_rank import LowRank
from hivi._families.mean_field import MeanFieldProposal
from hivi._families.mixture import Mixture
from hivi._likelihood import likelihood, natural_gradient
from hivi._likelihoods.dispersed import SHEPPARD
from hivi._likelihoods.marginals import BinomialMarginal
from hivi._space import Latents, Site, Values
from hivi._tree import Key, PyTree

START_SCALE = 0.03
"""Spread of lambda when growing from a mean-field optimum, in units of 1/sqrt(Fisher information)."""
ROW_START = 0.01
"""The same for a row of a streamed fit, of which each takes too few steps to narrow or widen it: a tenth of the cost, which is
0.02 nats per document of a topic model at 0.03."""
FLOW_START = 10.0
"""A flow starts so many times wider: from a narrow start it seldom leaves a mean-field optimum."""
SCRATCH = {"finite": 1.0, "binomial": 0.5, "count": 0.3, "real": 0.1}
"""Spread of lambda without a start, by kind of site."""
DENSE_LIMIT = 256


class Hierarchical(AbstractFamily):
    """A mean-field likelihood whose parameters lambda are random, with their own variational prior.

    q(z) = integral of prod_i q(z_i|lambda_i) q(lambda; theta) d lambda, fitted through the auxiliary r(lambda|z; phi):
    log q is replaced by `log q(lambda) + log q(z|lambda) - log r(lambda|z)`, so that the ELBO of this family is the
    hierarchical ELBO of eq. 5. It keeps dependence between latents of any kind, discrete ones included.

    Args:
        prior: any continuous family over the flat vector lambda: `Flow`, `FullRank`, `LowRank`, `Mixture`, `MeanField`,
            or another `Hierarchical` (multi-level).
        auxiliary: `InverseFlow`, `Linearised`, `SemiImplicit` or `Component`; None takes the one that
            suits the prior: for a flow, an inverse flow of twice its length (the paper's were 2 and 10).
        start: a mean-field `Fit` of the same target to grow from; None starts near the centre of the supports. What
            `hivi.curvature(fit)` returns also serves: it grows from that fit, along the directions found.
        spread: multiplies the standard deviation of lambda at the start.
        along: directions of lambda that start wider, where `start` is a fit: what `hivi.curvature(fit)` returns. Priors
            `FullRank()` (up to 256 parameters, or with an auxiliary of its own) and `LowRank()` start along them; others from
            the fit alone, a `Flow()` ten times as wide, which lets it leave the fit.
        shared: over the rows of a subsampled plate, all rows share the prior's flow and r's regression, and each has its own
            location and scale of lambda; otherwise each row has all parameters for itself.
        concentration: of counts: q(z_i|lambda_i) is negative binomial with this concentration (1: Geometric); Poisson if None.
        dispersed: of counts and of long integer ranges (more than 64 values; their q is binomial): q(z_i|lambda_i) also has a
            free spread, narrower (down to 1/256 of a Poisson's or binomial's variance) or wider (up to 4 times). A mixture of
            Poissons is never narrower than a Poisson.

    Example:
        >>> import hivi
        >>> family = hivi.Hierarchical(prior=hivi.Flow(layers=4))
        >>> family.prior.layers
        4
    """

    prior: AbstractFamily = Flow(layers=8)
    auxiliary: AbstractAuxiliary | None = None
    start: Any = None
    spread: float = 1.0
    along: Any = None
    shared: bool = False
    concentration: float | None = None
    dispersed: bool = False

    def __check_init__(self) -> None:
        wrong: list[tuple[bool, str, Any, str, str]] = [
            (not isinstance(self.prior, AbstractFamily), "prior", self.prior, "a family", "for example hivi.Flow(layers=8)"),
            (not isinstance(self.auxiliary, AbstractAuxiliary | None), "auxiliary", self.auxiliary, "an auxiliary, or None",
             "for example hivi.InverseFlow(layers=8)"),
        ]  # fmt: skip
        for bad, name, value, expected, cure in wrong:
            if bad:
                raise FamilyError(message(f"Hierarchical({name}=...)", repr(value), expected, cure))
        require_positive("Hierarchical(spread=...)", self.spread, "1 is usual")
        require_spread(self.concentration, self.dispersed)

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        sites = with_counts(sites, self.concentration, self.dispersed)
        link = Link(sites)
        k1, k2, k3 = jax.random.split(key, 3)
        space = (Site(LAM, (link.dim,), Values("real"), (link.dim,)),)
        location, scale = self._from_scratch(link, k3) if self.start is None else self._from_start(link)
        wide = FLOW_START if self.start is not None and type(self.prior) is Flow else 1.0
        prior = self.prior.build(space, k1).recentre(location, scale * self.spread * wide)
        extra = self._extra(link)
        if extra is not None:
            prior = prior.stretch(extra * self.spread)
        auxiliary = self._auxiliary(link).build(link, prior, k2)
        return HierarchicalProposal(sites, prior, auxiliary, self.shared)

    def at_row(self, sites: tuple[Site, ...], row: Int[Array, ""]) -> AbstractFamily:
        if self.start is None:
            return self
        found = start_parameters(self.start)
        local = {s.name: s.local[1] for s in sites if s.local is not None and s.name in found}
        lam = {name: jnp.take(found[name], row, axis=axis) for name, axis in local.items()}
        start = MeanFieldProposal(tuple(s.row() for s in sites if s.name in lam), lam)
        along = self._directions()
        return dataclasses.replace(self, start=start, along=along and along.at_row(row))

    def _directions(self) -> Directions | None:
        """`along`, or the directions that the start brings.

        Raises:
            FamilyError: directions without a start.
        """
        if self.along is not None and self.start is None:
            raise FamilyError(
                message("Hierarchical(along=...)", "no start", "the fit whose curvature it is", "pass start=fit too")
            )
        given = self.start if self.along is None else self.along
        found = getattr(given, "directions", self.along)
        if found is not None and not isinstance(found, Directions):
            cure = "pass along=hivi.curvature(fit, key=key)"
            raise FamilyError(message("Hierarchical(along=...)", type(found).__name__, "directions of lambda", cure))
        return found

    def _extra(self, link: Link) -> Array | None:
        """The directions of these sites as rows of a matrix over lambda, each as long as its spread."""
        found = self._directions()
        if found is None or not any(s.name in found.vectors for s in link.sites):
            return None
        if link.dim > DENSE_LIMIT and self.auxiliary is None and type(self.prior) is FullRank:
            return None  # the auxiliary of so many parameters is factorised, and would cost more than the start gains
        if any(s.name in found.vectors and _of_table(s, found.vectors[s.name]) for s in link.sites):
            return None
        count, parts = found.spread.shape[-1], []
        for s in link.sites:
            shape = (count, *s.shape, likelihood(s).width)
            part = with_spread(s, found.vectors.get(s.name, jnp.zeros(shape)))
            if found.rows is not None or part.shape != shape:
                raise FamilyError(
                    message(
                        f"Hierarchical(along=...) at site {s.name!r}",
                        f"directions of shape {part.shape}{'' if found.rows is None else ', row by row'}",
                        f"{shape}",
                        "pass the curvature of a mean-field fit of the same target",
                    )
                )
            parts.append(part.reshape(count, -1))
        return jnp.concatenate(parts, 1) * found.spread[:, None]

    def _auxiliary(self, link: Link) -> AbstractAuxiliary:
        if self.auxiliary is not None:
            return self.auxiliary
        choices: dict[type, AbstractAuxiliary] = {Mixture: Component()}
        if link.dim <= DENSE_LIMIT:
            choices[FullRank] = choices[LowRank] = Linearised()
        if type(self.prior) is Flow:
            choices[Flow] = InverseFlow(2 * self.prior.layers, self.prior.kind)
        return choices.get(type(self.prior), InverseFlow())

    def _from_scratch(self, link: Link, key: Key) -> tuple[Array, Array]:
        keys = jax.random.split(key, len(link.sites))
        lam = {s.name: likelihood(s).start(s.shape, k) for s, k in zip(link.sites, keys, strict=True)}
        lam = scattered(link.sites, lam, key) if any(s.discrete for s in link.sites) else lam
        scale = {s.name: jnp.full_like(lam[s.name], SCRATCH[s.values.kind]) for s in link.sites}
        return link.join(lam), link.join(scale)

    def _from_start(self, link: Link) -> tuple[Array, Array]:
        """Location at the mean-field optimum; scale small against its Fisher information."""
        found = start_parameters(self.start)
        found = found | {s.name: with_spread(s, found[s.name]) for s in link.sites if s.name in found}
        lam, scale = {}, {}
        for s in link.sites:
            if s.name not in found or found[s.name].shape != (*s.shape, likelihood(s).width):
                raise FamilyError(
                    message(
                        f"Hierarchical(start=...) at site {s.name!r}",
                        "no mean-field parameters of that shape in the start",
                        "a MeanField fit of the same target",
                        "pass dispersed=True, too"
                        if s.name in found and found[s.name].shape == (*s.shape, 2) and not s.values.dispersed
                        else "fit the target with family=hivi.MeanField() first",
                    )
                )
            lam[s.name] = found[s.name]
            scale[s.name] = narrow(s, lam[s.name])
        return link.join(lam), link.join(scale)


def with_spread(site: Site, lam: Array) -> Array:
    """Parameters of Poissons, or directions in them, as those of counts with a free spread, where a site has one (0: Poisson).

    Those of a table over a long range become those of the same mean and, where the spread is free, variance.
    """
    if _of_table(site, lam):
        return _from_table(site, lam)
    plain = site.values.dispersed and lam.shape[-1:] == (1,)
    return jnp.concatenate([lam, jnp.zeros_like(lam)], -1) if plain else lam


def _of_table(site: Site, lam: Array) -> bool:
    """Whether these are parameters of a table, and the site's likelihood has none."""
    return site.values.kind == "binomial" and lam.shape[-1:] == (site.values.count,)


def _from_table(site: Site, lam: Array) -> Array:
    marginal, p = BinomialMarginal(site.values.low, site.values.count), jax.nn.softmax(lam, -1)
    values = site.values.low + jnp.arange(site.values.count, dtype=p.dtype)
    mean = p @ values
    plain = marginal.plain(mean)
    if not site.values.dispersed:
        return plain[..., :1]
    variance = jnp.sum(p * (values - mean[..., None]) ** 2, -1)
    return marginal.spread(plain, jnp.maximum(variance - SHEPPARD, SHEPPARD))


def start_parameters(start: Any) -> dict[str, Array]:
    """Site -> lambda of a mean-field fit (or proposal), also inside a product of families.

    Raises:
        FamilyError: the start is not mean-field.
    """
    fit = getattr(start, "fit", start)  # a curvature brings the fit that it was made of
    proposal = getattr(fit, "proposal", fit)
    if isinstance(proposal, AbstractProposal):
        found = proposal.parameters()
        if found:
            return found
    raise FamilyError(
        message(
            "Hierarchical(start=...)",
            type(proposal).__name__,
            "a mean-field fit",
            "pass start=hivi.fit(target, hivi.MeanField(), key=key)",
        )
    )


class HierarchicalProposal(AbstractProposal):
    """theta (the prior's parameters) and phi (the auxiliary's)."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    prior: AbstractProposal
    auxiliary: AbstractAuxiliaryState
    shared: bool = eqx.field(static=True, default=False)

    @property
    def _link(self) -> Link:
        return Link(self.sites)

    @property
    def branches(self) -> int:
        return self.prior.branches

    @property
    def equal_branches(self) -> bool:
        return self.prior.equal_branches

    def log_weights(self) -> Float[Array, " branches"]:
        return self.prior.log_weights()

    def score_weight(self, inner: int) -> float:
        return 1.0 / (inner + 1)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        k1, k2 = jax.random.split(key)
        value, context = self.prior.propose(k1, branch)
        lam = self._link.split(value[LAM])
        keys = jax.random.split(k2, len(self.sites))
        z = {s.name: likelihood(s).sample(lam[s.name], k) for s, k in zip(self.sites, keys, strict=True)}
        return z, (value[LAM], context)

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        """Eq. 5 for inner = 0; else log 1/(K+1) sum_k q(z,lambda_k)/r(lambda_k|z) (Sobolev & Vetrov 2019)."""
        lam, prior_context = context
        k1, k2 = jax.random.split(key)
        terms = self._link.log_prob(lam, z) | self.auxiliary.excess(z, lam, prior_context, self.prior, k1)
        if inner == 0:
            return terms
        if not self.auxiliary.reparameterised(self.prior):
            raise FamilyError(
                message(
                    f"ImportanceWeighted(inner={inner}) with a mixture prior",
                    f"{type(self.auxiliary).__name__}, whose extra draws choose a component and carry no gradient",
                    "reparameterised extra draws",
                    "use inner=0 (Component() is exact for narrow components) or auxiliary=InverseFlow()",
                )
            )
        own = sum((jnp.sum(t) for t in terms.values()), jnp.zeros(()))
        others = jax.vmap(lambda k: self._weight(z, k))(jax.random.split(k2, inner))
        stacked = jnp.concatenate([jnp.zeros(1), others - own])
        # Kept apart from the eq. 5 terms, which stay local.
        terms["q(tighter)"] = logsumexp(stacked) - jnp.log(inner + 1.0)
        return terms

    def _weight(self, z: Latents, key: Key) -> Array:
        """Log q(z, lambda) / r(lambda|z) at an extra lambda ~ r."""
        lam, excess = self.auxiliary.draw(z, self.prior, key)
        return sum((jnp.sum(t) for t in self._link.log_prob(lam, z).values()), excess)

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        weights = jax.lax.map(lambda k: self._weight(z, k), jax.random.split(key, samples), batch_size=64)
        return logsumexp(weights) - jnp.log(float(samples))

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        lam = self._link.split(context[0])
        return {s.name: Conditional(likelihood(s), lam[s.name]) for s in self.sites}

    # As a prior over lambda of a level below (all sites real; q(z|lambda) Normal with random location and scale).
    def affine(self) -> tuple[Array, Array]:
        location, scale = (x.reshape(-1, 2) for x in self.prior.affine())
        return location[:, 0], jnp.sqrt(jnp.exp(2 * location[:, 1]) + scale[:, 0] ** 2)

    def recentre(self, location: Array, scale: Array) -> HierarchicalProposal:
        centre = jnp.stack([location, jnp.log(scale)], -1).reshape(-1)
        spread = jnp.stack([0.5 * scale, jnp.full_like(scale, 0.1)], -1).reshape(-1)
        return HierarchicalProposal(self.sites, self.prior.recentre(centre, spread), self.auxiliary, self.shared)

    # Repeated over the rows of a plate.
    def individual(self) -> PyTree:
        prior = self.prior.centres() if self.shared else jax.tree.map(lambda _: True, self.prior)
        auxiliary = jax.tree.map(lambda _: not self.shared, self.auxiliary)
        return HierarchicalProposal(self.sites, prior, auxiliary, self.shared)

    def near(self, means: dict[str, Array]) -> HierarchicalProposal:
        location, scale = self.prior.affine()
        lam = self._link.split(location)
        for s in self.sites:
            if s.name in means:
                lam[s.name] = likelihood(s).near(lam[s.name], s.unconstrained_mean(means[s.name]))
        return self._at(self._link.join(lam), scale)

    def grown(self, lam: dict[str, Array]) -> HierarchicalProposal:
        scale = {s.name: ROW_START / START_SCALE * narrow(s, lam[s.name]) for s in self.sites}
        return self._at(self._link.join(lam), self._link.join(scale))

    def along_lambda(self, lam: dict[str, Array]) -> HierarchicalProposal:
        location = self._link.join(lam)
        scale = jnp.ones_like(location)
        there, here = self._at(location, scale), self._at(jnp.zeros_like(location), scale)
        return jax.tree.map(lambda a, b: a - b if eqx.is_inexact_array(a) else a, there, here)

    def _at(self, location: Array, scale: Array) -> HierarchicalProposal:
        return HierarchicalProposal(self.sites, self.prior.recentre(location, scale), self.auxiliary, self.shared)

    def natural(self, gradient: PyTree) -> PyTree:
        """Lambda's location by the Fisher information of q(z|lambda) there; the rest as it is."""
        location, _ = self.prior.affine()

        def rule(flat: Array) -> Array:
            at, parts = self._link.split(location), self._link.split(flat)
            return self._link.join(
                {s.name: natural_gradient(likelihood(s), at[s.name], parts[s.name]) for s in self.sites}
            )

        return HierarchicalProposal(self.sites, gradient.prior.precondition(rule), gradient.auxiliary, self.shared)

    def roles(self) -> PyTree:
        free = jax.tree.map(lambda _: "free", self.auxiliary)
        return HierarchicalProposal(self.sites, self.prior.roles(), free, self.shared)


def narrow(site: Site, lam: Array) -> Array:
    """Spread of lambda with which to grow from a mean-field optimum: small against its Fisher information."""
    fisher = jnp.diagonal(likelihood(site).fisher(lam), axis1=-2, axis2=-1)
    return START_SCALE / jnp.sqrt(jnp.maximum(fisher, 1.0 if site.discrete else 0.0))
