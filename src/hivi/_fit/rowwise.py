"""The bound of a streamed target, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._compile import compiled
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractStrategy
from hivi._estimators.expectation import Expectation
from hivi._estimators.surrogate import terms_by_view, viewed_terms, views_of
from hivi._families.base import AbstractProposal
from hivi._fit.stream import at_blocks, conditioned
from hivi._locality.base import Factor
from hivi._target.base import Target
from hivi._tree import Key


@compiled
def row_bounds(
    target: Target,
    proposal: AbstractProposal,
    key: Key,
    strategies: tuple[tuple[str, AbstractStrategy], ...],
    bound: AbstractBound,
    samples: int,
) -> tuple[Array, Array]:
    """The bound, split: one number per row of a minibatch, and what belongs to no row; means over `samples` draws, in nats."""
    closed = tuple(n for n, s in strategies if isinstance(s, Expectation))
    proposal = conditioned(target, proposal)
    local = proposal.expecting(closed) if closed else proposal
    rows = {p.name: jnp.arange(p.batch) for p in target.plates}
    mine = {s.name for s in target.sites if s.local is not None}
    (plate,) = target.plates
    if not bound.linear(proposal.branches) or proposal.branches > 1:
        raise FitError(
            message(
                "the bound row by row",
                f"{bound}, with {proposal.branches} mixture component{'s' * (proposal.branches != 1)}",
                "a bound that is a sum over rows, and one component",
                "use Elbo(), or ImportanceWeighted(outer=1, inner=K)",
            )
        )

    def of_rows(factor: Factor) -> bool:
        return bool(mine & {name for name, _ in factor.scope}) or (
            factor.shape[:1] == (plate.batch,) and not factor.scope
        )

    # A term's constant that is the same for all rows is a factor of its own, and a number: each row has its share.
    shared = {f.name for f in target.factored.factors if of_rows(f)}

    def one(k: Key) -> tuple[Array, Array]:
        k1, k2 = jax.random.split(k)
        z, context = local.propose(k1)
        views = terms_by_view(target, z, views_of(target, local, context, linear=True))
        each, whole = jnp.zeros(plate.batch), jnp.zeros(())
        for factor, term in zip(target.factored.factors, viewed_terms(target, views, rows), strict=True):
            if factor.shape == () and not factor.scope and factor.name in shared:
                each = each + factor.weight / plate.scale * term / plate.batch
            elif of_rows(factor):
                each = each + factor.weight / plate.scale * jnp.sum(term.reshape(plate.batch, -1), 1)
            else:
                whole = whole + factor.weight * jnp.sum(term)
        scales = local.scales()
        for name, term in local.log_q(z, context, k2, bound.inner).items():
            if name in scales:
                each = each - jnp.sum(term.reshape(plate.batch, -1), 1)
            else:
                whole = whole - jnp.sum(term)
        return each, whole

    each, whole = jax.lax.map(one, jax.random.split(key, samples))
    return jnp.mean(each, 0), jnp.mean(whole)


def streamed_bounds(
    target: Target,
    proposal: AbstractProposal,
    closed: Sequence[str],
    key: Key,
    samples: int,
    bound: AbstractBound,
) -> np.ndarray:
    """Estimates of the bound over all rows, (samples,); `proposal` has all rows' parameters."""
    (plate,) = target.plates
    chosen = tuple((n, Expectation()) for n in closed)
    totals = np.zeros(samples)
    for number, (ids, here) in enumerate(at_blocks(target)):
        local = proposal.gather({plate.name: jnp.maximum(jnp.asarray(ids), 0)})
        real = ids >= 0
        for s in range(samples):
            k = jax.random.fold_in(jax.random.fold_in(key, number), s)
            each, rest = row_bounds(here, local, k, chosen, bound, 1)
            totals[s] += float(np.asarray(each)[real].sum()) + (float(rest) if number == 0 else 0.0)
    return totals
