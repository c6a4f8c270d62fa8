"""Independent Poisson variables, and how to draw many of them."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array

from hivi._likelihoods.base import AbstractLikelihood
from hivi._tree import Key, value_zero

PART, LARGER, MODERATE, PARTS, TERMS = 8.0, 30.0, 60.0, 40, 120
MANY, SHARE = 1024, 8
MAX_LOG_RATE = 20.0
"""Log rates are used up to e^20: beyond that an int32 draw and a float32 count lose their last digits."""


def capped(free: Array) -> Array:
    """A log rate, at most `MAX_LOG_RATE`, with derivative 1 beyond the cap, too."""
    return jnp.where(free > MAX_LOG_RATE, MAX_LOG_RATE + value_zero(free), free)


class PoissonLikelihood(AbstractLikelihood):
    """Independent low + Poisson(exp(lambda)) variables, with the log rate capped at `MAX_LOG_RATE`.

    A lambda beyond the cap has the values *and the gradient* of one at the cap (straight-through: the derivative of the
    capped log rate is 1 everywhere). The true derivative there is 0, and a lambda that strayed would never come back.
    So the score stays z - rate, with mean zero, and the moves keep the weight whose gradient they need: a bound that
    falls at the cap pulls lambda back as fast as there.
    """

    low: int = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return 1

    def log_rate(self, lam: Array) -> Array:
        """The capped log rate, with derivative 1 beyond the cap, too."""
        return capped(lam[..., 0])

    def rate(self, lam: Array) -> Array:
        """The rate, exp of `log_rate`."""
        return jnp.exp(self.log_rate(lam))

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return 0.01 * jax.random.normal(key, (*shape, 1))

    def sample(self, lam: Array, key: Key) -> Array:
        return poisson(key, self.rate(lam)) + self.low

    def log_prob(self, lam: Array, z: Array) -> Array:
        count = z - self.low
        return count * self.log_rate(lam) - self.rate(lam) - gammaln(count + 1.0)

    def near(self, lam: Array, mean: Array) -> Array:
        return lam + jnp.log(jnp.maximum(mean - self.low, 1e-3))[..., None]

    def mean(self, lam: Array) -> Array:
        return self.low + self.rate(lam)

    def support(self) -> tuple[int, int]:
        return self.low, 0

    def moves(self, z: Array) -> Array:
        return (z + 1)[None]

    def move_weights(self, lam: Array, z: Array) -> Array:
        return jnp.broadcast_to(self.rate(lam), z.shape)[None]

    def score(self, lam: Array, z: Array) -> Array:
        return (z - self.low - self.rate(lam))[..., None]

    def fisher(self, lam: Array) -> Array:
        return self.rate(lam)[..., None, None]

    def features(self, z: Array) -> Array:
        count = (z - self.low).astype(jnp.result_type(float))
        return jnp.stack([jnp.ones_like(count), jnp.log1p(count), (count == 0) * 1.0, jnp.sqrt(count)], -1)


def poisson(key: Key, rate: Array) -> Array:
    """Poisson draws: many of them by inversion up to a rate of `PART`, with the rest of the larger rates drawn apart.

    A sum of Poisson draws is one of the summed rate. Where few rates are larger, their rest costs by its number (not under
    `vmap` with rates of its own each, which takes all ways); where many are, moderate ones go on by inversion in larger
    parts, and beyond that JAX draws by rejection.
    """
    if rate.size < MANY:
        return jax.random.poisson(key, rate, dtype=jnp.int32)
    k_part, k_rest = jax.random.split(key)
    part = jnp.minimum(rate, PART)
    rest, few = (rate - part).ravel(), rate.size // SHARE
    number = jnp.sum(rest > 0)
    inverted = jnp.all(rest < jnp.where(number <= few, PARTS * LARGER, MODERATE))
    way = jnp.where(number == 0, 0, jnp.where(~inverted, 3, jnp.where(number <= few, 1, 2)))

    def none(_: Key) -> Array:
        return jnp.zeros(rest.shape, jnp.int32)

    def of_few(k: Key) -> Array:
        places = jnp.nonzero(rest > 0, size=few, fill_value=rest.size)[0]
        drawn = _in_parts(k, rest.at[places].get(mode="fill", fill_value=0.0))
        return none(k).at[places].set(drawn, mode="drop")

    def moderate(k: Key) -> Array:
        return _in_parts(k, rest)

    def large(k: Key) -> Array:
        return jax.random.poisson(k, rest, dtype=jnp.int32)

    more = jax.lax.switch(way, (none, of_few, moderate, large), k_rest)
    return _inversion(k_part, part) + more.reshape(rate.shape)


def _in_parts(key: Key, rate: Array) -> Array:
    """Draws as sums of draws of rates up to `LARGER`."""

    def draw(carry: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
        k, left, count = carry
        k, now = jax.random.split(k)
        here = jnp.minimum(left, LARGER)
        return k, left - here, count + _inversion(now, here)

    start = (key, rate, jnp.zeros(rate.shape, jnp.int32))
    return jax.lax.while_loop(lambda carry: jnp.any(carry[1] > 0), draw, start)[2]


def _inversion(key: Key, rate: Array) -> Array:
    """Draws of rates up to `LARGER`: the number of partial sums of probabilities that a uniform exceeds.

    A uniform beyond the float32 sum of all probabilities (1e-7 of draws) ends where a probability no longer adds to it.
    """
    u = jax.random.uniform(key, rate.shape, rate.dtype)
    first = jnp.exp(-rate)

    def more(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        return (carry[0] < TERMS) & jnp.any(carry[-1])

    def add(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        step, mass, total, count, short = carry
        mass = mass * rate / (step + 1)
        now = total + mass
        # Below its mode a mass may round away, too: there the sum is still far from any uniform.
        short = short & ((now > total) | (step < rate))
        count = count + short
        return step + 1, mass, now, count, short & (now <= u)

    start = (jnp.array(0, jnp.int32), first, first, jnp.zeros(rate.shape, jnp.int32), first <= u)
    return jax.lax.while_loop(more, add, start)[3]
