"""Independent counts and long ranges whose spread is free: narrower or wider than Poisson or binomial."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array

from hivi._likelihoods.base import AbstractLikelihood
from hivi._likelihoods.marginals import TINY, AbstractSpreadMarginal
from hivi._normal import log_interval
from hivi._tree import Key, value_zero

SHEPPARD = 1 / 12
"""Variance of a uniform over one unit: what rounding to integers adds to that of a normal variable."""


class DispersedLikelihood(AbstractLikelihood):
    """About low + Poisson(rate) or low + Binomial(n, p), wider or narrower: the values whose thresholds enclose standard normals.

    lambda_i = (log rate or logit p, free dispersion), the parameters of the marginal. A Poisson's variance is its mean, and every
    mixture of Poissons is wider, also given all other coordinates; here it is divided by about c^2, c in (1/2, 16), for rates
    up to e^14. With S(z) = P(z' > z), `d E f = E[(dS(z) / q(z)) (f(z+1) - f(z))]`: the Poisson's difference identity in general.
    """

    marginal: AbstractSpreadMarginal = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False
    averaged: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return 2

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return self.marginal.start(shape, key)

    def near(self, lam: Array, mean: Array) -> Array:
        return lam.at[..., 0].add(self.marginal.natural(mean))

    def sample(self, lam: Array, key: Key) -> Array:
        return self.marginal.value(lam, jax.random.normal(key, lam.shape[:-1], lam.dtype))

    def log_prob(self, lam: Array, z: Array) -> Array:
        return log_interval(*self.marginal.thresholds(lam, z))

    def mean(self, lam: Array) -> Array:
        raise NotImplementedError("no closed form")

    def support(self) -> tuple[int, int]:
        return self.marginal.low, self.marginal.count

    def moves(self, z: Array) -> Array:
        return self.marginal.above(z)[None]

    def move_weights(self, lam: Array, z: Array) -> Array:
        below, above = self.marginal.thresholds(lam, z)
        mass = jnp.maximum(jnp.exp(jax.lax.stop_gradient(log_interval(below, above))), TINY)
        return (1 + value_zero(ndtr(-above)) / mass)[None]

    def score(self, lam: Array, z: Array) -> Array:
        return jax.grad(lambda free: jnp.sum(self.log_prob(free, z)))(lam)

    def fisher(self, lam: Array) -> Array:
        """That of a normal variable of this mean and variance, with Sheppard's correction where it is not small; diagonal.

        Within a factor of three. It preconditions natural gradients and shapes the linearised auxiliary; neither needs it exact.
        """
        plain, variance, slope = self.marginal.moments(lam)
        wide = variance + SHEPPARD * plain / (plain + SHEPPARD)
        diagonal = jnp.stack([plain**2 / wide, 2 * (slope * variance / wide) ** 2], -1)
        return diagonal[..., None] * jnp.eye(2)

    def features(self, z: Array) -> Array:
        return self.marginal.features(z)
