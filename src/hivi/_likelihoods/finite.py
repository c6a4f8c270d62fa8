"""Independent variables with finitely many values."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions import CategoricalLogits

from hivi._likelihoods.base import AbstractLikelihood, updatable_sum
from hivi._space import Values
from hivi._tree import Key


class FiniteLikelihood(AbstractLikelihood):
    """Independent categorical variables over low, ..., low+count-1; two values have one logit, more have `count`."""

    low: int = eqx.field(static=True)
    count: int = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False
    table: ClassVar[bool] = True

    def __init__(self, values: Values):
        self.low, self.count = values.low, values.count

    @property
    def width(self) -> int:
        return 1 if self.count == 2 else self.count

    def logits(self, lam: Array) -> Array:
        """Normalised log-probabilities, shape (*shape, count)."""
        if self.width == 1:
            return jnp.concatenate([-jax.nn.softplus(lam), -jax.nn.softplus(-lam)], -1)
        return jax.nn.log_softmax(lam, -1)

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return 0.01 * jax.random.normal(key, (*shape, self.width))

    def sample(self, lam: Array, key: Key) -> Array:
        if self.width == 1:
            drawn = jax.random.bernoulli(key, jax.nn.sigmoid(lam[..., 0])).astype(jnp.int32)
        else:
            drawn = CategoricalLogits(lam).sample(key).astype(jnp.int32)
        return drawn + self.low

    def log_prob(self, lam: Array, z: Array) -> Array:
        if self.width == 1:
            return -jax.nn.softplus(jnp.where(z == self.low, 1.0, -1.0) * lam[..., 0])
        return jnp.take_along_axis(self.logits(lam), (z - self.low)[..., None], -1)[..., 0]

    def total(self, lam: Array, z: Array) -> Array:
        if self.width > 1:
            return updatable_sum(self.log_prob(lam, z))
        bits = (z - self.low).astype(lam.dtype)
        exact = jax.lax.Precision.HIGHEST
        return jnp.tensordot(bits, lam[..., 0], axes=z.ndim, precision=exact) - jnp.sum(jax.nn.softplus(lam))

    def mean(self, lam: Array) -> Array:
        values = self.low + jnp.arange(self.count, dtype=lam.dtype)
        return jnp.exp(self.logits(lam)) @ values

    def support(self) -> tuple[int, int]:
        return self.low, self.count

    def moves(self, z: Array) -> Array:
        shifts = jnp.arange(1, self.count, dtype=z.dtype).reshape((-1,) + (1,) * z.ndim)
        return (z - self.low + shifts) % self.count + self.low

    def move_weights(self, lam: Array, z: Array) -> Array:
        return jnp.exp(jax.vmap(lambda value: self.log_prob(lam, value))(self.moves(z)))

    def near(self, lam: Array, mean: Array) -> Array:
        if self.width > 1:
            return lam
        share = jnp.clip(mean - self.low, 1e-3, 1 - 1e-3)
        return lam + (jnp.log(share) - jnp.log1p(-share))[..., None]

    def score(self, lam: Array, z: Array) -> Array:
        if self.width == 1:
            return jnp.where((z == self.low)[..., None], -jax.nn.sigmoid(lam), jax.nn.sigmoid(-lam))
        p = jax.nn.softmax(lam, -1)
        return jnp.where(jax.nn.one_hot(z - self.low, self.count, dtype=bool), self._others(p), -p)

    def fisher(self, lam: Array) -> Array:
        if self.width == 1:
            return (jax.nn.sigmoid(lam) * jax.nn.sigmoid(-lam))[..., None]
        p = jax.nn.softmax(lam, -1)
        diagonal = jnp.eye(self.count, dtype=bool)
        return jnp.where(diagonal, (p * self._others(p))[..., None], -p[..., None] * p[..., None, :])

    def _others(self, p: Array) -> Array:
        """1 - p_j as the sum of the other probabilities: the difference is zero in float32 long before they are."""
        return jnp.sum(jnp.where(jnp.eye(self.count, dtype=bool), 0.0, p[..., None, :]), -1)

    def features(self, z: Array) -> Array:
        return jax.nn.one_hot(z - self.low, self.count).at[..., 0].set(1.0)
