"""Integers as rounded Gaussians: q(z_i | m_i) of a copula whose marginals are discrete."""

from __future__ import annotations

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array

from hivi._likelihoods.base import AbstractLikelihood
from hivi._likelihoods.marginals import TINY, AbstractMarginal
from hivi._normal import log_interval
from hivi._tree import Key, value_zero


class ThresholdLikelihood(AbstractLikelihood):
    """z = the value whose thresholds enclose e_i ~ N(location_i, scale_i); lambda_i = (theta_i, location_i, log scale_i).

    q(z | location) = Phi((b - location) / scale) - Phi((a - location) / scale), a and b the thresholds of z. Whatever the
    marginal, `d E f = E[(dS(z) / q(z)) (f(z+1) - f(z))]`, S(z) = P(z' > z): the difference identity of the Poisson in general.
    """

    marginal: AbstractMarginal = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False
    averaged: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return self.marginal.width + 2

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        rest = jnp.broadcast_to(jnp.array([0.0, math.log(0.7)]), (*shape, 2))
        return jnp.concatenate([self.marginal.start(shape, key), rest], -1)

    def _between(self, lam: Array, z: Array) -> tuple[Array, Array]:
        below, above = self.marginal.thresholds(lam[..., :-2], z)
        scale = jnp.exp(-lam[..., -1])
        return (below - lam[..., -2]) * scale, (above - lam[..., -2]) * scale

    def sample(self, lam: Array, key: Key) -> Array:
        latent = lam[..., -2] + jnp.exp(lam[..., -1]) * jax.random.normal(key, lam.shape[:-1], lam.dtype)
        return self.marginal.value(lam[..., :-2], latent)

    def log_prob(self, lam: Array, z: Array) -> Array:
        return log_interval(*self._between(lam, z))

    def mean(self, lam: Array) -> Array:
        raise NotImplementedError("no closed form")

    def support(self) -> tuple[int, int]:
        return self.marginal.low, self.marginal.count

    def moves(self, z: Array) -> Array:
        return self.marginal.above(z)[None]

    def move_weights(self, lam: Array, z: Array) -> Array:
        below, above = self._between(lam, z)
        mass = jnp.maximum(jnp.exp(jax.lax.stop_gradient(log_interval(below, above))), TINY)
        return (1 + value_zero(ndtr(-above)) / mass)[None]

    def score(self, lam: Array, z: Array) -> Array:
        return jax.grad(lambda free: jnp.sum(self.log_prob(free, z)))(lam)

    def fisher(self, lam: Array) -> Array:
        raise NotImplementedError("no closed form")

    def features(self, z: Array) -> Array:
        count = (z - self.marginal.low).astype(jnp.result_type(float))
        return jnp.stack([jnp.ones_like(count), jnp.log1p(count)], -1)
