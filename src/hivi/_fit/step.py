"""One step of Algorithm 1 as a pure function of one state, and compiled chunks of steps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hivi._bounds import AbstractBound
from hivi._compile import compiled
from hivi._estimators.base import AbstractStrategy
from hivi._estimators.surrogate import Estimated, memories, surrogate
from hivi._families.base import AbstractProposal
from hivi._fit.parallel import shard_samples
from hivi._target.base import Target
from hivi._tree import Key, PyTree, finite, select

CHUNK = 100
"""Steps between two looks of the host: one compiled scan."""
WARM_UP = 100
FINAL_RATE = 0.03
"""Share of the learning rate that is left at the end of the decay."""
AVERAGING = 3
"""Weight of late iterates in the average: with n steps, the last n/4 or so count most."""


class State(eqx.Module):
    """All that changes during a fit.

    Attributes:
        proposal: theta and phi.
        average: their running average since the decay began (before that, the last values): the fit's result.
        moments: the optimiser's state.
        key: randomness of the steps to come.
        step: number of steps done.
        rate: multiplier of the learning rate, halved by every recovery.
        decay_from: step at which the learning rate starts to decay.
        decay_steps: length of the decay.
        skipped: steps without an update, because bound or gradient was not finite.
        memory: site -> what its strategy has learnt (baselines, the weight of a control variate).
    """

    proposal: AbstractProposal
    average: AbstractProposal
    moments: PyTree
    key: Key
    step: Int[Array, ""]
    rate: Float[Array, ""]
    decay_from: Int[Array, ""]
    decay_steps: Int[Array, ""]
    skipped: Int[Array, ""]
    memory: dict[str, PyTree]


class Plan(NamedTuple):
    """What stays fixed during a fit (static)."""

    strategies: tuple[tuple[str, AbstractStrategy], ...]
    bound: AbstractBound
    samples: int
    optimizer: optax.GradientTransformation
    scheduled: bool
    mesh: Mesh | None

    def using(self, strategies: Mapping[str, AbstractStrategy]) -> Plan:
        """The plan with these strategies in place of those that it has for the same sites."""
        return self._replace(strategies=tuple({**dict(self.strategies), **strategies}.items()))


class Info(NamedTuple):
    """One step's estimate of the bound: mean and standard error over its samples, in nats."""

    elbo: Float[Array, ""]
    stderr: Float[Array, ""]


@functools.lru_cache(maxsize=64)
def default_optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adam; its warm-up and decay are the loop's, because the decay starts where the bound levels off.

    Cached, so that two fits share one optimiser and hence one compilation.
    """
    return optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), optax.scale(learning_rate))


def initial_state(proposal: AbstractProposal, target: Target, plan: Plan, key: Key, steps: int) -> State:
    """State before the first step; without early stopping the last 40 % of the steps decay."""
    moments = plan.optimizer.init(eqx.filter(proposal, eqx.is_inexact_array))
    decay = max(1, int(0.4 * steps))
    zero = jnp.array(0, jnp.int32)
    memory = memories(proposal.gather(target.all_rows()), dict(plan.strategies))
    decays = zero + (steps - decay), zero + decay
    return State(proposal, proposal, moments, key, zero, jnp.ones(()), *decays, zero, memory)


def schedule(state: State) -> Array:
    """Linear warm-up, then constant, then a cosine decay."""
    warm = jnp.minimum(1.0, (state.step + 1) / WARM_UP)
    progress = jnp.clip((state.step - state.decay_from) / jnp.maximum(state.decay_steps, 1), 0.0, 1.0)
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return warm * cosine * state.rate


def averaged(state: State, proposal: AbstractProposal) -> AbstractProposal:
    """Polynomial-decay average of the iterates since the decay began (Shamir & Zhang 2013)."""
    count = jnp.maximum(state.step - state.decay_from, 0).astype(jnp.result_type(float))
    share = jnp.where(count > 0, (AVERAGING + 1) / (count + AVERAGING + 1), 1.0)

    def mix(old: PyTree, new: PyTree) -> PyTree:
        return old + share.astype(new.dtype) * (new - old) if eqx.is_inexact_array(new) else new

    return jax.tree.map(mix, state.average, proposal)


def step(state: State, target: Target, plan: Plan) -> tuple[State, Info]:
    """One gradient step up the bound; a step whose bound or gradient is not finite changes nothing but the key."""
    key, now = jax.random.split(state.key)
    shard = functools.partial(shard_samples, mesh=plan.mesh)

    def objective(proposal: AbstractProposal) -> tuple[Array, Estimated]:
        return surrogate(proposal, target, dict(plan.strategies), plan.bound, now, plan.samples, shard, state.memory)

    (value, estimated), gradient = eqx.filter_value_and_grad(objective, has_aux=True)(state.proposal)
    ok = jnp.isfinite(value) & finite(gradient)
    params, static = eqx.partition(state.proposal, eqx.is_inexact_array)
    # Optax goes down, the bound goes up: a user's optimiser sees the negative gradient, ours adds.
    factor = schedule(state) if plan.scheduled else state.rate
    if plan.scheduled:
        updates, moments = plan.optimizer.update(gradient, state.moments, params)
    else:
        down = jax.tree.map(jnp.negative, gradient)
        extended = optax.with_extra_args_support(plan.optimizer)
        updates, moments = extended.update(down, state.moments, params, value=-value)
    updates = jax.tree.map(lambda u: factor.astype(u.dtype) * u, updates)
    moved = eqx.combine(optax.apply_updates(params, updates), static)
    kept = select(ok, moved, state.proposal)
    new = State(
        proposal=kept,
        average=averaged(state, kept),
        moments=select(ok, moments, state.moments),
        key=key,
        step=state.step + 1,
        rate=state.rate,
        decay_from=state.decay_from,
        decay_steps=state.decay_steps,
        skipped=state.skipped + jnp.where(ok, 0, 1),
        memory=select(ok, {n: estimated.memory[n] for n in state.memory}, state.memory),
    )
    count = estimated.bound.shape[0]
    spread = jnp.std(estimated.bound, ddof=1) / jnp.sqrt(count) if count > 1 else jnp.array(jnp.nan)
    return new, Info(value, spread)


@compiled
def run_chunk(state: State, target: Target, plan: Plan, last: Int[Array, ""]) -> tuple[State, Info]:
    """Up to `CHUNK` steps in one compiled loop; steps at or beyond `last` are not taken, and their info is NaN."""
    arrays, static = eqx.partition(state, eqx.is_array)
    blank = jnp.full(CHUNK, jnp.nan, jnp.result_type(float))

    def body(number: Array, carry: PyTree) -> PyTree:
        current, infos = carry
        new, info = step(eqx.combine(current, static), target, plan)
        infos = jax.tree.map(lambda all_, one: all_.at[number].set(one.astype(all_.dtype)), infos, info)
        return eqx.filter(new, eqx.is_array), infos

    count = jnp.minimum(CHUNK, last - state.step)
    arrays, info = jax.lax.fori_loop(0, count, body, (arrays, Info(blank, blank)))
    return eqx.combine(arrays, static), info
