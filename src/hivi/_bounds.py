"""Bounds on log p(x): functions of the log-weights `log_p - log_q` of properly weighted draws.

A bound also says by how much it changes when one log-weight changes (`increment`): that one function turns local
signals and differences into gradients for discrete latents (eq. 8/11), for every bound.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from hivi._errors import FitError, message, require_count

Weights = Float[Array, "samples outer branches"]


class AbstractBound(eqx.Module):
    """A lower bound on log p(x), in nats, estimated from `outer` stratified draws."""

    inner: eqx.AbstractVar[int]
    plate: eqx.AbstractVar[str | None]

    @property
    @abc.abstractmethod
    def draws(self) -> int:
        """Number of draws that one estimate takes."""

    @abc.abstractmethod
    def linear(self, branches: int) -> bool:
        """Whether the bound is linear in the log-weights, so that minibatches keep it a bound."""

    @abc.abstractmethod
    def value(self, log_w: Weights, log_pi: Float[Array, " branches"]) -> Float[Array, " samples"]:
        """One unbiased estimate of the bound per sample.

        Args:
            log_w: log p(x, z) - log q(z) of every draw, shape (samples, outer, branches).
            log_pi: log-probabilities of the stratified branches, shape (branches,).
        """

    @abc.abstractmethod
    def increment(self, log_w: Weights, log_pi: Array, change: Array) -> Array:
        """Change of `value` when one draw's log-weight changes by `change` (samples, outer, branches, ...)."""


class Elbo(AbstractBound):
    """The evidence lower bound `E[log p(x,z) - log q(z)]`: eq. 1, and for a hierarchical family eq. 5.

    Example:
        >>> import hivi
        >>> hivi.Elbo().draws
        1
    """

    inner: int = 0
    plate: str | None = eqx.field(init=False, default=None)

    def __check_init__(self) -> None:
        require_count("Elbo(inner=...)", self.inner, "correct the number", 0, FitError)

    @property
    def draws(self) -> int:
        return 1

    def linear(self, branches: int) -> bool:
        return True

    def value(self, log_w: Weights, log_pi: Array) -> Array:
        return jnp.sum(jnp.exp(log_pi) * log_w, -1)[:, 0]

    def increment(self, log_w: Weights, log_pi: Array, change: Array) -> Array:
        return jnp.exp(log_pi).reshape((-1,) + (1,) * (change.ndim - 3)) * change


class ImportanceWeighted(AbstractBound):
    """Multi-sample bound `E[log 1/M sum_m p(x,z_m)/q(z_m)]` with a tighter `log q` for hierarchical families.

    Args:
        outer: M, importance samples of z (Burda et al. 2016); at least 1.
        inner: K, extra draws lambda ~ r(lambda|z) in log q (Sobolev & Vetrov 2019); 0 is eq. 5, and with the prior itself as
            auxiliary this is semi-implicit inference (Yin & Zhou 2018). Has no effect on families with exact density.
        plate: name of a plate, for a bound taken row by row of it; None for one of all rows together.

    With a plate g is drawn once, z_n M times, and the logarithm is taken for each row n (Burda et al. 2016, eq. 8):

        E[log p(g) - log q(g) + N/B sum_n log 1/M sum_m p(x_n, z_nm | g) / q(z_nm)]

    The bound then stays one in minibatches, and its weights do not degenerate as rows are added: it rises to that of the
    exact q(z_n | x_n, g), where M draws of all rows together would hardly gain. Rows must be independent given g, in p and q.

    With stratified branches the draws of all branches enter the mean with their weights (Morningstar et al. 2021).

    Example:
        >>> import hivi
        >>> hivi.ImportanceWeighted(outer=1, inner=8).draws
        1
        >>> hivi.ImportanceWeighted(outer=8, plate="data").plate
        'data'
    """

    outer: int
    inner: int
    plate: str | None

    def __init__(self, outer: int = 1, inner: int = 0, plate: str | None = None):
        require_count("ImportanceWeighted(outer=...)", outer, "correct the number", 1, FitError)
        require_count("ImportanceWeighted(inner=...)", inner, "correct the number", 0, FitError)
        if not (plate is None or isinstance(plate, str)):
            cure = 'pass its name, as in plate="data"'
            raise FitError(message("ImportanceWeighted(plate=...)", repr(plate), "the name of a plate, or None", cure))
        self.outer, self.inner, self.plate = int(outer), int(inner), plate

    def __repr__(self) -> str:
        own = "" if self.plate is None else f", plate={self.plate!r}"
        return f"ImportanceWeighted(inner={self.inner}, outer={self.outer}{own})"

    @property
    def draws(self) -> int:
        return self.outer

    def linear(self, branches: int) -> bool:
        return self.outer == 1 and branches == 1

    def value(self, log_w: Weights, log_pi: Array) -> Array:
        if self.linear(log_pi.shape[0]):
            return log_w[:, 0, 0]
        return logsumexp(log_w + log_pi, axis=(1, 2)) - jnp.log(self.outer)

    def increment(self, log_w: Weights, log_pi: Array, change: Array) -> Array:
        if self.linear(log_pi.shape[0]):
            return change
        flat = (log_w + log_pi).reshape(log_w.shape[0], -1)
        total = logsumexp(flat, axis=1, keepdims=True)
        # The other draws' share exactly, draw by draw: one minus this draw's own would lose all below 1e-7.
        others = jnp.where(jnp.eye(flat.shape[1], dtype=bool), -jnp.inf, flat[:, None, :])
        shape = log_w.shape + (1,) * (change.ndim - 3)
        log_rest = (logsumexp(others, axis=2) - total).reshape(shape)
        log_share = (flat - total).reshape(shape)
        exact = jnp.logaddexp(log_rest, log_share + change)
        small = jnp.log1p(jnp.exp(log_share) * jnp.expm1(jnp.clip(change, -1.0, 1.0)))
        return jnp.where(jnp.abs(change) < 1, small, exact)
