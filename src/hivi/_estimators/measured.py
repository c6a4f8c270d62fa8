"""Variance times cost of the strategies that could serve a site, measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound
from hivi._compile import compiled
from hivi._errors import FitError
from hivi._estimators.base import AbstractStrategy, abstract_conditionals
from hivi._estimators.control_variates import DoubleControlVariates
from hivi._estimators.cost import operations
from hivi._estimators.differences import Difference, LocalExpectation
from hivi._estimators.disarm import DisARM
from hivi._estimators.enumeration import Enumeration
from hivi._estimators.factor_expectation import FactorExpectation
from hivi._estimators.score import Score
from hivi._estimators.surrogate import surrogate
from hivi._families.base import AbstractProposal
from hivi._target.base import Target
from hivi._tree import Key, PyTree

CANDIDATES: tuple[AbstractStrategy, ...] = (
    LocalExpectation(),
    LocalExpectation(coupled=True),
    FactorExpectation(),
    Difference(),
    DisARM(),
    DoubleControlVariates(),
    Enumeration(),
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


class Setting(NamedTuple):
    """Where gradients are measured.

    Attributes:
        target: log p.
        proposal: theta and phi.
        bound: which bound.
        samples: estimates of the bound per gradient.
    """

    target: Target
    proposal: AbstractProposal
    bound: AbstractBound
    samples: int


def settle(
    chosen: Mapping[str, AbstractStrategy], sites: tuple[str, ...], setting: Setting, key: Key
) -> dict[str, AbstractStrategy]:
    """Site -> strategy: the best that was measured for these sites, the others as chosen."""
    found = measure_each(chosen, sites, setting, key)
    return {**chosen, **{m[0].site: m[0].strategy for m in found if m}}


def measure_each(
    chosen: Mapping[str, AbstractStrategy], sites: tuple[str, ...], setting: Setting, key: Key
) -> list[list[Measured]]:
    """Every candidate for each of these sites, best first, with the best that was found for the sites before it.

    Exact strategies are tried where the one chosen is exact; a site that has the score function instead is too dear for them.
    """
    now, out = dict(chosen), []
    for number, site in enumerate(sites):
        exact = not isinstance(chosen[site], Score)
        found = measure(site, exact, now, setting, jax.random.fold_in(key, number))
        if found:
            now[site] = found[0].strategy
        out.append(found)
    return out


def measure(
    site: str, exact: bool, others: Mapping[str, AbstractStrategy], setting: Setting, key: Key
) -> list[Measured]:
    """Every candidate that can serve a site, best first, with the other sites' strategies as given.

    Args:
        site: a discrete site with factorised conditionals.
        exact: whether exact differences are tried.
        others: site -> strategy.
        setting: where to measure.
        key: randomness.
    """
    target, proposal = setting.target, setting.proposal
    conditional = abstract_conditionals(proposal.gather(target.all_rows())).get(site)
    own, found = target.site(site), []
    for strategy in CANDIDATES:
        if isinstance(strategy, LocalExpectation | FactorExpectation | Difference | Enumeration) and not exact:
            continue
        if strategy.refusal(own, conditional) or strategy.unsuited(own, proposal, setting.bound):
            continue
        chosen = {**others, site: strategy}
        try:
            cost = operations(lambda s, k, c=chosen: gradient(s, c, k), setting, key)
        except FitError:  # a model that it cannot evaluate
            continue
        variance = float(jnp.sum(moments(setting, chosen, key, PROBES)[1]))
        if math.isfinite(variance):
            found.append(Measured(site, strategy, variance, cost))
    return sorted(found, key=lambda m: m.product)


def gradient(
    setting: Setting, chosen: Mapping[str, AbstractStrategy], key: Key, memory: Mapping[str, PyTree] | None = None
) -> Float[Array, " parameters"]:
    """One estimate of the bound's gradient, flat."""
    target, proposal, bound, samples = setting
    params, static = eqx.partition(proposal, eqx.is_inexact_array)

    def value(p: AbstractProposal) -> Array:
        return surrogate(eqx.combine(p, static), target, chosen, bound, key, samples, memory=memory)[0]

    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(jax.grad(value)(params))])


@compiled(effort="quick")
def moments(
    setting: Setting,
    chosen: Mapping[str, AbstractStrategy],
    key: Key,
    count: int,
    memory: Mapping[str, PyTree] | None = None,
) -> Float[Array, "2 parameters"]:
    """Mean and variance of `count` gradients; one pass, shifted by the first gradient against cancellation."""
    keys = jax.random.split(key, count)
    first = gradient(setting, chosen, keys[0], memory)

    def add(sums: tuple[Array, Array], k: Key) -> tuple[tuple[Array, Array], None]:
        error = gradient(setting, chosen, k, memory) - first
        return (sums[0] + error, sums[1] + error**2), None

    (total, square), _ = jax.lax.scan(add, (jnp.zeros_like(first), jnp.zeros_like(first)), keys[1:])
    mean = total / (count - 1)
    return jnp.stack([first + mean, square / (count - 1) - mean**2])
