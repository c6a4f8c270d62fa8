"""Independent Binomial variables."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array
from numpyro.distributions import Binomial

from hivi._likelihoods.base import AbstractLikelihood
from hivi._tree import Key, value_zero


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

    def support(self) -> tuple[int, int]:
        return self.low, self.count

    def moves(self, z: Array) -> Array:
        return jnp.minimum(z + 1, self.low + self.count - 1)[None]

    def move_weights(self, lam: Array, z: Array) -> Array:
        # d/dp E_n f = n E_{n-1}[f(z+1)-f(z)], and Binomial(n-1) = (n-z)/(n(1-p)) Binomial(n) at z.
        # dp / (1-p) = p d lambda: written so, nothing overflows where p rounds to 1.
        p = jax.nn.sigmoid(lam[..., 0])
        weight = jax.lax.stop_gradient(p * (self.count - 1 - (z - self.low)))
        return (weight * (1 + value_zero(lam[..., 0])))[None]

    def score(self, lam: Array, z: Array) -> Array:
        hits = (z - self.low)[..., None]
        return hits * jax.nn.sigmoid(-lam) - (self.count - 1 - hits) * jax.nn.sigmoid(lam)

    def fisher(self, lam: Array) -> Array:
        return ((self.count - 1) * jax.nn.sigmoid(lam) * jax.nn.sigmoid(-lam))[..., None]

    def features(self, z: Array) -> Array:
        share = (z - self.low + 0.5) / self.count
        return jnp.stack([jnp.ones_like(share), jnp.log(share) - jnp.log1p(-share), share], -1)
