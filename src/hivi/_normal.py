"""The standard normal's cdf and quantiles where probabilities round to 0 or 1, in single precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jaxtyping import Array
from numpyro.distributions import Normal

LIMIT = 80.0
"""Logits are used up to here (probabilities of 1e-35, quantiles of 12.4): their exponentials are normal float32 numbers."""


@jax.custom_jvp
def from_logit(logit: Array) -> Array:
    """Quantile of the probability sigmoid(logit): exact in both tails, since 1 - p is never formed."""
    size = jnp.minimum(jnp.abs(logit), LIMIT)
    return -jnp.sign(logit) * ndtri(jax.nn.sigmoid(-size))


@from_logit.defjvp
def _from_logit_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (logit,), (tangent,) = primals, tangents
    x = from_logit(logit)
    slope = jnp.exp(jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit) - Normal(0.0, 1.0).log_prob(x))
    return x, jnp.where(jnp.abs(logit) > LIMIT, 0.0, slope) * tangent


def to_logit(x: Array) -> Array:
    """Logit of the probability below x, the inverse of `from_logit`."""
    return log_ndtr(x) - log_ndtr(-x)


def log_interval(low: Array, high: Array) -> Array:
    """Log of the probability between low and high, low < high, in whichever tail they lie."""
    flip = low + high > 0
    left, right = jnp.where(flip, -high, low), jnp.where(flip, -low, high)
    log_right = log_ndtr(right)
    gap = jnp.minimum(log_ndtr(left) - log_right, -1e-7)
    return log_right + jnp.log(-jnp.expm1(gap))
