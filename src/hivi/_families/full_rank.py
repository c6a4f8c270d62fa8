"""Full-rank Gaussian in unconstrained space: doubly stochastic variational inference (Titsias & Lazaro-Gredilla 2014)."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._errors import require_positive
from hivi._families.base import (
    AbstractFamily,
    AbstractProposal,
    Coordinates,
    Layout,
    gaussian_density,
    gaussian_terms,
    require_real,
)
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree, held

SEARCH_LIMIT = 400
"""Up to so many coordinates the best Gaussian is searched for."""


class FullRank(AbstractFamily):
    """z = location + L epsilon, epsilon ~ N(0, I), L lower triangular: DSVI.

    Keeps every linear dependence between continuous sites, in unconstrained space; O(D^2) parameters and cost.

    Args:
        scale: standard deviation at the start.

    Example:
        >>> import hivi
        >>> hivi.FullRank(scale=0.1)
        FullRank(scale=0.1)
    """

    scale: float = 0.1

    def __check_init__(self) -> None:
        require_positive("FullRank(scale=...)", self.scale, "0.1 is usual")

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        require_real("FullRank", sites)
        dim = Layout(sites).dim
        location = 0.01 * jax.random.normal(key, (dim,))
        return FullRankProposal(sites, location, jnp.full(dim, jnp.log(self.scale)), jnp.zeros((dim, dim)))


class FullRankProposal(AbstractProposal):
    """Parameters of a full-rank Gaussian.

    Attributes:
        location: mean, shape (D,).
        log_diagonal: log of the diagonal of L, shape (D,).
        lower: strictly lower part of L in units of its rows' diagonal, shape (D, D); the rest is not used.
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    location: Float[Array, " dim"]
    log_diagonal: Float[Array, " dim"]
    lower: Float[Array, "dim dim"]

    def factor(self) -> Float[Array, "dim dim"]:
        """The Cholesky factor L."""
        dim = self.location.shape[0]
        return jnp.exp(self.log_diagonal)[:, None] * (jnp.eye(dim) + jnp.tril(self.lower, -1))

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        base = jax.random.normal(key, self.location.shape)
        return Layout(self.sites).unflatten(self.location + self.factor() @ base), base

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return gaussian_terms(self.coordinates(z, context))

    def landable(self, site: str) -> bool:
        return any(s.name == site for s in self.sites)

    @property
    def lands(self) -> bool:
        return True

    def started(self, search: Callable[[], tuple[Array, Array]]) -> FullRankProposal:
        if self.location.shape[0] > SEARCH_LIMIT:
            return self
        location, root = search()
        return self._at(location, root)

    def _at(self, location: Array, root: Array) -> FullRankProposal:
        diagonal = jnp.diagonal(root)
        return FullRankProposal(self.sites, location, jnp.log(diagonal), jnp.tril(root / diagonal[:, None], -1))

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        return gaussian_terms(held(self).coordinates(z, None))

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return gaussian_density(self.coordinates(z, None))

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        flat = Layout(self.sites).flatten(value)
        if context is None:
            context = jax.scipy.linalg.solve_triangular(self.factor(), flat - self.location, lower=True)
        return Coordinates(context, -jnp.sum(self.log_diagonal))

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        return Layout(self.sites).unflatten(self.location + self.factor() @ base), jnp.sum(self.log_diagonal)

    def density_at(self, base: Float[Array, " dim"], key: Key) -> tuple[Latents, Array, Array]:
        value, log_det = self.from_coordinates(base)
        return value, log_det, jnp.sum(Normal(0.0, 1.0).log_prob(base)) - log_det

    def affine(self) -> tuple[Array, Array]:
        return self.location, jnp.exp(self.log_diagonal)

    def recentre(self, location: Array, scale: Array) -> FullRankProposal:
        return FullRankProposal(self.sites, location, jnp.log(scale), self.lower)

    def stretch(self, extra: Array) -> FullRankProposal:
        old = self.factor()
        root = jnp.linalg.cholesky(old @ old.T + extra.T @ extra)
        return self._at(self.location, root)
