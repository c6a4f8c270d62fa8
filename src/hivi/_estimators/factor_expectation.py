"""Exact expectation of every factor over the joint values of the coordinates that it touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message, require_count
from hivi._estimators.base import AbstractStrategy, Evaluation, Increment, Part
from hivi._estimators.differences import moved, no_table, weighted
from hivi._families.base import AbstractProposal, Conditional
from hivi._locality.covering import Covering, Group, covering, narrowest
from hivi._space import Site
from hivi._tree import PyTree

BATCH = 1 << 20
"""Numbers that are computed at once, roughly."""
LIMIT = 4096
"""Most evaluations that may be asked for."""


class FactorExpectation(AbstractStrategy):
    r"""Sum every factor over the joint values of the coordinates that it touches: no noise from any of them.

    `grad E[f] = sum_a sum_s grad q(s|lambda) f_a(s)`, where s runs over the joint values of the coordinates that the element
    f_a touches (of an Ising model two, whatever its size), the other sites as drawn. A local expectation sums over one
    coordinate and draws its neighbours. All elements share their evaluations: a few rows of values for the whole site,
    among which every element sees all of its own (a covering array); an open square lattice takes 4 (a periodic one of
    odd length 5), all pairs of 20 spins 11.
    Factors that touch too many coordinates at once get their local expectation.

    Where lambda is not random (mean-field), the draw of the site leaves no noise in the gradient of its lambda; given lambda,
    the gradient is the exact mean over z.

    Args:
        states: the most evaluations, 4 to 4096; factors that need more get their local expectation.

    Example:
        >>> import hivi, jax, jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> target = hivi.from_log_joint(
        ...     lambda z: jnp.sum(0.4 * (2 * z["z"][1:] - 1) * (2 * z["z"][:-1] - 1)),
        ...     latents={"z": hivi.Latent(shape=(9,), support=constraints.boolean)},
        ... )
        >>> fit = hivi.fit(
        ...     target, hivi.MeanField(), estimator=hivi.FactorExpectation(), key=jax.random.key(0), steps=300, progress=False
        ... )
        >>> fit.strategies
        {'z': 'FactorExpectation'}
    """

    states: int = 256
    detached: ClassVar[bool] = True

    def __check_init__(self) -> None:
        require_count("FactorExpectation(states=...)", self.states, "two coordinates of two values have 4", 4, FitError)
        if self.states > LIMIT:
            found, cure = (
                str(self.states),
                "write a wide factor as a sum of narrow ones, or use hivi.LocalExpectation()",
            )
            raise FitError(message("FactorExpectation(states=...)", found, f"at most {LIMIT}", cure))

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return no_table(site, conditional)

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        if not bound.linear(proposal.branches):
            return "sums over parts of the log-weight serve only a bound that is linear in it"
        if bound.plate is not None:
            return "its sums go over all rows at once, and the bound is taken row by row"
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        z, rule, lam = evaluation.z[site], conditional.likelihood, conditional.lam
        low, count = rule.support()
        groups = [_group(part, site) for part in evaluation.parts]
        found = covering(groups, site, z.shape, count, self.states)
        if found is None:
            raise FitError(_too_wide(groups, site, z.shape, count, self.states))
        values = jnp.asarray(found.rows.reshape(-1, *z.shape), z.dtype) + low
        each = jax.vmap(lambda v: rule.log_prob(lam, v))(values).reshape(len(values), -1)
        inside = jnp.asarray(found.scopes >= 0)
        joint = jnp.sum(jnp.where(inside, each[:, np.maximum(found.scopes, 0)], 0.0), -1)
        weights = jnp.exp(joint) / jnp.asarray(found.times, joint.dtype)
        size = max((f.size for part in evaluation.parts for f in part.terms), default=1)
        change = jax.lax.map(lambda v: _changes(evaluation, site, v, found), values, batch_size=max(1, BATCH // size))
        wide = _wide(evaluation.parts, site, found)
        if not any(wide):
            return (weights, change), None
        return (weights, change), moved(site, conditional, evaluation, wide)

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        covered, wide = measured
        return weighted(covered, increment) + (jnp.zeros(()) if wide is None else weighted(wide, increment))


def _group(part: Part, site: str) -> Group:
    """Factors, and the terms whose differences have a closed form."""
    return part.factored.factors, {term for term, owner, _ in part.factored.overrides if owner == site}


def _too_wide(groups: Sequence[Group], site: str, shape: tuple[int, ...], count: int, most: int) -> str:
    width = narrowest(groups, site, shape)
    found = f"FactorExpectation(states={most}), which can cover no factor of two or more of its coordinates"
    cure = "write it as a sum of narrow factors (a coupling by pairs), or use hivi.LocalExpectation() for this site"
    if width and most < count**width <= LIMIT:
        cure = (
            f"use FactorExpectation(states={count**width}) for those of {width} coordinates, or hivi.LocalExpectation()"
        )
    expected = "factors that touch few coordinates each, and not too many combinations of these"
    return message(f"site {site!r}", found, expected, cure)


def _changes(evaluation: Evaluation, site: str, value: Array, found: Covering) -> Float[Array, " scopes"]:
    """For every scope, the change of the elements that touch it and no more when the whole site moves."""
    after, out, number = evaluation.moved(site, value), jnp.zeros(len(found.scopes)), 0
    for new, old in zip(after.parts, evaluation.parts, strict=True):
        for factor, a, b in zip(new.factored.factors, new.terms, old.terms, strict=True):
            owner, number = found.owners[number], number + 1
            if owner is not None:
                step = jnp.broadcast_to(new.sign * factor.weight * (a - b), factor.shape)
                out = out.at[owner].add(step.reshape(-1))
    return out


def _wide(parts: Sequence[Part], site: str, found: Covering) -> list[tuple[int, ...]]:
    """Of each part, the numbers of the factors that touch the site and are not covered."""
    out, start = [], 0
    for part in parts:
        factors = part.factored.factors
        out.append(tuple(k for k, f in enumerate(factors) if f.maps(site) and found.owners[start + k] is None))
        start += len(factors)
    return out
