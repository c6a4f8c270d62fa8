"""Eq. 8, 11 and 12 through one surrogate: its value is the bound, its gradient the estimate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractStrategy, Evaluation, Part
from hivi._estimators.by_row import Split, split
from hivi._estimators.expectation import Expectation
from hivi._estimators.hierarchical_score import HierarchicalScore
from hivi._factored import factorise
from hivi._families.base import AbstractProposal
from hivi._likelihoods.normal import NormalLikelihood
from hivi._space import Latents
from hivi._target.base import Rows, Target
from hivi._tree import Key, PyTree, held, sum_all, value_zero

Strategies = Mapping[str, AbstractStrategy]
HIDDEN = HierarchicalScore()
"""Serves the discrete variables of the family itself."""


class Estimated(NamedTuple):
    """What a step found.

    Attributes:
        bound: estimates of the bound, one per sample, in nats.
        memory: site -> what its strategy has learnt, for the next step.
    """

    bound: Float[Array, " samples"]
    memory: dict[str, PyTree]


def surrogate(
    proposal: AbstractProposal,
    target: Target,
    strategies: Strategies,
    bound: AbstractBound,
    key: Key,
    samples: int,
    shard: Callable[[Array], Array] = lambda x: x,
    memory: Mapping[str, PyTree] | None = None,
) -> tuple[Float[Array, ""], Estimated]:
    """Mean bound over samples; differentiate it with respect to the proposal for the gradient estimate.

    Args:
        proposal: theta and phi.
        target: log p.
        strategies: one per site.
        bound: which bound.
        key: randomness of the minibatch and of the draws.
        samples: number of independent estimates of the bound.
        shard: places an array with a leading samples axis on devices.
        memory: site -> what its strategy has learnt in earlier steps; None before the first.
    """
    k_rows, k_draws = jax.random.split(key)
    rows = target.minibatch(k_rows)
    return estimate(proposal.gather(rows), target, strategies, bound, k_draws, samples, rows, shard, memory)


def estimate(
    local: AbstractProposal,
    target: Target,
    strategies: Strategies,
    bound: AbstractBound,
    key: Key,
    samples: int,
    rows: Rows,
    shard: Callable[[Array], Array] = lambda x: x,
    memory: Mapping[str, PyTree] | None = None,
) -> tuple[Float[Array, ""], Estimated]:
    """`surrogate` for the proposal of one minibatch."""
    closed = {n: s for n, s in strategies.items() if isinstance(s, Expectation)}
    if closed:
        local = local.expecting(tuple(closed), plug_in=any(s.plug_in for s in closed.values()))
    branches, log_pi = local.branches, local.log_weights()
    parts = split(local, target, bound.plate)
    check_minibatch(target, bound, branches)
    common = None
    if parts is not None:
        local = parts.proposal
        k_common, key = jax.random.split(key)  # fold_in(key, 1) would be the key of a draw: split(key, n)[1]
        common = shard(jax.random.split(k_common, samples))
    known = memories(local, strategies) if memory is None else memory
    keys = shard(jax.random.split(key, (samples, bound.draws, branches)))

    def one(shared: Key | None, k: Key, branch: Array) -> tuple[PyTree, PyTree, Array]:
        return _draw(local, target, strategies, bound, (shared, k), branch, rows, known, parts)

    if keys.size == 1:  # under vmap, a conditional runs both its branches
        single = one(None if common is None else common[0], keys.reshape(()), jnp.array(0))
        log_w, measured, cancel = jax.tree.map(lambda x: x[None, None, None], single)
    else:
        over_branches = jax.vmap(one, in_axes=(None, 0, 0))
        over_all = jax.vmap(jax.vmap(over_branches, (None, 0, None)), (0, 0, None))
        log_w, measured, cancel = over_all(common, keys, jnp.arange(branches))
    values = (bound.value if parts is None else parts.of(bound))(log_w, log_pi)
    fixed_w, fixed_pi = jax.lax.stop_gradient((log_w, log_pi))

    def increment(site: str) -> Callable[[Array], Array]:
        # Moves are the first axis after (samples, outer, branches) where there are any; all are changes of one draw.
        if parts is None:
            return lambda change: bound.increment(fixed_w, fixed_pi, change)
        return parts.increment(bound, fixed_w, fixed_pi, target, site)

    chosen = {n: strategies.get(n, HIDDEN) for n in measured}
    extra = sum((chosen[n].surrogate(m, increment(n)) for n, m in measured.items()), jnp.zeros(()))
    # E[grad log q(z|lambda)] = 0 with a constant weight: this cancels the pathwise score of detached draws.
    weight = jnp.exp(fixed_pi) * local.score_weight(bound.inner) / bound.draws
    extra = extra + jnp.sum(weight * cancel)
    fixed = jax.lax.stop_gradient(measured)
    learnt = {n: chosen[n].learn(known.get(n, ()), m) for n, m in fixed.items()}
    return jnp.mean(values) + value_zero(extra) / samples, Estimated(jax.lax.stop_gradient(values), learnt)


def memories(proposal: AbstractProposal, strategies: Strategies) -> dict[str, PyTree]:
    """Site -> what its strategy remembers before the first step."""
    chosen = {n: s for n, s in strategies.items() if s.remembers}
    if not chosen:
        return {}
    _, context = proposal.propose(jax.random.key(0))
    found = proposal.conditionals(context)
    keys = dict(zip(chosen, jax.random.split(jax.random.key(0), len(chosen)), strict=True))
    return {n: s.start(jax.lax.stop_gradient(found[n]), keys[n]) for n, s in chosen.items()}


def _draw(
    proposal: AbstractProposal,
    target: Target,
    strategies: Strategies,
    bound: AbstractBound,
    keys: tuple[Key | None, Key],
    branch: Array,
    rows: Rows,
    memory: Mapping[str, PyTree],
    parts: Split | None,
) -> tuple[PyTree, PyTree, Array]:
    """Log-weight of one draw, what its strategies measured, and the log q(z|lambda) of detached sites."""
    shared, own_key = keys
    k_draw, k_inner, k_more = jax.random.split(own_key, 3)
    inner = bound.inner
    z, context = proposal.propose(k_draw, branch) if parts is None else parts.propose(shared, k_draw, branch)
    hidden = proposal.hidden(context)
    z, strategies = {**z, **hidden}, {**dict.fromkeys(hidden, HIDDEN), **strategies}
    detached = {n: jax.lax.stop_gradient(z[n]) for n, s in strategies.items() if s.detached}
    z = {**z, **detached}
    linear = bound.linear(proposal.branches)
    views = terms_by_view(target, z, views_of(target, proposal, context, linear))
    p_terms = viewed_terms(target, views, rows)
    scales = proposal.scales()
    landing = frozenset(n for n, s in strategies.items() if s.landing)
    landed = proposal.landed(z, context, landing) if landing else {}

    def log_q(free: Mapping[str, Array]) -> dict[str, Array]:
        return {**proposal.log_q({**z, **free}, context, k_inner, inner), **landed}

    def weight(total: Callable[[], Array]) -> PyTree:
        return target.factored.total(p_terms) - total() if parts is None else parts.weights(target, p_terms, log_q({}))

    if not detached:
        return weight(lambda: _sum(log_q({}), scales)), {}, jnp.zeros(())
    factored = factorise(log_q, detached, scales=scales)
    q_terms = factored.terms(detached)
    if parts is not None:
        parts.check(factored.factors, list(detached))
    stop = jax.lax.stop_gradient
    of_p = Part(1.0, target.factored, stop(p_terms), tuple((n, stop(v)) for n, v in views), (target.data, rows))
    of_q = Part(-1.0, held(factored), stop(q_terms), ((None, stop(z)),))
    by_row = None if parts is None else parts.axes()
    evaluation = Evaluation(stop(z), (of_p, of_q), local=linear, rows=by_row)
    conditionals = proposal.conditionals(context)
    measured = {}
    for number, n in enumerate(sorted(detached)):
        own = evaluation._replace(key=jax.random.fold_in(k_more, number), memory=memory.get(n, ()))
        if n in hidden or n in proposal.upstream:
            own = own._replace(above=_above(held(proposal), target, n, (k_draw, k_inner), branch, bound, rows))
        measured[n] = strategies[n].measure(n, conditionals[n], own)
    given = {n: c.likelihood.log_prob(c.lam, z[n]) for n, c in conditionals.items() if n in detached}
    cancel = _sum(given, {n: target.site(n).scale for n in given if n not in hidden})
    return weight(lambda: factored.total(q_terms)), measured, cancel


def _above(
    proposal: AbstractProposal,
    target: Target,
    site: str,
    keys: tuple[Key, Key],
    branch: Array,
    bound: AbstractBound,
    rows: Rows,
) -> Callable[[Array], Array]:
    """The log-weight of a draw as a function of the value of a variable on which other draws depend."""

    def at(value: Array) -> Array:
        z, context = proposal.redrawn({site: value}, keys[0], branch)
        z = {**z, **proposal.hidden(context)}
        views = terms_by_view(target, z, views_of(target, proposal, context, bound.linear(proposal.branches)))
        log_q = total(proposal, z, context, keys[1], bound.inner)
        return target.factored.total(viewed_terms(target, views, rows)) - log_q

    return at


def total(proposal: AbstractProposal, z: Latents, context: PyTree, key: Key, inner: int) -> Array:
    """`log_q` of a draw, summed."""
    return _sum(proposal.log_q(z, context, key, inner), proposal.scales())


def _sum(terms: Mapping[str, Array], scales: Mapping[str, float]) -> Array:
    return sum((scales.get(n, 1.0) * sum_all(t) for n, t in terms.items()), jnp.zeros(()))


def views_of(target: Target, proposal: AbstractProposal, context: PyTree, linear: bool) -> dict[str, Latents]:
    """View -> means of sites to be used for the draws: of those in closed form, and log E[e^w|lambda] of averaged ones.

    These where the bound is linear in the log-weight alone: a mean of log-weights is a bound, their exponential's mean is none.
    """
    out = {view: dict(means) for view, means in proposal.views().items()}
    given = proposal.conditionals(context) if target.averaged and linear else {}
    for name in (n for n in target.averaged if n in given):
        likelihood, lam = given[name]
        if isinstance(likelihood, NormalLikelihood):
            mean = likelihood.log_mean_exp(lam)
            out.setdefault("logmeanexp", {})[name] = mean
            out[f"logmeanexp {name}"] = {name: mean}
    return out


def terms_by_view(
    target: Target, z: Latents, special: Mapping[str, Latents]
) -> tuple[tuple[frozenset[str] | None, Latents], ...]:
    """Names of log p's terms, with the latents at which they are evaluated (all at z, unless sites are in closed form)."""
    if not special:
        return ((None, z),)
    by_view: dict[str, set[str]] = {"mean": set()}
    chosen = dict(target.views)
    for factor in target.factored.factors:
        by_view.setdefault(chosen.get(factor.name, "mean"), set()).add(factor.name)
    return tuple((frozenset(names), {**z, **special.get(view, {})}) for view, names in by_view.items())


def viewed_terms(target: Target, views: tuple[tuple[frozenset[str] | None, Latents], ...], rows: Rows) -> list[Array]:
    """The factor arrays of log p, each at its own view; what a view does not keep is never computed (dead code)."""
    found = [(names, target.terms(v, rows)) for names, v in views]
    return [
        next(terms[k] for names, terms in found if names is None or factor.name in names)
        for k, factor in enumerate(target.factored.factors)
    ]


def check_minibatch(target: Target, bound: AbstractBound, branches: int) -> None:
    """Refuse a multi-sample bound on noisy log-weights: the log of their mean exceeds the bound, without limit.

    Row by row of a plate, its log-weights are those of the rows that were taken, without noise.

    Raises:
        FitError: naming the plate.
    """
    noisy = [p.name for p in target.plates if p.batch < p.size and p.name != bound.plate]
    if noisy and not bound.linear(branches):
        raise FitError(
            message(
                f"subsampled plate {noisy[0]!r}",
                f"{bound}, which takes the logarithm of a mean over {bound.draws * branches} draws of noisy log-weights",
                "a bound that is linear in the log-weights",
                f"use Elbo(), ImportanceWeighted(outer=1, inner=K) without a mixture, ImportanceWeighted(plate={noisy[0]!r}), "
                "which takes it row by row, or the whole data",
            )
        )
