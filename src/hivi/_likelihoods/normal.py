"""Independent Normal variables in unconstrained space."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions import Normal

from hivi._likelihoods.base import AbstractLikelihood
from hivi._tree import Key


class NormalLikelihood(AbstractLikelihood):
    """Independent Normal variables in unconstrained space; lambda_i = (location, log scale)."""

    reparameterised: ClassVar[bool] = True

    @property
    def width(self) -> int:
        return 2

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        location = 0.01 * jax.random.normal(key, shape)
        return jnp.stack([location, jnp.full(shape, jnp.log(0.1))], -1)

    def sample(self, lam: Array, key: Key) -> Array:
        return lam[..., 0] + jnp.exp(lam[..., 1]) * jax.random.normal(key, lam.shape[:-1], lam.dtype)

    def log_prob(self, lam: Array, z: Array) -> Array:
        return Normal(lam[..., 0], jnp.exp(lam[..., 1])).log_prob(z)

    def total(self, lam: Array, z: Array) -> Array:
        return jnp.sum(self.log_prob(lam, z))

    def near(self, lam: Array, mean: Array) -> Array:
        return lam.at[..., 0].add(mean)

    def mean(self, lam: Array) -> Array:
        return lam[..., 0]

    def log_mean_exp(self, lam: Array) -> Array:
        """Log E[e^w] of the LogNormal variable e^w."""
        return lam[..., 0] + 0.5 * jnp.exp(2 * lam[..., 1])

    def moves(self, z: Array) -> Array:
        return jnp.zeros((0, *z.shape), z.dtype)

    def move_weights(self, lam: Array, z: Array) -> Array:
        return jnp.zeros((0, *z.shape), lam.dtype)

    def score(self, lam: Array, z: Array) -> Array:
        error = (z - lam[..., 0]) * jnp.exp(-lam[..., 1])
        return jnp.stack([error * jnp.exp(-lam[..., 1]), error**2 - 1], -1)

    def fisher(self, lam: Array) -> Array:
        diagonal = jnp.stack([jnp.exp(-2 * lam[..., 1]), jnp.full(lam.shape[:-1], 2.0)], -1)
        return diagonal[..., None] * jnp.eye(2)

    def features(self, z: Array) -> Array:
        return jnp.stack([jnp.ones_like(z), z], -1)
