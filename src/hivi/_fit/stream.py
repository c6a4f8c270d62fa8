"""Streamed fits: minibatches come from the host with their rows' own parameters; nothing else grows with the data.

Stochastic variational inference (Hoffman et al. 2013) with the engine's gradients: natural gradients for the rows (through
Adam), conjugate steps for parameters whose family has them, Adam for the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound
from hivi._compile import compiled
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractStrategy
from hivi._estimators.surrogate import estimate
from hivi._families.base import AbstractProposal
from hivi._fit.rows import Layout
from hivi._target.base import Target
from hivi._tree import Key, PyTree, finite, select

ROW_RATE = 0.3
FREE_RATE = 0.01
AFTER_WARM_UP = 100.0
"""Delay of the conjugate steps after a warm-up: they start small, from what it found."""
SLOW = 0.1
"""Learning rate of rows' parameters without natural gradients, as a share of the others'."""
BETA2 = 0.99
"""Of Adam: how much of the second moments a step keeps."""
OUTLIER = 3.0
"""How much longer than usual a gradient of shared parameters may be, before Adam."""
CLIP = 20.0
"""Largest natural-gradient step of a row's parameter, before Adam: units of its log rate or logit."""
FINAL = 0.1
"""Share of the rows' learning rate that is left at the end."""
BLOCK_BYTES = 32 * 2**20
"""Data loaded at once."""


class Schedule(NamedTuple):
    """Step sizes of a streamed fit.

    Attributes:
        rows: learning rate of the rows' parameters (Adam on natural gradients).
        free: learning rate of shared parameters without conjugate steps (Adam).
        delay: tau of the conjugate step size (tau + t)^-power.
        power: its exponent, in (0.5, 1].
        shared: whether shared parameters move at all; not for new documents.
    """

    rows: float = ROW_RATE
    free: float = FREE_RATE
    delay: float = 1.0
    power: float = 0.6
    shared: bool = True


class StreamPlan(NamedTuple):
    """What stays fixed (static)."""

    strategies: tuple[tuple[str, AbstractStrategy], ...]
    bound: AbstractBound
    samples: int
    moves_shared: bool


class StreamState(eqx.Module):
    """All that changes, but the rows' records: shared parameters, their moments, the key."""

    shared: PyTree
    moments: PyTree
    key: Key
    skipped: Array


class Rates(NamedTuple):
    """Step sizes of one step."""

    rows: Float[Array, ""]
    free: Float[Array, ""]
    conjugate: Float[Array, ""]


@functools.lru_cache(maxsize=1)
def _adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip(CLIP), optax.scale_by_adam(b1=0.9, b2=BETA2))


@functools.lru_cache(maxsize=1)
def _free_adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.9, b2=BETA2)


def split_rows(proposal: AbstractProposal) -> tuple[PyTree, PyTree]:
    """The rows' own arrays, and everything else."""
    return eqx.partition(proposal, jax.tree.map(lambda own, x: own and eqx.is_array(x), proposal.owned(), proposal))


def with_rows(target: Target, batch: PyTree) -> Target:
    """A streamed target at one minibatch."""
    return dataclasses.replace(target, data={**target.data, "rows": batch}, source=None, starts={})


def at_blocks(target: Target) -> Iterator[tuple[np.ndarray, Target]]:
    """Row numbers of every block of the source (-1 pads the last), and the target there."""
    if target.source is None:
        raise FitError(message("streamed fit", "a target without a source", "a streamed target", "use hivi.fit"))
    for ids in target.source.blocks():
        yield ids, with_rows(target, jax.tree.map(lambda a: jnp.asarray(a[0]), target.source.load([ids])))


def free_moments(proposal: AbstractProposal) -> PyTree:
    """Adam's moments of the shared parameters without conjugate steps."""
    return _free_adam().init(conjugate(proposal, split_rows(proposal)[1])[1])


def conditioned(target: Target, proposal: AbstractProposal) -> AbstractProposal:
    """The proposal of this minibatch: an inference network, if there is one, has read its rows."""
    if not proposal.amortised:
        return proposal
    return proposal.given(None if target.features is None else target.features(proposal.centre(), target.data))


def row_moments(own: PyTree) -> PyTree:
    """Adam's moments, with a step count per row."""
    arrays = eqx.filter(own, eqx.is_inexact_array)
    return jax.vmap(_adam().init)(arrays) if jax.tree.leaves(arrays) else None


def visit(
    state: StreamState, records: Array, batch: PyTree, rates: Rates, target: Target, plan: StreamPlan, layout: Layout
) -> tuple[StreamState, Array, Array]:
    """One step on one minibatch: new state, the rows' new records, and the bound's estimate."""
    key, now = jax.random.split(state.key)
    here = with_rows(target, batch)
    own, own_moments = layout.unpack(records)
    rows = {p.name: jnp.arange(p.batch) for p in target.plates}

    def objective(free: tuple[PyTree, PyTree]) -> tuple[Array, None]:
        proposal = conditioned(here, eqx.combine(*free))
        return estimate(proposal, here, dict(plan.strategies), plan.bound, now, plan.samples, rows)[0], None

    (value, _), gradient = eqx.filter_value_and_grad(objective, has_aux=True)((own, state.shared))
    proposal = eqx.combine(own, state.shared)
    natural = proposal.natural(eqx.combine(*gradient))
    ok = jnp.isfinite(value) & finite(natural)
    natural_own, natural_shared = split_gradient(proposal, natural)
    if layout.shapes:
        updates, moments = jax.vmap(_adam().update)(natural_own, own_moments)
        pace = row_pace(proposal)
        moved = jax.tree.map(lambda p, u, m: p + rates.rows * m * u, own, updates, pace)
        records = jnp.where(ok, layout.pack((moved, moments)), records)
    shared, shared_moments = state.shared, state.moments
    if plan.moves_shared:
        new_shared, new_moments = _move_shared(state, proposal, natural_shared, rates)
        shared, shared_moments = select(ok, new_shared, shared), select(ok, new_moments, shared_moments)
    skipped = state.skipped + jnp.where(ok, 0, 1)
    return StreamState(shared, shared_moments, key, skipped), records, value


def row_pace(proposal: AbstractProposal) -> PyTree:
    """Multiplier of the rows' learning rate, per array of theirs."""
    own, _ = split_rows(proposal)
    roles = zip(
        jax.tree.leaves(proposal.roles()), jax.tree.leaves(proposal.owned()), jax.tree.leaves(proposal), strict=True
    )
    paces = [1.0 if role == "natural" else SLOW for role, mine, x in roles if mine and eqx.is_array(x)]
    return jax.tree.unflatten(jax.tree.structure(own), paces)


def split_gradient(proposal: AbstractProposal, gradient: PyTree) -> tuple[PyTree, PyTree]:
    """A gradient's rows and the rest, laid out like `split_rows`."""
    mask = jax.tree.map(lambda own, x: own and eqx.is_array(x), proposal.owned(), proposal)
    mask = jax.tree.unflatten(jax.tree.structure(gradient), _leaves_like(gradient, mask, proposal))
    return eqx.partition(gradient, mask)


def _leaves_like(gradient: PyTree, mask: PyTree, proposal: PyTree) -> list[bool]:
    """The mask at the gradient's leaves: those of the proposal that are floating-point arrays."""
    pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(proposal), strict=True)
    return [m for m, x in pairs if eqx.is_inexact_array(x)]


def conjugate(proposal: AbstractProposal, tree: PyTree) -> tuple[PyTree, PyTree]:
    """A tree of the shared parameters: the part that takes conjugate steps, and the rest."""
    arrays = zip(*map(jax.tree.leaves, (proposal.roles(), proposal.owned(), proposal)), strict=True)
    kinds = [role == "conjugate" for role, own, x in arrays if eqx.is_inexact_array(x) and not own]
    params = eqx.filter(tree, eqx.is_inexact_array)
    return eqx.partition(params, jax.tree.unflatten(jax.tree.structure(params), kinds))


def _tempered(gradient: PyTree, moments: Any) -> PyTree:
    """The gradient, no longer than `OUTLIER` times what is usual.

    One strange minibatch would make Adam's second moments so large that the parameters hardly move for hundreds of steps,
    while all else runs away from where they were left.
    """
    squares = sum((jnp.sum(x) for x in jax.tree.leaves(moments.nu)), jnp.zeros(()))
    usual = jnp.sqrt(squares / jnp.maximum(1 - BETA2**moments.count, 1e-6))
    longest = jnp.where(moments.count > 0, OUTLIER * usual, jnp.inf)
    length = jnp.sqrt(sum((jnp.sum(x * x) for x in jax.tree.leaves(gradient)), jnp.zeros(())))
    share = jnp.where(length > longest, longest / length, 1.0)
    return jax.tree.map(lambda g: share * g, gradient)


def _move_shared(
    state: StreamState, proposal: AbstractProposal, gradient: PyTree, rates: Rates
) -> tuple[PyTree, PyTree]:
    static = eqx.filter(state.shared, eqx.is_inexact_array, inverse=True)
    steady, free = conjugate(proposal, state.shared)
    steady_gradient, free_gradient = conjugate(proposal, gradient)
    steady = jax.tree.map(lambda p, g: p + rates.conjugate * g, steady, steady_gradient)
    direction, moments = _free_adam().update(_tempered(free_gradient, state.moments), state.moments)
    free = jax.tree.map(lambda p, d: p + rates.free * d, free, direction)
    return eqx.combine(steady, free, static), moments


@compiled(effort="full")
def run_block(
    state: StreamState,
    records: Array,
    batches: PyTree,
    rates: Rates,
    count: Array,
    target: Target,
    plan: StreamPlan,
    layout: Layout,
) -> tuple[StreamState, Array, Array]:
    """The first `count` of several steps, compiled; records, batches and rates have a leading axis over steps."""
    arrays, static = eqx.partition(state, eqx.is_array)

    def body(k: Array, carry: PyTree) -> PyTree:
        current, all_records, values = carry
        batch, rate = jax.tree.map(lambda x: x[k], (batches, rates))
        new, record, value = visit(eqx.combine(current, static), all_records[k], batch, rate, target, plan, layout)
        return eqx.filter(new, eqx.is_array), all_records.at[k].set(record), values.at[k].set(value)

    blank = jnp.full(records.shape[0], jnp.nan)
    arrays, records, values = jax.lax.fori_loop(0, count, body, (arrays, records, blank))
    return eqx.combine(arrays, static), records, values
