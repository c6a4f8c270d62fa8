"""A bound estimated for its own sake, without a gradient: as a whole, and row by row of a plate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound
from hivi._estimators.by_row import RowWeights, split
from hivi._estimators.surrogate import check_minibatch, total
from hivi._families.base import AbstractProposal
from hivi._target.base import Rows, Target
from hivi._tree import Key


class RowBounds(NamedTuple):
    """One estimate of a bound that is taken row by row.

    Attributes:
        rows: the share of each row, without the plate's scale.
        rest: what belongs to no row.
    """

    rows: Float[Array, " rows"]
    rest: Float[Array, ""]


def log_weights(proposal: AbstractProposal, target: Target, bound: AbstractBound, key: Key) -> Float[Array, ""]:
    """One estimate of the bound."""
    k_rows, k_draws = jax.random.split(key)
    rows = target.minibatch(k_rows)
    local = proposal.gather(rows)
    check_minibatch(target, bound, local.branches)
    if bound.plate is not None:
        shared, k_draws = jax.random.split(k_draws)
        found = row_bounds(proposal, target, bound, bound.plate, (shared, k_draws), rows)
        scale = next((p.scale for p in target.plates if p.name == bound.plate), 1.0)
        return found.rest + scale * jnp.sum(found.rows)

    def one(k: Key, branch: Array) -> Array:
        k_draw, k_inner = jax.random.split(k)
        z, context = local.propose(k_draw, branch)
        return target.log_joint(z, rows) - total(local, z, context, k_inner, bound.inner)

    keys = jax.random.split(k_draws, (bound.draws, local.branches))
    log_w = jax.vmap(jax.vmap(one), (0, None))(keys, jnp.arange(local.branches))
    return bound.value(log_w[None], local.log_weights())[0]


def row_bounds(
    proposal: AbstractProposal,
    target: Target,
    bound: AbstractBound,
    plate: str,
    keys: tuple[Key, Key],
    rows: Rows,
    caller: str = "",
) -> RowBounds:
    """The bound of each of these rows of a plate, by a key of what lies outside it and one of what lies inside."""
    local = proposal.gather(rows)
    parts = split(local, target, plate, caller)
    assert parts is not None
    shared, own = keys

    def one(k: Key, branch: Array) -> RowWeights:
        k_draw, k_inner = jax.random.split(k)
        z, context = parts.propose(shared, k_draw, branch)
        return parts.weights(target, target.terms(z, rows), parts.proposal.log_q(z, context, k_inner, bound.inner))

    draws = jax.random.split(own, (bound.draws, local.branches))
    log_w = jax.vmap(jax.vmap(one), (0, None))(draws, jnp.arange(local.branches))
    each = parts.each(bound)(log_w.rows[None], local.log_weights())[0]
    return RowBounds(each, log_w.rest[0, 0])
