"""The auxiliary r(m | z) of a discrete copula: latent Gaussians from the values, one after another."""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MOST = 2.0


class AbstractReverse(eqx.Module):
    """Where each m_i lies, given those before it and z at i and after it.

    r(m | z) = prod_i N(m_i; sum_{j<i} a_ij m_j + sum_{j>=i} b_ij t_j + c_i(z_i), s_i^2), t_j = E[e_j | z_j],
    log s_i = d_i(z_i) + t_i sum_{j>i} g_ij t_j. Given the m before it, m_i does not depend on the z before it: were q jointly
    Gaussian, this form would be exact. g says how much better m_i is known where z_i and z_j contradict each other.
    Coordinates that are `known` (continuous ones) are conditioned on; for them t_j = m_j.
    """

    @abc.abstractmethod
    def mean(self, m: Float[Array, " dim"], t: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """The sums over m_j and t_j, for every i at once."""

    @abc.abstractmethod
    def log_scale(self, t: Float[Array, " dim"]) -> Float[Array, " dim"]:
        """The part of log s_i that depends on later values, between -`MOST` and `MOST`."""

    @abc.abstractmethod
    def solve(
        self, right: Float[Array, " dim"], t: Float[Array, " dim"], known: Float[Array, " dim"]
    ) -> Float[Array, " dim"]:
        """The m with m_i = right_i + the sums, where known_i is 0, and m_i = t_i where it is 1."""


class DenseReverse(AbstractReverse):
    """Every m_j and z_j; O(D^2).

    Attributes:
        weights: a below the diagonal, b on it and above, shape (D, D).
        scales: g above the diagonal, shape (D, D); the rest is not used.
    """

    weights: Float[Array, "dim dim"]
    scales: Float[Array, "dim dim"]

    def mean(self, m: Array, t: Array) -> Array:
        return jnp.tril(self.weights, -1) @ m + jnp.triu(self.weights) @ t

    def log_scale(self, t: Array) -> Array:
        return _bounded(t * (jnp.triu(self.scales, 1) @ t))

    def solve(self, right: Array, t: Array, known: Array) -> Array:
        free = 1 - known
        left = jnp.eye(len(t)) - free[:, None] * jnp.tril(self.weights, -1)
        right = jnp.where(known > 0, t, right + jnp.triu(self.weights) @ t)
        return jax.scipy.linalg.solve_triangular(left, right, lower=True, unit_diagonal=True)


class BandedReverse(AbstractReverse):
    """The m_j just before and the z_j just after: O(D), and each z_i touches few terms.

    Attributes:
        before: a, (levels, D); [k, i] is for m_{i-k-1}.
        after: b, (ahead + 1, D); [k, i] is for t_{i+k}.
        scales: g, (ahead, D); [k, i] is for t_{i+k+1}.
    """

    before: Float[Array, "levels dim"]
    after: Float[Array, "ahead_and_own dim"]
    scales: Float[Array, "ahead dim"]

    def _ahead(self, t: Array) -> Array:
        return _window(self.after, t, 0)

    def log_scale(self, t: Array) -> Array:
        return _bounded(t * _window(self.scales, t, 1))

    def mean(self, m: Array, t: Array) -> Array:
        levels = len(self.before)
        padded = jnp.concatenate([jnp.zeros(levels, m.dtype), m])
        behind = [row * padded[levels - k - 1 : levels - k - 1 + len(m)] for k, row in enumerate(self.before)]
        return sum(behind, self._ahead(t))

    def solve(self, right: Array, t: Array, known: Array) -> Array:
        def one(older: Array, at: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
            own, start, there, value = at
            m = jnp.where(there > 0, value, start + jnp.sum(own * older))
            return jnp.concatenate([m[None], older[:-1]]), m

        places = (self.before.T, right + self._ahead(t), known, t)
        return jax.lax.scan(one, jnp.zeros(len(self.before), t.dtype), places)[1]


def _window(weights: Array, t: Array, first: int) -> Array:
    """Sum over k of weights[k, i] t_{i+k+first}."""
    padded = jnp.concatenate([t, jnp.zeros(len(weights) + first, t.dtype)])
    parts = [row * padded[k + first : k + first + len(t)] for k, row in enumerate(weights)]
    return sum(parts, jnp.zeros_like(t))


def _bounded(x: Array) -> Array:
    return MOST * jnp.tanh(x / MOST)
