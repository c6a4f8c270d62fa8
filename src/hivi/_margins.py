"""Marginals of continuous coordinates: monotone maps of standard normals."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection
from jaxtyping import Array, Float

from hivi._bijections import backward, forward


class Margins(eqx.Module):
    """Monotone maps of standard normals to the continuous coordinates, and back.

    Attributes:
        location: shape (D,).
        log_scale: shape (D,).
        splines: one for each coordinate, near the identity.
    """

    location: Float[Array, " dim"]
    log_scale: Float[Array, " dim"]
    splines: AbstractBijection

    def onward(self, m: Float[Array, " dim"]) -> tuple[Array, Array]:
        """Value z and log |dz/dm|."""
        bent, log_det = forward(self.splines, m)
        return self.location + jnp.exp(self.log_scale) * bent, log_det + jnp.sum(self.log_scale)

    def back(self, z: Float[Array, " dim"]) -> tuple[Array, Array]:
        """Base m and log |dm/dz|."""
        m, log_det = backward(self.splines, (z - self.location) * jnp.exp(-self.log_scale))
        return m, log_det - jnp.sum(self.log_scale)
