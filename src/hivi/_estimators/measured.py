"""Variance times cost of the strategies that could serve a site, measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._errors import FitError
from hivi._estimators.base import AbstractStrategy, abstract_conditionals
from hivi._estimators.control_variates import DoubleControlVariates
from hivi._estimators.cost import operations
from hivi._estimators.differences import Difference, LocalExpectation
from hivi._estimators.disarm import DisARM
from hivi._estimators.score import Score
from hivi._estimators.surrogate import surrogate
from hivi._families.base import AbstractProposal
from hivi._target.base import Target
from hivi._tree import Key, compiled

CANDIDATES: tuple[AbstractStrategy, ...] = (
    LocalExpectation(),
    LocalExpectation(coupled=True),
    Difference(),
    DisARM(),
    DoubleControlVariates(),
    Score(),
)
"""Those that need no past; baselines that remember are only as good as what they have seen."""
PROBES = 64


class Measured(NamedTuple):
    """One strategy at one site.

    Attributes:
        site: the site.
        strategy: the strategy.
        variance: of the gradient, summed over all parameters.
        operations: elementary operations of one gradient.
    """

    site: str
    strategy: AbstractStrategy
    variance: float
    operations: float

    @property
    def product(self) -> float:
        """Variance times cost: the variance that a unit of work leaves."""
        return self.variance * self.operations


def measure(
    site: str,
    exact: bool,
    others: Mapping[str, AbstractStrategy],
    target: Target,
    proposal: AbstractProposal,
    bound: AbstractBound,
    samples: int,
    key: Key,
) -> list[Measured]:
    """Every candidate that can serve a site, best first, with the other sites' strategies as given.

    Args:
        site: a discrete site with factorised conditionals.
        exact: whether exact differences are within the budget; otherwise they are not tried.
        others: site -> strategy.
        target: log p.
        proposal: where to measure.
        bound: which bound.
        samples: estimates of the bound per gradient.
        key: randomness.
    """
    conditional = abstract_conditionals(proposal.gather(target.all_rows())).get(site)
    found = []
    for strategy in CANDIDATES:
        if isinstance(strategy, LocalExpectation | Difference) and not exact:
            continue
        own = target.site(site)
        linear = bound.linear(proposal.branches)
        if strategy.refusal(own, conditional) or strategy.unsuited(own, proposal, linear):
            continue
        chosen = tuple({**others, site: strategy}.items())
        try:
            cost = operations(lambda p, k, c=chosen: _gradient(p, target, c, bound, k, samples), proposal, key)
        except FitError:  # a model that it cannot evaluate
            continue
        variance = float(_variance(proposal, target, chosen, bound, key, samples))
        if jnp.isfinite(variance):
            found.append(Measured(site, strategy, variance, cost))
    return sorted(found, key=lambda m: m.product)


def _gradient(
    proposal: AbstractProposal,
    target: Target,
    chosen: tuple[tuple[str, AbstractStrategy], ...],
    bound: AbstractBound,
    key: Key,
    samples: int,
) -> Array:
    params, static = eqx.partition(proposal, eqx.is_inexact_array)

    def value(p: AbstractProposal) -> Array:
        return surrogate(eqx.combine(p, static), target, dict(chosen), bound, key, samples)[0]

    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(jax.grad(value)(params))])


@compiled
def _variance(
    proposal: AbstractProposal,
    target: Target,
    chosen: tuple[tuple[str, AbstractStrategy], ...],
    bound: AbstractBound,
    key: Key,
    samples: int,
) -> Array:
    """Trace of the covariance of the gradient; one pass, shifted by the first gradient against cancellation."""
    keys = jax.random.split(key, PROBES)
    first = _gradient(proposal, target, chosen, bound, keys[0], samples)

    def add(sums: tuple[Array, Array], k: Key) -> tuple[tuple[Array, Array], None]:
        error = _gradient(proposal, target, chosen, bound, k, samples) - first
        return (sums[0] + error, sums[1] + error**2), None

    (total, square), _ = jax.lax.scan(add, (jnp.zeros_like(first), jnp.zeros_like(first)), keys[1:])
    count = PROBES - 1
    return jnp.sum(square / count - (total / count) ** 2)
