"""Distributions of integers as rounded normal scores: z is the value whose thresholds enclose a standard normal."""

from __future__ import annotations

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jaxtyping import Array
from numpyro.distributions import Normal

from hivi._normal import from_logit, log_interval, to_logit
from hivi._tree import Key, value_zero

EDGE = 40.0
"""Threshold beyond the last value: no latent Gaussian comes near it."""
TINY = 1e-30
MAX_LOG_RATE = 14.0
"""Rates are used up to e^14: beyond that neighbouring thresholds differ by less than float32 can tell."""
MAX_LOGIT = 14.0
"""Of binomials, likewise."""
WIDEST, NARROWEST = math.log(2.0), math.log(16.0)
"""Logarithms of the most that a normal score is divided and multiplied by."""


class AbstractMarginal(eqx.Module):
    """A distribution over low, low+1, ...: the marginal F_i of a discrete copula, with parameters theta of width `width`.

    z is the value with Phi^-1(F(z-1)) < e <= Phi^-1(F(z)) of a latent standard normal e.
    """

    low: eqx.AbstractVar[int]
    count: eqx.AbstractVar[int]
    """Number of values; 0 where it is infinite."""

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

    def value(self, theta: Array, latent: Array) -> Array:
        """The value whose thresholds enclose a latent number, elementwise, by halving the range."""

        def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
            least, most = ends  # the value is above `least` and at most `most`
            middle = (least + most + 1) // 2
            enough = self.thresholds(theta, jnp.maximum(middle, self.low))[1] >= latent
            return jnp.where(enough, least, middle), jnp.where(enough, middle, most)

        most = self.ceiling(theta)
        ends = (jnp.full_like(most, self.low - 1), most)
        return jax.lax.while_loop(lambda e: jnp.any(e[1] - e[0] > 1), halve, ends)[1].astype(jnp.int32)

    def above(self, z: Array) -> Array:
        """The next value, the last one staying."""
        return jnp.minimum(z + 1, self.low + self.count - 1) if self.count else z + 1

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


class AbstractSpreadMarginal(AbstractMarginal):
    """A Poisson or a binomial, widened or narrowed: F(z) = Phi(c w(z)), w its normal score.

    theta = (its natural parameter, free c).
    """

    @property
    def width(self) -> int:
        return 2

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return jnp.stack([0.01 * jax.random.normal(key, shape), jnp.zeros(shape)], -1)

    @abc.abstractmethod
    def natural(self, mean: Array) -> Array:
        """The natural parameter of a mean."""

    @abc.abstractmethod
    def variance(self, theta: Array) -> Array:
        """Of the Poisson or binomial at c = 1: also the derivative of its mean by the natural parameter."""

    def plain(self, mean: Array) -> Array:
        """Parameters of the Poisson or binomial of this mean."""
        natural = self.natural(mean)
        return jnp.stack([natural, jnp.zeros_like(natural)], -1)

    def spread(self, theta: Array, variance: Array) -> Array:
        """Parameters of the same mean with about this variance, as far as c reaches: `moments` the other way."""
        log_c = 0.5 * (jnp.log(self.variance(theta)) - jnp.log(variance))
        most = jnp.where(log_c > 0, NARROWEST, WIDEST)
        free = most * jnp.arctanh(jnp.clip(log_c / most, -0.95, 0.95))
        return theta.at[..., 1].set(free)

    def moments(self, theta: Array) -> tuple[Array, Array, Array]:
        """The variance at c = 1; about the variance; the derivative of log c."""
        plain, free = self.variance(theta), theta[..., 1]
        slope = 1 - jnp.tanh(free / jnp.where(free > 0, NARROWEST, WIDEST)) ** 2
        return plain, plain / _stretch(free) ** 2, slope

    @abc.abstractmethod
    def features(self, z: Array) -> Array:
        """Functions of z for a regression; the first is 1."""


class CountMarginal(AbstractSpreadMarginal):
    """About low + Poisson(rate), widened or narrowed: F(z) = Phi(c w(z)), c in (1/2, 16); theta = (log rate, free c).

    w(z) = 3 sqrt(n) (1 - 1/(9n) - (rate/n)^(1/3)), n = z + 1, is Wilson & Hilferty's normal score of the Poisson: at c = 1,
    where it starts, F is a Poisson's to 0.006 for rates of 0.5 and more, to 0.002 from 3. It is F itself, not a sum of
    probabilities, that defines the marginal: thresholds cost no series, and F is a cdf to the last digit. c < 1 is wider.

    Source: Wilson & Hilferty (1931), for the chi-square distribution function, of which the Poisson's is one.
    """

    low: int
    count: int = 0

    def natural(self, mean: Array) -> Array:
        return jnp.log(jnp.maximum(mean - self.low, 1e-3))

    def variance(self, theta: Array) -> Array:
        return jnp.exp(self._log_rate(theta))

    def features(self, z: Array) -> Array:
        count = (z - self.low).astype(jnp.result_type(float))
        return jnp.stack([jnp.ones_like(count), jnp.log1p(count), (count == 0) * 1.0, jnp.sqrt(count)], -1)

    def _log_rate(self, theta: Array) -> Array:
        return _within(theta[..., 0], -MAX_LOG_RATE, MAX_LOG_RATE)

    def thresholds(self, theta: Array, z: Array) -> tuple[Array, Array]:
        count, log_rate = (z - self.low).astype(theta.dtype), self._log_rate(theta)
        stretch = _stretch(theta[..., 1])
        least = -EDGE * stretch * jnp.maximum(1.0, jnp.exp(log_rate / 2))
        below = stretch * _score(jnp.maximum(count, 1.0), log_rate)
        return jnp.where(count == 0, least, below), stretch * _score(count + 1, log_rate)

    def ceiling(self, theta: Array) -> Array:
        # Anscombe: the square root of a Poisson is about normal with deviation 1/2.
        return self.low + jnp.ceil((jnp.exp(self._log_rate(theta) / 2) + 7.0) ** 2 + 10).astype(jnp.int32)


def _within(free: Array, low: float, high: float) -> Array:
    """A parameter kept between bounds, with derivative 1 beyond them, too."""
    return jnp.clip(jax.lax.stop_gradient(free), low, high) + value_zero(free)


def _score(n: Array, log_rate: Array) -> Array:
    """Wilson and Hilferty's score; below rate/27, where it would fall again (beyond -7), it stays."""
    rate = jnp.exp(log_rate)
    n = jnp.maximum(n, rate / 27)
    # 1 - cbrt(rate / n): without cancellation where the rate is large, and without a logarithm of 0 where it is small.
    small = rate < n / 2
    near = jnp.log1p(jnp.where(small, 0.0, (rate - n) / n))
    return -3 * jnp.sqrt(n) * jnp.expm1(jnp.where(small, log_rate - jnp.log(n), near) / 3) - 1 / (3 * jnp.sqrt(n))


class BinomialMarginal(AbstractSpreadMarginal):
    """About low + Binomial(count - 1, sigmoid(theta_0)), widened or narrowed by c as `CountMarginal`, for up to 10^5 values.

    w(z) = ((1 - b) g - (1 - a)) / sqrt(b g^2 + a), g^3 = (z + 1) (1 - p) / ((n - z) p), a = 1/(9 (n - z)), b = 1/(9 (z + 1)), is
    Camp & Paulson's normal score: at c = 1, for n of 64 and more, F is a binomial's to 0.0005 where both counts to expect, of
    successes and of failures, are 5 or more, and to 0.013 everywhere.

    Source: Camp (1951), for Paulson's approximation of the F distribution function, of which the binomial's is one.
    """

    low: int
    count: int

    def natural(self, mean: Array) -> Array:
        share = jnp.clip((mean - self.low) / (self.count - 1), 1e-3, 1 - 1e-3)
        return jnp.log(share) - jnp.log1p(-share)

    def variance(self, theta: Array) -> Array:
        return (self.count - 1) * jax.nn.sigmoid(theta[..., 0]) * jax.nn.sigmoid(-theta[..., 0])

    def features(self, z: Array) -> Array:
        share = (z - self.low + 0.5) / self.count
        return jnp.stack([jnp.ones_like(share), jnp.log(share) - jnp.log1p(-share), share], -1)

    def thresholds(self, theta: Array, z: Array) -> tuple[Array, Array]:
        most, count, stretch = float(self.count - 1), (z - self.low).astype(theta.dtype), _stretch(theta[..., 1])
        # At c > 1 scores reach beyond the edge of c = 1: the ends are beyond them.
        edge = EDGE * stretch * math.sqrt(most)
        lower, upper = (stretch * self._score(count - k, theta[..., 0]) for k in (1, 0))
        return jnp.where(count == 0, -edge, lower), jnp.where(count == most, edge, upper)

    def _score(self, count: Array, logit: Array) -> Array:
        """Camp and Paulson's score. Towards the end that the mean is far from, it would turn (beyond -6): it stays there."""
        most, odds = float(self.count - 1), jnp.exp(_within(logit, -MAX_LOGIT, MAX_LOGIT))
        least, largest = ((t * odds * most - 1) / (1 + t * odds) for t in (1 / 27, 27.0))
        hits = jnp.clip(count, 0.0, most - 1)
        hits = jnp.where(odds < 1, jnp.maximum(hits, least), jnp.minimum(hits, largest))
        misses = most - hits
        # g - 1, without cancellation where g is near 1.
        ratio = (hits + 1 - misses * odds) / (misses * odds)
        small = ratio < -0.5
        log_ratio = jnp.where(
            small, jnp.log((hits + 1) / misses) - jnp.log(odds), jnp.log1p(jnp.where(small, 0.0, ratio))
        )
        rise, a, b = jnp.expm1(log_ratio / 3), 1 / (9 * misses), 1 / (9 * (hits + 1))
        return (rise + a - b * (1 + rise)) * jax.lax.rsqrt(b * (1 + rise) ** 2 + a)

    def ceiling(self, theta: Array) -> Array:
        return jnp.full(theta.shape[:-1], self.low + self.count - 1)


def _stretch(free: Array) -> Array:
    """C in (1/2, 16), 1 at 0."""
    most = jnp.where(free > 0, NARROWEST, WIDEST)
    return jnp.exp(most * jnp.tanh(free / most))
