"""Independent negative-binomial variables: counts wider than Poisson."""

from __future__ import annotations

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array

from hivi._likelihoods.base import AbstractLikelihood
from hivi._likelihoods.poisson import capped, poisson
from hivi._tree import Key, value_zero


class NegativeBinomialLikelihood(AbstractLikelihood):
    """Independent low + NegativeBinomial variables with mean exp(lambda) and a fixed concentration r; r = 1 is Geometric.

    Variance m + m^2/r: wider than Poisson. With p = m/(m+r), `d/dlambda E f = p E[(z + r)(f(z+1) - f(z))]`, the
    difference identity of the Poisson (its limit as r grows), on any support and without truncation. Log means are capped as
    Poisson log rates are.
    """

    low: int = eqx.field(static=True)
    concentration: float = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return 1

    def _logit(self, lam: Array) -> Array:
        return capped(lam[..., 0]) - math.log(self.concentration)

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return 0.01 * jax.random.normal(key, (*shape, 1))

    def near(self, lam: Array, mean: Array) -> Array:
        return lam + jnp.log(jnp.maximum(mean - self.low, 1e-3))[..., None]

    def sample(self, lam: Array, key: Key) -> Array:
        k1, k2 = jax.random.split(key)
        wide = jax.random.gamma(k1, self.concentration, lam.shape[:-1], lam.dtype) / self.concentration
        return poisson(k2, jnp.exp(capped(lam[..., 0])) * wide) + self.low

    def log_prob(self, lam: Array, z: Array) -> Array:
        count, logit, r = (z - self.low).astype(lam.dtype), self._logit(lam), self.concentration
        ways = gammaln(count + r) - gammaln(count + 1) - math.lgamma(r)
        return ways - count * jax.nn.softplus(-logit) - r * jax.nn.softplus(logit)

    def mean(self, lam: Array) -> Array:
        return self.low + jnp.exp(capped(lam[..., 0]))

    def support(self) -> tuple[int, int]:
        return self.low, 0

    def moves(self, z: Array) -> Array:
        return (z + 1)[None]

    def move_weights(self, lam: Array, z: Array) -> Array:
        weight = jax.nn.sigmoid(self._logit(lam)) * (z - self.low + self.concentration)
        return (jax.lax.stop_gradient(weight) * (1 + value_zero(lam[..., 0])))[None]

    def score(self, lam: Array, z: Array) -> Array:
        logit = self._logit(lam)
        return ((z - self.low) * jax.nn.sigmoid(-logit) - self.concentration * jax.nn.sigmoid(logit))[..., None]

    def fisher(self, lam: Array) -> Array:
        return (self.concentration * jax.nn.sigmoid(self._logit(lam)))[..., None, None]

    def features(self, z: Array) -> Array:
        count = (z - self.low).astype(jnp.result_type(float))
        return jnp.stack([jnp.ones_like(count), jnp.log1p(count), (count == 0) * 1.0, jnp.sqrt(count)], -1)
