"""Integers as rounded Gaussians: q(z_i | m_i) of a copula whose marginals are discrete."""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import betainc, log_ndtr, ndtr
from jaxtyping import Array
from numpyro.distributions import Normal

from hivi._likelihoods.base import AbstractLikelihood
from hivi._normal import from_logit, log_interval, to_logit
from hivi._tree import Key, value_zero

EDGE = 40.0
"""Threshold beyond the last value: no latent Gaussian comes near it."""
TINY = 1e-30
MAX_LOG_RATE = 14.0
"""Rates are used up to e^14: beyond that neighbouring thresholds differ by less than float32 can tell."""
MAX_STRETCH = math.log(2.0)


class AbstractMarginal(eqx.Module):
    """A distribution over low, low+1, ...: the marginal F_i of a discrete copula, with parameters theta of width `width`.

    z is the value with Phi^-1(F(z-1)) < e <= Phi^-1(F(z)) of a latent standard normal e.
    """

    low: eqx.AbstractVar[int]

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Number of parameters per coordinate."""

    @abc.abstractmethod
    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        """Initial parameters, (*shape, width)."""

    @abc.abstractmethod
    def thresholds(self, theta: Array, z: Array) -> tuple[Array, Array]:
        """Phi^-1 of F(z-1) and of F(z), elementwise."""

    @abc.abstractmethod
    def ceiling(self, theta: Array) -> Array:
        """A value that is certainly large enough, as an integer."""

    def centre(self, theta: Array, z: Array) -> Array:
        """E[e | z], the mean of the latent normal between the value's thresholds."""
        below, above = self.thresholds(theta, z)
        mass, normal = log_interval(below, above), Normal(0.0, 1.0)
        mean = jnp.exp(normal.log_prob(below) - mass) - jnp.exp(normal.log_prob(above) - mass)
        return jnp.clip(mean, -EDGE, EDGE)


class FiniteMarginal(AbstractMarginal):
    """low, ..., low+count-1 with any probabilities: softmax of theta, or one logit for two values."""

    low: int
    count: int

    @property
    def width(self) -> int:
        return 1 if self.count == 2 else self.count

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return 0.01 * jax.random.normal(key, (*shape, self.width))

    def cuts(self, theta: Array) -> Array:
        """The thresholds between the values, (*shape, count - 1)."""
        if self.count == 2:
            return from_logit(-theta)
        below = jax.lax.cumlogsumexp(theta, axis=theta.ndim - 1)[..., :-1]
        above = jax.lax.cumlogsumexp(theta, axis=theta.ndim - 1, reverse=True)[..., 1:]
        return from_logit(below - above)

    def table(self, theta: Array, location: Array, log_scale: Array) -> Array:
        """Parameters of the `FiniteLikelihood` q(z | e ~ N(location, scale)): log-probabilities, or one logit."""
        cuts = (self.cuts(theta) - location[..., None]) * jnp.exp(-log_scale)[..., None]
        if self.count == 2:
            return to_logit(-cuts)
        inner = log_interval(cuts[..., :-1], cuts[..., 1:])
        return jnp.concatenate([log_ndtr(cuts[..., :1]), inner, log_ndtr(-cuts[..., -1:])], -1)

    def thresholds(self, theta: Array, z: Array) -> tuple[Array, Array]:
        cuts = self.cuts(theta)
        edge = jnp.full((*cuts.shape[:-1], 1), EDGE, cuts.dtype)
        every, place = jnp.concatenate([-edge, cuts, edge], -1), (z - self.low)[..., None]
        below, above = (jnp.take_along_axis(every, place + k, -1)[..., 0] for k in (0, 1))
        return below, above

    def ceiling(self, theta: Array) -> Array:
        return jnp.full(theta.shape[:-1], self.low + self.count - 1)


class CountMarginal(AbstractMarginal):
    """About low + Poisson(rate), widened or narrowed: F(z) = Phi(c w(z)), c in (1/2, 2); theta = (log rate, free c).

    w(z) = 3 sqrt(n) (1 - 1/(9n) - (rate/n)^(1/3)), n = z + 1, is Wilson & Hilferty's normal score of the Poisson: at c = 1,
    where it starts, F is a Poisson's to 0.006 for rates of 0.5 and more, to 0.002 from 3. It is F itself, not a sum of
    probabilities, that defines the marginal: thresholds cost no series, and F is a cdf to the last digit. c < 1 is wider.

    Source: Wilson & Hilferty (1931), for the chi-square distribution function, of which the Poisson's is one.
    """

    low: int

    @property
    def width(self) -> int:
        return 2

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return jnp.stack([0.01 * jax.random.normal(key, shape), jnp.zeros(shape)], -1)

    def _rate(self, theta: Array) -> Array:
        free = theta[..., 0]
        return jnp.exp(jnp.where(free > MAX_LOG_RATE, MAX_LOG_RATE + value_zero(free), free))

    def thresholds(self, theta: Array, z: Array) -> tuple[Array, Array]:
        count, rate = (z - self.low).astype(theta.dtype), self._rate(theta)
        stretch = _stretch(theta[..., 1])
        below = stretch * _score(jnp.maximum(count, 1.0), rate)
        return jnp.where(count == 0, -EDGE * jnp.maximum(1.0, jnp.sqrt(rate)), below), stretch * _score(count + 1, rate)

    def ceiling(self, theta: Array) -> Array:
        # Anscombe: the square root of a Poisson is about normal with deviation 1/2.
        return self.low + jnp.ceil((jnp.sqrt(self._rate(theta)) + 7.0) ** 2 + 10).astype(jnp.int32)


def _score(n: Array, rate: Array) -> Array:
    """Wilson and Hilferty's score; below rate/27, where it would fall again (beyond -7), it stays."""
    n = jnp.maximum(n, rate / 27)
    # 1 - cbrt(rate / n), without the cancellation at large rates.
    return -3 * jnp.sqrt(n) * jnp.expm1(jnp.log1p((rate - n) / n) / 3) - 1 / (3 * jnp.sqrt(n))


class BinomialMarginal(AbstractMarginal):
    """low + Binomial(count - 1, sigmoid(theta_0)), widened or narrowed by c as `CountMarginal`."""

    low: int
    count: int

    @property
    def width(self) -> int:
        return 2

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return jnp.stack([0.01 * jax.random.normal(key, shape), jnp.zeros(shape)], -1)

    def thresholds(self, theta: Array, z: Array) -> tuple[Array, Array]:
        n, count, stretch = float(self.count - 1), (z - self.low).astype(theta.dtype), _stretch(theta[..., 1])
        lower, upper = (stretch * self._cut(theta[..., 0], count - k) for k in (1, 0))
        return jnp.where(count == 0, -EDGE, lower), jnp.where(count == n, EDGE, upper)

    def _cut(self, logit: Array, count: Array) -> Array:
        """Phi^-1 of F(count), from both tails, so that neither cancels; one formula, so that intervals meet."""
        n = float(self.count - 1)
        k = jnp.clip(count, 0.0, n - 1)
        below, above = betainc(n - k, k + 1, jax.nn.sigmoid(-logit)), betainc(k + 1, n - k, jax.nn.sigmoid(logit))
        return from_logit(jnp.log(jnp.maximum(below, TINY)) - jnp.log(jnp.maximum(above, TINY)))

    def ceiling(self, theta: Array) -> Array:
        return jnp.full(theta.shape[:-1], self.low + self.count - 1)


def _stretch(free: Array) -> Array:
    return jnp.exp(MAX_STRETCH * jnp.tanh(free / MAX_STRETCH))


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
        theta, low = lam[..., :-2], self.marginal.low
        latent = lam[..., -2] + jnp.exp(lam[..., -1]) * jax.random.normal(key, lam.shape[:-1], lam.dtype)

        def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
            least, most = ends  # the value is above `least` and at most `most`
            middle = (least + most + 1) // 2
            enough = self.marginal.thresholds(theta, jnp.maximum(middle, low))[1] >= latent
            return jnp.where(enough, least, middle), jnp.where(enough, middle, most)

        most = self.marginal.ceiling(theta)
        ends = (jnp.full_like(most, low - 1), most)
        return jax.lax.while_loop(lambda e: jnp.any(e[1] - e[0] > 1), halve, ends)[1].astype(jnp.int32)

    def log_prob(self, lam: Array, z: Array) -> Array:
        return log_interval(*self._between(lam, z))

    def mean(self, lam: Array) -> Array:
        raise NotImplementedError("no closed form")

    def support(self) -> tuple[int, int]:
        return self.marginal.low, getattr(self.marginal, "count", 0)

    def moves(self, z: Array) -> Array:
        top = getattr(self.marginal, "count", 0)
        return (jnp.minimum(z + 1, self.marginal.low + top - 1) if top else z + 1)[None]

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
