"""How the values of several real sites lie in one flat vector, and points of it in a proposal's own coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._space import Latents, Site


class Layout(NamedTuple):
    """How the values of several real sites lie in one flat vector."""

    sites: tuple[Site, ...]

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(size_of(s.batch_shape) for s in self.sites)

    def flatten(self, z: Latents) -> Float[Array, " dim"]:
        """Concatenate the sites' values."""
        return jnp.concatenate([jnp.ravel(z[s.name]) for s in self.sites])

    def unflatten(self, flat: Float[Array, " dim"]) -> Latents:
        """Split a flat vector into the sites' values."""
        out, start = {}, 0
        for s in self.sites:
            stop = start + size_of(s.batch_shape)
            out[s.name] = flat[start:stop].reshape(s.batch_shape)
            start = stop
        return out


def size_of(shape: Sequence[int]) -> int:
    """Number of elements."""
    size = 1
    for n in shape:
        size *= n
    return size


class Components(NamedTuple):
    """A mixture of axis-aligned Gaussians over a flat vector."""

    log_weights: Float[Array, " components"]
    location: Float[Array, "components dim"]
    scale: Float[Array, "components dim"]


class Coordinates(NamedTuple):
    """A point in a proposal's reference coordinates, with log |d base / d value|."""

    base: Float[Array, " dim"]
    log_det: Float[Array, ""]


def gaussian_terms(point: Coordinates) -> dict[str, Array]:
    """Terms of log q of a point whose base is standard normal."""
    return {"q(base)": Normal(0.0, 1.0).log_prob(point.base), "q(log det)": point.log_det}


def gaussian_density(point: Coordinates) -> Float[Array, ""]:
    """Log q of such a point: the sum of its terms."""
    return sum((jnp.sum(t) for t in gaussian_terms(point).values()), jnp.zeros(()))
