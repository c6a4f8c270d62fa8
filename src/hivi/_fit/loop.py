"""`fit`: Algorithm 1 of the paper; what comes before its first step."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from hivi._bounds import AbstractBound, Elbo
from hivi._compile import hastily, make_room
from hivi._errors import FitError, message, require_count, require_positive
from hivi._estimators.auto import Auto, label
from hivi._estimators.base import AbstractEstimator, AbstractStrategy, Fixed
from hivi._estimators.measured import Setting, settle
from hivi._families.base import AbstractFamily, AbstractProposal, with_tables
from hivi._families.full_rank import FullRank
from hivi._families.mean_field import MeanField
from hivi._families.mixture import Mixture
from hivi._families.product import build_proposal
from hivi._families.standardised import Standardised
from hivi._fit import store
from hivi._fit.gaussian_start import best_gaussian
from hivi._fit.parallel import check_mesh, distribute
from hivi._fit.progress import announce
from hivi._fit.result import Fit, check_key
from hivi._fit.run import Run, finite_now, settled, starting_draws
from hivi._fit.step import CHUNK, Plan, State, default_optimizer, initial_state, run_chunk
from hivi._fit.streamed import fit_streamed, refuse_streamed
from hivi._target.base import Target, check_start, full_size
from hivi._target.indices import check_indices
from hivi._tree import Key

DENSE_LIMIT, MIXTURE_LIMIT, NUMBERS_LIMIT = 400, 1_000, 50_000
"""Coordinates of the default for continuous sites and for discrete ones, and the most probabilities of one component."""
REFINING = 0.002
"""Learning rate of families that start at the best Gaussian."""


def fit(
    target: Target,
    family: AbstractFamily | Mapping[str, AbstractFamily] | None = None,
    *,
    key: Key,
    steps: int = 10_000,
    samples: int | None = None,
    bound: AbstractBound | None = None,
    estimator: AbstractEstimator | AbstractStrategy | Mapping[str, AbstractStrategy] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    learning_rate: float | None = None,
    tolerance: float | None = 1.0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    throw: bool = True,
    mesh: Mesh | None = None,
    start: Fit | None = None,
) -> Fit:
    """Fit a variational family to a target by stochastic gradient ascent on a bound (Algorithm 1 of the paper).

    Args:
        target: from `hivi.from_numpyro` or `hivi.from_log_joint`.
        family: a family, or a dict from site name or pattern to family; None chooses by the supports (`default_family`).
        key: a JAX random key; the same key gives the same fit.
        steps: the most gradient steps.
        samples: Monte Carlo estimates of the bound per step; 2 or more give score gradients their baseline. 16 if None, but 1
            for a streamed target.
        bound: `Elbo()` if None.
        estimator: `Auto()` if None; or one strategy, or a dict from site to strategy.
        optimizer: any Optax optimiser (it minimises the negative bound); None takes Adam with warm-up, and with a cosine
            decay that starts when the bound has levelled off.
        learning_rate: of the default optimiser; None takes 0.01; 0.05 for mean-field and mixtures of discrete sites,
            and 0.002 where the family starts at the best Gaussian.
        tolerance: stop when the smoothed bound rises by less than this many of its standard errors, from 2,000 steps on; None
            runs every step.
        progress: show a progress bar on a terminal.
        checkpoint: a folder; where it holds an interrupted run of the same configuration, that run is resumed, bit for bit.
        throw: raise `FitError` when the fit fails; otherwise return the last good state, with `converged` False.
        mesh: a device mesh; its axis "samples" shards draws, an axis named like a plate shards the rows of that plate.
        start: a fit of the same family (for example a loaded one) whose parameters to go on from.

    Returns:
        The fit.

    Raises:
        TargetError: NaN or an infinite log-probability at the start, or an index outside a latent.
        FamilyError: the family does not suit the target.
        FitError: bound or gradient stayed non-finite after the step size was halved several times.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=2000, progress=False)
        >>> bool(abs(fit.elbo(jax.random.key(1)).mean - 0.9189) < 0.1)
        True
    """
    began = time.monotonic()
    _check_kinds(target, key)
    if samples is None:
        samples = 16 if target.source is None else 1
    steps, samples = _counts(steps, samples)
    if learning_rate is not None:
        require_positive("fit(learning_rate=...)", learning_rate, "0.01 is usual", FitError)
    if target.source is not None:
        refuse_streamed(optimizer=optimizer, checkpoint=checkpoint, mesh=mesh, start=start)
        return fit_streamed(
            target, family, key=key, steps=steps, samples=samples, bound=_bound(bound),
            estimator=_resolve(estimator), learning_rate=0.01 if learning_rate is None else learning_rate, progress=progress,
        )  # fmt: skip
    make_room()
    given = _Settings(
        key=key, steps=steps, samples=samples, bound=_bound(bound), estimator=_resolve(estimator), optimizer=optimizer,
        learning_rate=learning_rate, tolerance=tolerance, progress=progress, checkpoint=checkpoint, mesh=mesh, start=start,
    )  # fmt: skip
    run, family, why = _prepared(target, family, given, began)
    run.resume()
    outcome = run.go(progress, throw, _label(family))
    return _finished(run, family, outcome + why)


class _Settings(NamedTuple):
    """The arguments of `fit`, checked."""

    key: Key
    steps: int
    samples: int
    bound: AbstractBound
    estimator: AbstractEstimator
    optimizer: optax.GradientTransformation | None
    learning_rate: float | None
    tolerance: float | None
    progress: bool
    checkpoint: str | Path | None
    mesh: Mesh | None
    start: Fit | None


def _prepared(target: Target, family: Any, given: _Settings, began: float) -> tuple[Run, Any, str]:
    """A run at its first step, its family, and how the family was chosen where it was not given."""
    family, why = _family(target, family, given.start)
    with hastily():
        k_build, k_check, k_run = jax.random.split(given.key, 3)
    if given.start is None:
        proposal, usual = _begin(target, family, k_build, k_check)
    else:
        proposal, usual = _continue(given.start, target, family)
    _refuse_conjugate(proposal)
    target.check_data()  # by eqx.tree_at they can be replaced without a check
    check_indices(target)
    check_start(target, starting_draws(proposal.gather(target.all_rows()), k_check))
    rate = usual if given.learning_rate is None else given.learning_rate
    chosen = default_optimizer(rate) if given.optimizer is None else given.optimizer
    decays = given.optimizer is None
    bound, estimator = given.bound, given.estimator
    strategies = estimator.resolve(target, proposal, bound)
    plan = Plan((), bound, given.samples, chosen, decays, given.mesh).using(strategies)
    with hastily():
        state = initial_state(proposal, target, plan, k_run, given.steps)
    folder = None if given.checkpoint is None else Path(given.checkpoint)
    settings = [given.steps, given.samples, rate, repr(given.tolerance), decays, repr(estimator)]
    identity = "" if folder is None else _identity(target, family, plan, given.key, settings, state)
    undecided = estimator.undecided(target, proposal, bound)
    if undecided:
        found = settled(folder, identity, undecided) or _measured(
            plan, undecided, target, state, jax.random.fold_in(k_check, 1), given.progress
        )
        plan = plan.using(found)
        state = initial_state(proposal, target, plan, k_run, given.steps)
    if given.mesh is not None:
        state, target = _on_mesh(state, target, plan, given.mesh)
    return Run(target, plan, given.steps, given.tolerance, began, folder, identity, state), family, why


def _family(target: Target, family: Any, start: Fit | None) -> tuple[Any, str]:
    """The family, and what a fit's message says of it where the supports chose it."""
    if family is not None:
        return family, ""
    if start is not None:
        return start.family, ""
    chosen = default_family(target)
    return chosen, f"; family chosen by the supports: {_label(chosen)}"


def _finished(run: Run, family: Any, outcome: str) -> Fit:
    """What a run that has ended leaves."""
    return Fit(
        proposal=run.state.average if run.plan.scheduled else run.state.proposal,
        sites=run.target.sites,
        bound=run.plan.bound,
        family=family,
        converged=run.converged,
        history=run.history(),
        seconds=time.monotonic() - run.began,
        message=outcome,
        target=run.target,
        strategies={name: label(s) for name, s in run.plan.strategies},
        pace=run.pace(),
    )


def _begin(target: Target, family: Any, k_build: Key, k_check: Key) -> tuple[AbstractProposal, float]:
    """The built family, at the best Gaussian where it starts there and the target is used whole; and its learning rate."""
    with hastily():  # operation by operation, a flow takes seconds to build for the first time
        proposal = build_proposal(family, target.sites, k_build)
        if any(s.discrete for s in target.sites):
            proposal = proposal.apart(jax.random.fold_in(k_build, 1))
    found: list[tuple[Array, Array]] = []

    def search() -> tuple[Array, Array]:
        found.append(best_gaussian(target, proposal.sites, jax.random.fold_in(k_check, 2)))
        return found[0]

    started = proposal.started(search) if full_size(target) else proposal
    # At an optimum, long steps only shake it.
    return started, min(REFINING, proposal.learning_rate) if found else proposal.learning_rate


def _refuse_conjugate(proposal: AbstractProposal) -> None:
    if any(p.closed_form for p in (proposal, *getattr(proposal, "parts", ()))):
        raise FitError(
            message(
                "MeanFieldGamma",
                "a target that is not streamed",
                "a streamed target, whose fits take conjugate steps",
                "use hivi.MeanField() for its sites",
            )
        )


def _measured(
    plan: Plan, undecided: tuple[str, ...], target: Target, state: State, key: Key, progress: bool
) -> dict[str, AbstractStrategy]:
    """The plan's strategies, those of undecided sites by measurement after a few steps."""
    announce(f"measuring gradient strategies for {', '.join(undecided)}; estimator={{...}} would choose them", progress)
    setting = Setting(target, _warm(state, target, plan), plan.bound, plan.samples)
    return settle(dict(plan.strategies), undecided, setting, key)


def _warm(state: State, target: Target, plan: Plan) -> AbstractProposal:
    """The proposal after a few steps, on one device, or as it is where they fail: where strategies are measured."""
    after, _ = run_chunk.at("quick")(state, target, plan._replace(mesh=None), jnp.array(CHUNK, jnp.int32))
    return after.proposal if bool(finite_now(after.proposal)) else state.proposal


def _on_mesh(state: State, target: Target, plan: Plan, mesh: Mesh) -> tuple[State, Target]:
    """State and target, placed on the devices."""
    check_mesh(mesh, target, plan.samples)
    placed, target = distribute(state.proposal, target, mesh)
    moments = plan.optimizer.init(eqx.filter(placed, eqx.is_inexact_array))
    return dataclasses.replace(state, proposal=placed, average=placed, moments=moments), target


def _identity(target: Target, family: Any, plan: Plan, key: Key, settings: list[Any], state: State) -> str:
    """What a checkpoint must share with a run to be gone on from."""
    return store.fingerprint(
        target.factored.program.key, repr(target.factored.factors), repr(target.sites), repr(target.plates),
        [target.data, target.factored.consts], repr(store.encode(family)), repr(plan.bound), repr(plan.strategies), key,
        settings, _probe(plan.optimizer), state,
    )  # fmt: skip


def default_family(target: Target) -> AbstractFamily | dict[str, AbstractFamily]:
    """What `fit` takes for `family=None`: by the supports of the target's sites.

    Discrete sites (with or without continuous ones): up to 1,000 coordinates (50,000 probabilities) `Mixture(8)` over all, counts
    and very long ranges of free spread, and `MeanField()` beyond; where a plate with discrete sites comes in minibatches
    `Mixture(4, equal=True)` row by row, and `MeanField()` for the rest; `MeanField()` for one variable alone with finitely many
    values, of which it is exact. Continuous sites only: up to 400 coordinates `Standardised()`, a flow that starts at the best
    Gaussian (`FullRank()` where the target comes in minibatches); `MeanField()` beyond. A streamed target has a default of its
    own (`default_streamed_family`).
    """
    if _one_table(target):
        return MeanField()
    size = sum(int(np.prod(s.shape)) for s in target.sites)
    if any(s.discrete for s in target.sites):
        free = any(s.values.ordered for s in target.sites)
        if not full_size(target):
            return _by_rows(target, free)
        numbers = sum(math.prod(s.shape) * max(s.values.count, 1) for s in with_tables(target.sites))
        small = size <= MIXTURE_LIMIT and numbers <= NUMBERS_LIMIT
        return Mixture(8, dispersed=free) if small else MeanField(dispersed=free)
    if size > DENSE_LIMIT:
        return MeanField()
    return Standardised() if full_size(target) else FullRank()


def _by_rows(target: Target, free: bool) -> AbstractFamily | dict[str, AbstractFamily]:
    """A mixture for the rows of the subsampled plate that has discrete sites, mean-field for the rest."""
    flat = MeanField(dispersed=free)
    plates = {s.local[0].name for s in target.sites if s.discrete and s.local is not None}
    inside = [s.name for s in target.sites if s.local is not None and s.local[0].name in plates]
    if len(plates) != 1:  # each would multiply the draws
        return flat
    rows = Mixture(4, equal=True, dispersed=free)
    return rows if len(inside) == len(target.sites) else {"|".join(map(re.escape, inside)): rows, ".*": flat}


def _one_table(target: Target) -> bool:
    """Whether there is one variable alone, with so few values that mean-field has a probability for each."""
    if len(target.sites) > 1 or math.prod(target.sites[0].shape) > 1:
        return False
    return with_tables(target.sites)[0].values.kind == "finite"


def _label(family: Any) -> str:
    return type(family).__name__ if not isinstance(family, Mapping) else "product"


def _check_kinds(target: Any, key: Any) -> None:
    """Refuse what is no target or no key, whichever a newcomer may pass."""
    if not isinstance(target, Target):
        found, cure = (
            f"a {type(target).__name__}",
            "wrap it: hivi.from_numpyro(model, ...), from_pymc(...), or from_log_joint(...)",
        )
        raise FitError(message("fit(target)", found, "a hivi target", cure))
    check_key("fit", key)


def _counts(steps: int, samples: int) -> tuple[int, int]:
    for name, value in (("steps", steps), ("samples", samples)):
        require_count(f"fit({name}=...)", value, "correct the number", error=FitError)
    return int(steps), int(samples)


def _probe(optimizer: optax.GradientTransformation) -> list[Any]:
    """What an optimiser does to a fixed gradient: its settings cannot be read, but tell here."""
    value, gradient = jnp.zeros(2), jnp.array([1.0, -0.5])
    extended, out = optax.with_extra_args_support(optimizer), []
    moments = extended.init(value)
    for _ in range(2):
        update, moments = extended.update(gradient, moments, value, value=jnp.zeros(()))
        out.append(update)
    return out


def _bound(bound: Any) -> AbstractBound:
    if bound is not None and not isinstance(bound, AbstractBound):
        cure = "for example hivi.Elbo(), with its parentheses"
        raise FitError(message("fit(bound=...)", repr(bound), "a bound, or None", cure))
    return Elbo() if bound is None else bound


def _resolve(estimator: Any) -> AbstractEstimator:
    if estimator is None:
        return Auto()
    if isinstance(estimator, AbstractEstimator):
        return estimator
    for given in estimator.values() if isinstance(estimator, Mapping) else [estimator]:
        if not isinstance(given, AbstractStrategy):
            expected = "a strategy, a dict from site to strategy, or None"
            cure = "such as hivi.Score() or hivi.LocalExpectation(), with its parentheses"
            raise FitError(message("fit(estimator=...)", repr(given), expected, cure))
    return Fixed(estimator, Auto())


def _continue(start: Fit, target: Target, family: Any) -> tuple[AbstractProposal, float]:
    """The parameters of an earlier fit, and their learning rate."""
    if start.sites != target.sites:
        raise FitError(
            message(
                "fit(start=...)",
                "a fit of other sites",
                f"sites {[s.name for s in target.sites]}",
                "use the same model",
            )
        )
    fresh = eqx.filter_eval_shape(lambda key: build_proposal(family, target.sites, key), jax.random.key(0))
    found: Any = jax.tree.structure(eqx.filter_eval_shape(lambda: start.proposal))
    if jax.tree.structure(fresh) != found:
        raise FitError(
            message(
                "fit(start=...)", f"a fit of {_label(start.family)}", f"a fit of {_label(family)}", "leave `family` out"
            )
        )
    return start.proposal, start.proposal.learning_rate
