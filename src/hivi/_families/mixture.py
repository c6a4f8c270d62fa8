"""Mixture of mean-fields (Jaakkola & Jordan 1998), with exact sums over the components."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from hivi._errors import require_count, require_positive
from hivi._families.base import (
    AbstractFamily,
    AbstractProposal,
    Components,
    Conditional,
    require_spread,
    size_of,
    with_counts,
    with_tables,
)
from hivi._likelihood import likelihood
from hivi._likelihoods.base import HELD
from hivi._likelihoods.dispersed import DispersedLikelihood
from hivi._likelihoods.normal import NormalLikelihood
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree, held

APART = 0.1
"""How far apart components start at discrete sites: from far apart, each takes a local optimum of its own, and all are poor."""


class Mixture(AbstractFamily):
    """q(z) = sum_k w_k prod_i q(z_i | lambda_ki), with stratified draws: every component is drawn every time.

    Args:
        components: number of components, at least 1; the cost of a step grows with it.
        spread: multiplies how far apart the components start.
        equal: hold all weights at 1/components, as rows of a subsampled plate need: they are then stratified row by row.
        concentration: of counts: every q(z_i | lambda_ki) is negative binomial with this concentration; Poisson if None.
        dispersed: of counts, and of ranges beyond tables (`MeanField`): every q(z_i | lambda_ki) has a free spread of its own.

    Example:
        >>> import hivi
        >>> hivi.Mixture(components=3).components
        3
    """

    components: int = 2
    spread: float = 1.0
    equal: bool = False
    concentration: float | None = None
    dispersed: bool = False

    def __check_init__(self) -> None:
        require_count("Mixture(components=...)", self.components, "1 is mean-field, 2 or more a mixture")
        require_positive("Mixture(spread=...)", self.spread, "1 is usual")
        require_spread(self.concentration, self.dispersed)

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        sites, lam = with_counts(with_tables(sites), self.concentration, self.dispersed), {}
        for s, k in zip(sites, jax.random.split(key, max(len(sites), 1)), strict=False):
            kind, keys = likelihood(s), jax.random.split(k, self.components + 1)
            start = jnp.stack([kind.start(s.shape, c) for c in keys[1:]])
            # Only locations are spread: the log scale of a Normal, or a free dispersion, stays where it is.
            free = 1 if isinstance(kind, NormalLikelihood | DispersedLikelihood) else kind.width
            apart = self.spread * (APART if s.discrete else 1.0)
            noise = apart * jax.random.normal(keys[0], (*start.shape[:-1], free))
            lam[s.name] = start.at[..., :free].add(noise)
        return MixtureProposal(sites, lam, jnp.zeros(self.components), self.equal)


class MixtureProposal(AbstractProposal):
    """Parameters of a mixture: site -> lambda of shape (components, *site shape, width), and the weights' logits."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    lam: dict[str, Array]
    logits: Float[Array, " components"]
    equal: bool = eqx.field(static=True, default=False)

    @property
    def branches(self) -> int:
        return self.logits.shape[-1]  # over rows, they have a leading axis

    @property
    def equal_branches(self) -> bool:
        return self.equal

    @property
    def plain(self) -> bool:
        return True

    def log_weights(self) -> Float[Array, " branches"]:
        return jnp.full(self.branches, -jnp.log(self.branches)) if self.equal else jax.nn.log_softmax(self.logits)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        lam = {name: value[branch] for name, value in self.lam.items()}
        keys = jax.random.split(key, max(len(self.sites), 1))
        draw = {s.name: likelihood(s).sample(lam[s.name], k) for s, k in zip(self.sites, keys, strict=False)}
        return draw, lam

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return {"q": self._log_sum(z)}

    def landable(self, site: str) -> bool:
        return not any(s.discrete for s in self.sites) and any(s.name == site for s in self.sites)

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        return {"q": held(self).log_density(z, jax.random.key(0))}

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        found = self._log_sum(z)
        return jnp.where(found < -HELD / 2, -jnp.inf, found)

    def _log_sum(self, z: Latents) -> Float[Array, ""]:
        per_component = jnp.zeros(self.branches)
        for s in self.sites:
            kind = likelihood(s)
            own = jax.vmap(lambda lam, s=s, kind=kind: kind.total(lam, z[s.name]))(self.lam[s.name])
            per_component = per_component + own
        return logsumexp(per_component + self.log_weights())

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        return {s.name: Conditional(likelihood(s), context[s.name]) for s in self.sites}

    def score_weight(self, inner: int) -> float:
        return 1.0 / self.branches

    # As a prior over lambda (all sites real).
    def components(self) -> Components:
        lam = jnp.concatenate([self.lam[s.name].reshape(self.branches, -1, 2) for s in self.sites], 1)
        return Components(self.log_weights(), lam[..., 0], jnp.exp(lam[..., 1]))

    def affine(self) -> tuple[Array, Array]:
        log_weights, location, scale = self.components()
        weights = jnp.exp(log_weights)[:, None]
        mean = jnp.sum(weights * location, 0)
        return mean, jnp.sqrt(jnp.sum(weights * (scale**2 + (location - mean) ** 2), 0))

    def recentre(self, location: Array, scale: Array) -> MixtureProposal:
        """Components keep their directions; together they get the location and (roughly) the scale."""
        _, own, _ = self.components()
        centred = own - jnp.mean(own, 0)
        centred = centred / jnp.maximum(jnp.sqrt(jnp.mean(centred**2)), 1e-6) if self.branches > 1 else centred
        flat = jnp.stack([location + scale * centred, jnp.broadcast_to(jnp.log(0.3 * scale), own.shape)], -1)
        lam, start = {}, 0
        for s in self.sites:
            stop = start + size_of(s.shape)
            lam[s.name] = flat[:, start:stop].reshape(self.branches, *s.shape, 2)
            start = stop
        return MixtureProposal(self.sites, lam, self.logits, self.equal)
