r"""Variational likelihoods q(z_i | lambda_i): one factorised exponential family per kind of site.

A likelihood of a site of shape `s` has parameters `lam` of shape `(*s, width)`. It knows how to sample, its
density, the moves that its gradient identity needs, and the Fisher matrix and score that the linearised
auxiliary needs (both diagonal over coordinates, in `width x width` blocks).
"""

from __future__ import annotations

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float
from numpyro.distributions import Binomial, CategoricalLogits, Normal

from hivi._space import Site, Values
from hivi._tree import Key, value_zero

TINY = 1e-30
PART, TERMS, MANY = 30.0, 120, 1024
MAX_LOG_RATE = 20.0
"""Log rates are used up to e^20: beyond that an int32 draw and a float32 count lose their last digits."""


class AbstractLikelihood(eqx.Module):
    """q(z_i | lambda_i) of one site, independent over its coordinates given lambda."""

    reparameterised: eqx.AbstractClassVar[bool]

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Number of parameters per coordinate."""

    @abc.abstractmethod
    def start(self, shape: tuple[int, ...], key: Key) -> Float[Array, "*shape width"]:
        """Initial parameters, near the centre of the support."""

    def near(self, lam: Float[Array, "*shape width"], mean: Array) -> Float[Array, "*shape width"]:
        """Parameters moved to a mean (broadcast to the site); as they are where the kind has no such start."""
        return lam

    @abc.abstractmethod
    def sample(self, lam: Float[Array, "*shape width"], key: Key) -> Array:
        """One draw of the site."""

    @abc.abstractmethod
    def log_prob(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, "*shape"]:
        """Elementwise log q(z_i | lambda_i)."""

    @abc.abstractmethod
    def mean(self, lam: Float[Array, "*shape width"]) -> Float[Array, "*shape"]:
        """E[z_i | lambda_i]."""

    @abc.abstractmethod
    def moves(self, z: Array) -> Array:
        """Values to which each coordinate moves in the local expectation: (moves, *shape), none if continuous."""

    @abc.abstractmethod
    def move_weights(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, "moves *shape"]:
        """Differentiable weights w_m with `grad E[f] = sum_m grad w_m E[f(move m) - f(z)]`."""

    @abc.abstractmethod
    def score(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, "*shape width"]:
        """Gradient of log q(z_i | lambda_i) with respect to lambda_i, in closed form."""

    @abc.abstractmethod
    def fisher(self, lam: Float[Array, "*shape width"]) -> Float[Array, "*shape width width"]:
        """Fisher matrix of lambda_i, in closed form."""

    @abc.abstractmethod
    def features(self, z: Array) -> Float[Array, "*shape features"]:
        """Functions of z_i on which the auxiliary's factorised regression rests (eq. 7); the first is 1."""


class FiniteLikelihood(AbstractLikelihood):
    """Independent categorical variables over low, ..., low+count-1; two values have one logit, more have `count`."""

    low: int = eqx.field(static=True)
    count: int = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False

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

    def mean(self, lam: Array) -> Array:
        values = self.low + jnp.arange(self.count, dtype=lam.dtype)
        return jnp.exp(self.logits(lam)) @ values

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
            return (z - self.low)[..., None] - jax.nn.sigmoid(lam)
        return jax.nn.one_hot(z - self.low, self.count) - jax.nn.softmax(lam, -1)

    def fisher(self, lam: Array) -> Array:
        if self.width == 1:
            p = jax.nn.sigmoid(lam)
            return (p * (1 - p))[..., None]
        p = jax.nn.softmax(lam, -1)
        return p[..., None] * jnp.eye(self.count) - p[..., None] * p[..., None, :]

    def features(self, z: Array) -> Array:
        return jax.nn.one_hot(z - self.low, self.count).at[..., 0].set(1.0)


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
        free = lam[..., 0]
        return jnp.where(free > MAX_LOG_RATE, MAX_LOG_RATE + value_zero(free), free)

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
    """Poisson draws: many of moderate rate by inversion, as sums of draws of rate at most 30; else by JAX's rejection.

    A uniform beyond the float32 sum of all probabilities (1e-7 of draws) ends at the largest value that has one.
    """
    if rate.size < MANY:
        return jax.random.poisson(key, rate, dtype=jnp.int32)

    def inversion(k: Key, part: Array) -> Array:
        u = jax.random.uniform(k, part.shape, part.dtype)
        first = jnp.exp(-part)

        def more(carry: tuple[Array, Array, Array, Array]) -> Array:
            step, _, total, _ = carry
            return (step < TERMS) & jnp.any(total <= u)

        def add(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            step, mass, total, count = carry
            mass = mass * part / (step + 1)
            return step + 1, mass, total + mass, count + (total <= u)

        start = (jnp.array(0, jnp.int32), first, first, jnp.zeros(part.shape, jnp.int32))
        return jax.lax.while_loop(more, add, start)[3]

    def split(k: Key) -> Array:
        def draw(carry: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
            k, left, count = carry
            k, now = jax.random.split(k)
            part = jnp.minimum(left, PART)
            return k, left - part, count + inversion(now, part)

        start = (k, rate, jnp.zeros(rate.shape, jnp.int32))
        return jax.lax.while_loop(lambda carry: jnp.any(carry[1] > 0), draw, start)[2]

    return jax.lax.cond(jnp.all(rate < 20 * PART), split, lambda k: jax.random.poisson(k, rate, dtype=jnp.int32), key)


class BinomialLikelihood(AbstractLikelihood):
    """Independent low + Binomial(count - 1, sigmoid(lambda)) variables, for ranges too long to enumerate."""

    low: int = eqx.field(static=True)
    count: int = eqx.field(static=True)
    reparameterised: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return 1

    def start(self, shape: tuple[int, ...], key: Key) -> Array:
        return 0.01 * jax.random.normal(key, (*shape, 1))

    def sample(self, lam: Array, key: Key) -> Array:
        return Binomial(self.count - 1, logits=lam[..., 0]).sample(key).astype(jnp.int32) + self.low

    def log_prob(self, lam: Array, z: Array) -> Array:
        trials, count = float(self.count - 1), (z - self.low).astype(lam.dtype)
        choose = gammaln(trials + 1) - gammaln(count + 1) - gammaln(trials - count + 1)
        logits = lam[..., 0]
        return choose + count * logits - trials * jax.nn.softplus(logits)

    def mean(self, lam: Array) -> Array:
        return self.low + (self.count - 1) * jax.nn.sigmoid(lam[..., 0])

    def moves(self, z: Array) -> Array:
        return jnp.minimum(z + 1, self.low + self.count - 1)[None]

    def move_weights(self, lam: Array, z: Array) -> Array:
        # d/dp E_n f = n E_{n-1}[f(z+1)-f(z)], and Binomial(n-1) = (n-z)/(n(1-p)) Binomial(n) at z.
        # dp / (1-p) = p d lambda: written so, nothing overflows where p rounds to 1.
        p = jax.nn.sigmoid(lam[..., 0])
        weight = jax.lax.stop_gradient(p * (self.count - 1 - (z - self.low)))
        return (weight * (1 + value_zero(lam[..., 0])))[None]

    def score(self, lam: Array, z: Array) -> Array:
        return (z - self.low)[..., None] - (self.count - 1) * jax.nn.sigmoid(lam)

    def fisher(self, lam: Array) -> Array:
        p = jax.nn.sigmoid(lam)
        return ((self.count - 1) * p * (1 - p))[..., None]

    def features(self, z: Array) -> Array:
        share = (z - self.low + 0.5) / self.count
        return jnp.stack([jnp.ones_like(share), jnp.log(share) - jnp.log1p(-share), share], -1)


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

    def near(self, lam: Array, mean: Array) -> Array:
        return lam.at[..., 0].add(mean)

    def mean(self, lam: Array) -> Array:
        return lam[..., 0]

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


def natural_gradient(rule: AbstractLikelihood, lam: Array, gradient: Array) -> Array:
    """Inverse Fisher matrix times a gradient, coordinate by coordinate; (*shape, width).

    Categorical logits have one redundant direction, in which the gradient is zero: a small ridge leaves it there.
    """
    fisher = rule.fisher(lam)
    if rule.width == 1:
        return gradient / jnp.maximum(fisher[..., 0], TINY)
    if rule.reparameterised:  # Normal: the matrix is diagonal
        return gradient / jnp.diagonal(fisher, axis1=-2, axis2=-1)
    ridge = 1e-6 * jnp.eye(rule.width)
    return jnp.linalg.solve(fisher + ridge, gradient[..., None])[..., 0]


def likelihood(site: Site) -> AbstractLikelihood:
    """The variational likelihood that suits a site's support."""
    values = site.values
    if values.kind == "real":
        return NormalLikelihood()
    if values.kind == "finite":
        return FiniteLikelihood(values)
    if values.kind == "binomial":
        return BinomialLikelihood(values.low, values.count)
    return PoissonLikelihood(values.low)
