"""A copula over sites of which some are discrete: a hierarchical model over its latent Gaussians (eq. 5)."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._dependence import AbstractDependence
from hivi._families.base import AbstractProposal, Conditional, Layout
from hivi._families.reverse import AbstractReverse
from hivi._likelihood import likelihood
from hivi._likelihoods.finite import FiniteLikelihood
from hivi._likelihoods.marginals import AbstractMarginal, BinomialMarginal, CountMarginal, FiniteMarginal
from hivi._likelihoods.threshold import ThresholdLikelihood
from hivi._margins import Margins
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree

LEAST = 0.05
"""The least sigma: below it q(z|m) is nearly a step, and its gradient noise."""
ROUNDING = 0.3
"""Variance of e given z at the start, about that of a Bernoulli's and more than that of wide counts."""


class Latent(NamedTuple):
    """What a draw came from.

    Attributes:
        m: the dependent standard normals of all coordinates.
        base: the independent ones.
        log_det: log |d(m, continuous z) / d base|, of both maps.
        outer: log |dz/dm| of the continuous coordinates alone.
    """

    m: Float[Array, " dim"]
    base: Float[Array, " dim"]
    log_det: Float[Array, ""]
    outer: Float[Array, ""]


def marginal_of(site: Site) -> AbstractMarginal:
    """The kind of marginal of a discrete site."""
    kind, low, count = site.values.kind, site.values.low, site.values.count
    if kind == "count":
        return CountMarginal(low)
    return FiniteMarginal(low, count) if kind == "finite" else BinomialMarginal(low, count)


def latent(
    sites: tuple[Site, ...],
    dependence: AbstractDependence,
    margins: Margins | None,
    reverse: AbstractReverse,
    spread: float,
    key: Key,
) -> LatentCopulaProposal:
    """The proposal at its start: independent coordinates, and an r that is nearly exact for them."""
    theta, sigma, shift, widths = {}, {}, {}, {}
    share = (spread - LEAST) / (1 - LEAST)
    width = 0.5 * np.log(spread**2 + (1 - spread**2) * ROUNDING)
    for s, k in zip(sites, jax.random.split(key, len(sites)), strict=True):
        if not s.discrete:
            continue
        features = jax.eval_shape(likelihood(s).features, s.example()).shape[-1]
        theta[s.name] = marginal_of(s).start(s.shape, k)
        sigma[s.name] = jnp.full(s.shape, np.log(share) - np.log1p(-share), float)
        shift[s.name] = jnp.zeros((*s.shape, features))
        widths[s.name] = jnp.zeros((*s.shape, features)).at[..., 0].set(width)
    return LatentCopulaProposal(sites, dependence, margins, theta, sigma, reverse, shift, widths)


class LatentCopulaProposal(AbstractProposal):
    """Parameters of a copula with discrete sites.

    Attributes:
        sites: the sites.
        dependence: of the latent Gaussians m, in the order of the coordinates.
        margins: of the continuous coordinates; None where there are none.
        theta: of the discrete marginals, site -> (*site shape, width).
        sigma: logits of the shares of e that are independent, site -> site shape.
        reverse: r(m|z), what m_j and z_j say about m_i.
        shift: what z_i adds to the mean of m_i in r, site -> (*site shape, features).
        widths: log scale of m_i in r, likewise.
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    dependence: AbstractDependence
    margins: Margins | None
    theta: dict[str, Array]
    sigma: dict[str, Array]
    reverse: AbstractReverse
    shift: dict[str, Array]
    widths: dict[str, Array]

    @property
    def _known(self) -> np.ndarray:
        """Which coordinates are continuous."""
        return np.concatenate([np.full(s.shape, not s.discrete).reshape(-1) for s in self.sites])

    @property
    def _real(self) -> Layout:
        return Layout(tuple(s for s in self.sites if not s.discrete))

    @property
    def _discrete(self) -> tuple[Site, ...]:
        return tuple(s for s in self.sites if s.discrete)

    def _scale(self, name: str) -> Array:
        return LEAST + (1 - LEAST) * jax.nn.sigmoid(self.sigma[name])

    def _conditional(self, site: Site, m: Array) -> Conditional:
        """q(z_i | m_i): a table for finite supports, thresholds for others."""
        marginal, theta, scale = marginal_of(site), self.theta[site.name], self._scale(site.name)
        location, log_scale = jnp.sqrt(1 - scale**2) * m, jnp.log(scale)
        if isinstance(marginal, FiniteMarginal):
            return Conditional(FiniteLikelihood(site.values), marginal.table(theta, location, log_scale))
        lam = jnp.concatenate([theta, location[..., None], log_scale[..., None]], -1)
        return Conditional(ThresholdLikelihood(marginal), lam)

    def _conditionals(self, m: Array) -> dict[str, Conditional]:
        parts = Layout(self.sites).unflatten(m)
        return {s.name: self._conditional(s, parts[s.name]) for s in self._discrete}

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        k1, k2 = jax.random.split(key)
        base = jax.random.normal(k1, (Layout(self.sites).dim,))
        m, log_det = self.dependence.couple(base)
        given = self._conditionals(m)
        keys = jax.random.split(k2, len(given))
        z = {n: c.likelihood.sample(c.lam, k) for (n, c), k in zip(given.items(), keys, strict=True)}
        outer = jnp.zeros(())
        if self.margins is not None:
            flat, outer = self.margins.onward(m[self._known])
            z |= self._real.unflatten(flat)
        return z, Latent(m, base, log_det + outer, outer)

    def log_q(self, z: Latents, context: Latent, key: Key, inner: int = 0) -> dict[str, Array]:
        """Eq. 5 for inner = 0; else log 1/(K+1) sum_k q(z,m_k)/r(m_k|z) (Sobolev & Vetrov 2019)."""
        terms = {"q(base)": Normal(0.0, 1.0).log_prob(context.base), "q(log det)": -context.log_det}
        terms |= self._given(z, context.m) | self._reversed(z, context.m)
        if inner == 0:
            return terms
        own = sum((jnp.sum(t) for t in terms.values()), jnp.zeros(()))
        weights = jax.vmap(lambda k: self._weight(z, context.m, context.outer, k))(jax.random.split(key, inner))
        terms["q(tighter)"] = logsumexp(jnp.concatenate([jnp.zeros(1), weights - own])) - jnp.log(inner + 1.0)
        return terms

    def _given(self, z: Latents, m: Array) -> dict[str, Array]:
        given = self._conditionals(m)
        return {f"q({n}|m)": c.likelihood.log_prob(c.lam, z[n]) for n, c in given.items()}

    def _regression(self, z: Latents, m: Array) -> tuple[Array, Array, Array]:
        """What r takes from z: t, and the mean and log scale that each z_i gives its own m_i; m of known coordinates."""
        seen, mean, log_scale = Layout(self.sites).unflatten(m), {}, {}
        for s in self.sites:
            if not s.discrete:
                mean[s.name] = log_scale[s.name] = jnp.zeros(s.shape)
                continue
            seen[s.name] = marginal_of(s).centre(self.theta[s.name], z[s.name])
            features = likelihood(s).features(z[s.name])
            own = jnp.sqrt(1 - self._scale(s.name) ** 2) * seen[s.name]
            mean[s.name] = own + jnp.sum(self.shift[s.name] * features, -1)
            log_scale[s.name] = jnp.sum(self.widths[s.name] * features, -1)
        flatten = Layout(self.sites).flatten
        t = flatten(seen)
        return t, flatten(mean), flatten(log_scale) + self.reverse.log_scale(t)

    def _reversed(self, z: Latents, m: Array) -> dict[str, Array]:
        t, mean, log_scale = self._regression(z, m)
        eta = (m - mean - self.reverse.mean(m, t)) * jnp.exp(-log_scale)
        return {"r(m|z)": jnp.where(self._known, 0.0, log_scale - Normal(0.0, 1.0).log_prob(eta))}

    def _weight(self, z: Latents, known: Array, outer: Array, key: Key) -> Array:
        """Log q(z, m) / r(m|z) at an extra m ~ r; of `known` only the continuous coordinates are used."""
        t, mean, log_scale = self._regression(z, known)
        noise = jax.random.normal(key, known.shape)
        m = self.reverse.solve(mean + jnp.exp(log_scale) * noise, t, jnp.asarray(self._known, known.dtype))
        base, log_det = self.dependence.decouple(m)
        log_q = jnp.sum(Normal(0.0, 1.0).log_prob(base)) + log_det - outer
        log_q = log_q + sum(jnp.sum(t) for t in self._given(z, m).values())
        return log_q + jnp.sum(jnp.where(self._known, 0.0, log_scale - Normal(0.0, 1.0).log_prob(noise)))

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        known, outer = jnp.zeros(Layout(self.sites).dim), jnp.zeros(())
        if self.margins is not None:
            back, log_det = self.margins.back(self._real.flatten(z))
            known, outer = known.at[np.flatnonzero(self._known)].set(back), -log_det
        keys = jax.random.split(key, samples)
        weights = jax.lax.map(lambda k: self._weight(z, known, outer, k), keys, batch_size=64)
        return logsumexp(weights) - jnp.log(float(samples))

    def score_weight(self, inner: int) -> float:
        return 1.0 / (inner + 1)

    def conditionals(self, context: Latent) -> dict[str, Conditional]:
        return self._conditionals(context.m)
