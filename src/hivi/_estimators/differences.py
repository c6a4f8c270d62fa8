"""Exact local expectations: finite supports by summing (Titsias & Lazaro-Gredilla 2015), counts by a difference identity."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._estimators.disarm import partner
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Site
from hivi._tree import PyTree


class LocalExpectation(AbstractStrategy):
    """Sum over every value of z_i with the other latents as drawn: no noise from z_i itself.

    `grad E[f] = sum_v grad q(v|lambda_i) E[f(z_i=v) - f(z)]`. The cost is (values - 1) x (colours of the site), not the
    number of coordinates: coordinates that share no factor move together. On variables above other draws (the bits of
    `Codes`, discrete earlier groups of `Structured`) it is (values - 1) x coordinates draws of all that depends on them.

    Args:
        coupled: average over the draw and its DisARM partner, which differs from it wherever it can: twice the cost, and the
            noise that the other latents leave is mostly cancelled.

    Example:
        >>> import hivi
        >>> hivi.LocalExpectation(coupled=True).coupled
        True
    """

    coupled: bool = False
    detached: ClassVar[bool] = True

    def __check_init__(self) -> None:
        if not isinstance(self.coupled, bool):
            raise FitError(
                message("LocalExpectation(coupled=...)", repr(self.coupled), "True or False", "pass one of them")
            )

    @property
    def whole(self) -> bool:
        return not self.coupled

    def redraws(self, site: Site) -> int:
        return (site.values.count - 1) * math.prod(site.batch_shape)

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return no_table(site, conditional)

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        if self.coupled and not bound.linear(proposal.branches):
            return "coupled draws serve only a bound that is linear in the log-weight"
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        if not self.coupled:
            return moved(site, conditional, evaluation)
        assert evaluation.key is not None
        return pair(site, conditional, evaluation, partner(conditional, evaluation.z[site], evaluation.key))

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        return weighted(measured, increment)


class Difference(AbstractStrategy):
    """Difference identity for counts: `d/dmu E f = E[f(z+1) - f(z)]` for Poisson, and its binomial relative.

    Holds for any function and any support, without truncation; one evaluation per colour of the site.

    Example:
        >>> import hivi
        >>> from numpyro.distributions import constraints
        >>> target = hivi.from_log_joint(
        ...     lambda z: -0.5 * (z["n"] - 3.0) ** 2, {"n": hivi.Latent((), constraints.nonnegative_integer)}
        ... )
        >>> print(hivi.Auto().explain(target, hivi.MeanField()))
        site  strategy    evaluations  reason
        n     Difference  1            count: difference identity, 1 colour
    """

    detached: ClassVar[bool] = True

    @property
    def whole(self) -> bool:
        return True

    def redraws(self, site: Site) -> int:
        return math.prod(site.batch_shape)

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        if conditional is None:
            return "its coordinates are not independent given the family's context"
        if conditional.likelihood.table or not site.discrete:
            return f"it is not a count ({site.values})"
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        return moved(site, conditional, evaluation)

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        return weighted(measured, increment)


def moved(
    site: str, conditional: Conditional, evaluation: Evaluation, numbers: Sequence[Collection[int]] | None = None
) -> tuple[Array, Array]:
    """Weights of the moves of every coordinate, and their changes; of some factors of each part, if named."""
    z = evaluation.z[site]
    values = conditional.likelihood.moves(z)
    return conditional.likelihood.move_weights(conditional.lam, z), evaluation.differences(site, values, numbers)


def pair(site: str, conditional: Conditional, evaluation: Evaluation, b: Array) -> PyTree:
    """The mean over the draw and another, as moves of both."""
    here = moved(site, conditional, evaluation)
    there = moved(site, conditional, evaluation.moved(site, b))
    (w1, c1), (w2, c2) = here, there
    return jnp.concatenate([0.5 * w1, 0.5 * w2]), jnp.concatenate([c1, c2])


def no_table(site: Site, conditional: Conditional | None) -> str | None:
    """Why not every value of a coordinate can be summed, or None if it can."""
    if conditional is None:
        return "its coordinates are not independent given the family's context"
    if not conditional.likelihood.table:
        return f"its q is no table, its support not finite or too long ({site.values})"
    return None


def weighted(measured: tuple[Array, Array], increment: Increment) -> Array:
    """Sum of weights, which carry the gradient, times changes of the log-weight."""
    weights, change = measured
    # A move whose weight is exactly zero cannot matter, even to an impossible value (0 times -inf).
    gain = increment(jax.lax.stop_gradient(change))
    safe = jnp.where((weights == 0) & ~jnp.isfinite(gain), 0.0, gain)
    return jnp.sum(weights * jax.lax.stop_gradient(safe))
