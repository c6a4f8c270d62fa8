"""Pair copulas on the normal scale: how one of two standard normals depends on the other, in closed form both ways."""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtr
from jaxtyping import Array
from numpyro.distributions import Normal

from hivi._normal import from_logit, to_logit
from hivi._tree import value_zero

FRANK_UNIT = 6.0
"""Frank's theta of parameter 1, so that 1 is about as much dependence (Kendall's tau 0.5) as for a Gaussian pair."""
FRANK_LEAST = 1e-2
"""The least |theta|: at 0, independence, the formulas are 0/0."""
SMALLEST = 1e-37
FRANK_MOST, GAUSSIAN_MOST = 60.0, 8.0
"""The largest parameters that are used, rank correlations of 0.94 and 1 - 1e-7; with derivative 1 beyond."""


class AbstractPair(eqx.Module):
    """An exchangeable copula of two variables; parameter 0 is independence, its sign that of the dependence."""

    @abc.abstractmethod
    def onward(self, parameter: Array, x: Array, y: Array) -> tuple[Array, Array]:
        """The base h = Phi^-1(F(x | y)), standard normal given y, and log |dh/dx|."""

    @abc.abstractmethod
    def back(self, parameter: Array, h: Array, y: Array) -> Array:
        """The x of a base: the inverse of `onward`."""


class GaussianPair(AbstractPair):
    """Correlation tanh(parameter): h = (x - rho y) / sqrt(1 - rho^2)."""

    def onward(self, parameter: Array, x: Array, y: Array) -> tuple[Array, Array]:
        parameter = _capped(parameter)
        slope = jnp.cosh(parameter)
        log_slope = jnp.logaddexp(parameter, -parameter) - jnp.log(2.0)
        return slope * x - jnp.sinh(parameter) * y, jnp.broadcast_to(log_slope, jnp.shape(x))

    def back(self, parameter: Array, h: Array, y: Array) -> Array:
        parameter = _capped(parameter)
        return h / jnp.cosh(parameter) + jnp.tanh(parameter) * y


def _capped(parameter: Array) -> Array:
    inside = jnp.clip(jax.lax.stop_gradient(parameter), -GAUSSIAN_MOST, GAUSSIAN_MOST)
    return inside + value_zero(parameter)


class FrankPair(AbstractPair):
    """Frank's copula: C(u, v) = -1/theta log(1 + (e^(-theta u) - 1)(e^(-theta v) - 1)/(e^(-theta) - 1)).

    No dependence in the tails. Everything is done with logits, `logit F(u|v) = theta (u - v) + log(1 - e^(-theta u))
    - log(1 - e^(-theta (1 - u)))`, which is exact for u near 0 and near 1 alike; a negative theta mirrors y.

    Source: Frank (1979); Joe (1997), section 5.1.
    """

    def _theta(self, parameter: Array, y: Array) -> tuple[Array, Array]:
        """A positive theta, and y mirrored where it was negative."""
        size = FRANK_UNIT * jnp.abs(parameter)
        theta = jnp.where(size < FRANK_LEAST, FRANK_LEAST + value_zero(size), size)
        theta = jnp.where(theta > FRANK_MOST, FRANK_MOST + value_zero(theta), theta)
        return theta, jnp.where(parameter < 0, -y, y)

    def onward(self, parameter: Array, x: Array, y: Array) -> tuple[Array, Array]:
        theta, y = self._theta(parameter, y)
        low, high = jnp.maximum(ndtr(x), SMALLEST), jnp.maximum(ndtr(-x), SMALLEST)
        logit = theta * (low - ndtr(y)) + _log_rest(theta * low) + log_ndtr(x)
        logit = logit - _log_rest(theta * high) - log_ndtr(-x)
        h = from_logit(logit)
        rate = jnp.log(theta) + jnp.log1p(1 / jnp.expm1(theta * low) + 1 / jnp.expm1(theta * high))
        density = Normal(0.0, 1.0).log_prob(x) - Normal(0.0, 1.0).log_prob(h)
        return h, rate + jax.nn.log_sigmoid(logit) + jax.nn.log_sigmoid(-logit) + density

    def back(self, parameter: Array, h: Array, y: Array) -> Array:
        theta, y = self._theta(parameter, y)
        logit = to_logit(h)
        low, high = _solve(theta, logit + theta * ndtr(y)), _solve(theta, -logit + theta * ndtr(-y))
        return from_logit(jnp.log(low) - jnp.log(high))


def _log_rest(t: Array) -> Array:
    """log((1 - e^-t) / t); the t itself cancels against theta's, and its logarithm is known better."""
    small = t < 1e-4
    safe = jnp.where(small, 1.0, t)
    return jnp.where(small, -0.5 * t, jnp.log(-jnp.expm1(-safe) / safe))


def _solve(theta: Array, logit: Array) -> Array:
    """The theta u for which (1 - e^(-theta u)) / (e^(-theta u) - e^(-theta)) = e^logit."""
    weak = jnp.minimum(theta, 1.0)
    near = -jnp.log1p(jax.nn.sigmoid(logit) * jnp.expm1(-weak))
    far = jax.nn.softplus(logit) - jax.nn.softplus(logit - jnp.maximum(theta, 1.0))
    return jnp.maximum(jnp.where(theta < 1, near, far), SMALLEST)
