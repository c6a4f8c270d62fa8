"""Low-rank Gaussian in unconstrained space: a diagonal plus a few shared directions (Ong, Nott & Smith 2018)."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._errors import require_count, require_positive
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

START = 0.3
"""Length of each direction at the start, in units of the coordinates' scale: at zero the gradient would vanish."""


class LowRank(AbstractFamily):
    """z = location + scale * (epsilon + V eta), epsilon ~ N(0, I_D), eta ~ N(0, I_rank): covariance S (I + V V') S.

    Keeps the linear dependence that a few directions carry, in unconstrained space; O(D rank) parameters and cost of a
    draw and its density, O(D rank^2) once a step. The density is exact, by the Sherman-Morrison formula one direction
    at a time: the Woodbury identity and the determinant lemma without a matrix of size rank, and without their
    cancellation.

    Args:
        rank: number of directions, at least 1.
        scale: standard deviation at the start.

    Raises:
        FamilyError: when it is built, for a rank that is not a positive integer, or a discrete site.

    Example:
        >>> import hivi
        >>> hivi.LowRank(rank=3)
        LowRank(rank=3)

    Source: Ong, Nott & Smith (2018), Gaussian variational approximation with a factor covariance structure; Miller, Foti
    & Adams (2017), Variational boosting.
    """

    rank: int
    scale: float = 0.1

    def __check_init__(self) -> None:
        require_count("LowRank(rank=...)", self.rank, "use MeanField() for no dependence, or FullRank() for all of it")
        require_positive("LowRank(scale=...)", self.scale, "0.1 is usual")

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        require_real("LowRank", sites)
        dim = Layout(sites).dim
        k1, k2 = jax.random.split(key)
        location = 0.01 * jax.random.normal(k1, (dim,))
        directions = START / dim**0.5 * jax.random.normal(k2, (self.rank, dim))
        return LowRankProposal(sites, location, jnp.full(dim, jnp.log(self.scale)), directions)


class LowRankProposal(AbstractProposal):
    """Parameters of a low-rank Gaussian.

    A draw is location + scale * M base, base ~ N(0, I_D), with M M' = I + V V' and M a product of one symmetric factor
    I + c w w' for each direction: the same law as with epsilon and eta, and every draw has coordinates of its own.

    Attributes:
        location: mean, shape (D,).
        log_scale: log standard deviation of what the directions leave, shape (D,).
        directions: rows of V', in units of the scale, shape (rank, D).
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    location: Float[Array, " dim"]
    log_scale: Float[Array, " dim"]
    directions: Float[Array, "rank dim"]

    def _factors(self) -> tuple[list[Array], list[Array]]:
        """Vectors w_k, and sqrt(1 + |w_k|^2), of the factors of M: each direction as the earlier factors leave it."""
        vectors: list[Array] = []
        roots: list[Array] = []
        for v in self.directions:
            w = _whiten(v, vectors, roots)
            vectors.append(w)
            roots.append(jnp.sqrt(1 + jnp.sum(w * w)))
        return vectors, roots

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        base = jax.random.normal(key, self.location.shape)
        return self.from_coordinates(base)[0], base

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return gaussian_terms(self.coordinates(z, context))

    def landable(self, site: str) -> bool:
        return any(s.name == site for s in self.sites)

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        return gaussian_terms(held(self).coordinates(z, None))

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return gaussian_density(self.coordinates(z, None))

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        vectors, roots = self._factors()
        base = context
        if base is None:
            flat = Layout(self.sites).flatten(value)
            base = _whiten((flat - self.location) * jnp.exp(-self.log_scale), vectors, roots)
        return Coordinates(base, -self._log_det(roots))

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        vectors, roots = self._factors()
        unit = base
        for w, root in zip(reversed(vectors), reversed(roots), strict=True):
            unit = unit + w * jnp.sum(w * unit) / (1 + root)
        value = Layout(self.sites).unflatten(self.location + jnp.exp(self.log_scale) * unit)
        return value, self._log_det(roots)

    def _log_det(self, roots: list[Array]) -> Array:
        return jnp.sum(self.log_scale) + jnp.sum(jnp.log(jnp.stack(roots)))

    def density_at(self, base: Float[Array, " dim"], key: Key) -> tuple[Latents, Array, Array]:
        value, log_det = self.from_coordinates(base)
        return value, log_det, jnp.sum(Normal(0.0, 1.0).log_prob(base)) - log_det

    def affine(self) -> tuple[Array, Array]:
        return self.location, jnp.exp(self.log_scale)

    def recentre(self, location: Array, scale: Array) -> LowRankProposal:
        return LowRankProposal(self.sites, location, jnp.log(scale), self.directions)

    def stretch(self, extra: Array) -> LowRankProposal:
        """The longest of the rows take the places of the first directions; the others stay."""
        wanted = extra * jnp.exp(-self.log_scale)
        count = min(len(wanted), len(self.directions))
        _, lengths, axes = jnp.linalg.svd(wanted, full_matrices=False)
        longest = (lengths[:, None] * axes)[:count]
        directions = jnp.concatenate([longest, self.directions[: len(self.directions) - count]])
        return LowRankProposal(self.sites, self.location, self.log_scale, directions)


def _whiten(unit: Array, vectors: list[Array], roots: list[Array]) -> Array:
    """M^-1 of a vector, factor by factor."""
    for w, root in zip(vectors, roots, strict=True):
        unit = unit - w * jnp.sum(w * unit) / (root * (1 + root))
    return unit
