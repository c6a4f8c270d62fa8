"""`fit` for a streamed target: passes over its source, and a `Fit` of all its rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message
from hivi._estimators.auto import label
from hivi._estimators.base import AbstractEstimator, AbstractStrategy
from hivi._estimators.expectation import Expectation
from hivi._families.base import AbstractFamily, AbstractProposal
from hivi._families.gamma import MeanFieldGamma
from hivi._families.mean_field import MeanField
from hivi._families.product import build_proposal
from hivi._fit.progress import Bar
from hivi._fit.result import Fit
from hivi._fit.stream import AFTER_WARM_UP, Schedule, at_blocks, conditioned, split_rows
from hivi._fit.streaming import Stream, advance, in_order, open_stream
from hivi._space import Site
from hivi._target.base import Target
from hivi._tree import Key

WARM_UP = 0.4
"""Share of the passes with sites in closed form plugged in, before their posterior is fitted."""
Family = AbstractFamily | Mapping[str, AbstractFamily]


def default_streamed_family(target: Target) -> dict[str, AbstractFamily]:
    """Gamma for sites in closed form, mean-field for the rest."""
    closed: dict[str, AbstractFamily] = {name: MeanFieldGamma() for name in target.closed}
    rest = any(s.name not in target.closed for s in target.sites)
    return {**closed, ".*": MeanField()} if rest else closed


def of_a_batch(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites whose rows are one minibatch's."""
    return tuple(s if s.local is None else dataclasses.replace(s, shape=s.batch_shape) for s in sites)


def fit_streamed(
    target: Target,
    family: Family | None,
    *,
    key: Key,
    steps: int,
    samples: int,
    bound: AbstractBound,
    estimator: AbstractEstimator,
    learning_rate: float,
    progress: bool,
) -> Fit:
    """Passes enough for `steps` steps; see `hivi.fit`."""
    began = time.monotonic()
    family = default_streamed_family(target) if family is None else family
    k1, k2, k3 = jax.random.split(key, 3)
    refuse_start(family)
    proposal = build_proposal(family, of_a_batch(target.sites), k1).near(target.starts)
    strategies = estimator.resolve(target, conditioned(target, proposal), bound)
    _check_closed(proposal, strategies)
    stream = open_stream(target, proposal, k2)
    rng = np.random.default_rng(np.asarray(jax.random.bits(k3, (4,))))
    per_pass = len(stream.source.passes(np.random.default_rng(0)))
    passes = max(1, round(steps / per_pass))
    closed = {n for n, s in strategies.items() if isinstance(s, Expectation)}
    warm = int(WARM_UP * passes) if closed else 0
    tick, warm_steps = time.monotonic(), 0
    with Bar(passes * per_pass, "fit", progress) as bar:
        for count, plug_in in ((warm, True), (passes - warm, False)):
            chosen = {n: Expectation(plug_in=plug_in) if n in closed else s for n, s in strategies.items()}
            delay = 1.0 if plug_in or not warm else AFTER_WARM_UP
            schedule = Schedule(free=learning_rate, delay=delay)
            stream.steps = 0
            if not plug_in:
                warm_steps = len(stream.elbo)

            def report(at: int, of: int, value: float) -> None:
                done = len(stream.elbo)
                bar.update(done, np.asarray(stream.elbo[-per_pass:]), done / (time.monotonic() - tick))

            given: dict[str, Any] = {"strategies": chosen, "schedule": schedule, "bound": bound, "samples": samples}
            advance(stream, count, **given, rng=rng, report=report)
    return Fit(
        proposal=whole(stream),
        sites=target.sites,
        bound=bound,
        family=_inner(family),
        converged=False,
        history=_history(stream.elbo, warm_steps),
        seconds=time.monotonic() - began,
        message=f"{passes} passes over {stream.source.rows} rows" + (f", {warm} of them a warm-up" if warm else ""),
        target=target,
        strategies={name: label(s) for name, s in strategies.items()},
    )


def _history(elbo: Sequence[float], warm_steps: int) -> dict[str, np.ndarray]:
    """Of a warm-up no bound is known."""
    step = np.arange(len(elbo))
    return {"step": step, "elbo": np.where(step < warm_steps, np.nan, elbo), "stderr": np.full(len(elbo), np.nan)}


def _inner(family: Family) -> Any:
    """The family without its inference network: the rows' parameters have been read off it."""
    if isinstance(family, AbstractFamily):
        return family.inner()
    return {name: f.inner() for name, f in family.items()}


def whole(stream: Stream) -> AbstractProposal:
    """The proposal of all rows, in memory; of an inference network, what it gives for each of them."""
    blocks: list[Any] = []
    rest: Any = None
    for ids, here in at_blocks(stream.target):
        own, rest = split_rows(conditioned(here, stream.proposal(ids)))
        blocks.append(jax.tree.map(lambda x, real=ids >= 0: np.asarray(x)[real], own))
    joined = jax.tree.map(lambda *parts: jnp.asarray(in_order(stream.source, list(parts))), *blocks)
    return with_sites(eqx.combine(joined, rest), {s.name: s for s in stream.target.sites})


def with_sites(proposal: AbstractProposal, sites: Mapping[str, Site]) -> AbstractProposal:
    """The proposal with the sites' full shapes."""

    def one(p: Any) -> Any:
        changed = {"sites": tuple(dataclasses.replace(sites[s.name], values=s.values) for s in p.sites)}
        return dataclasses.replace(p, **changed)

    parts = getattr(proposal, "parts", None)
    if parts is None:
        return one(proposal)
    return dataclasses.replace(one(proposal), parts=tuple(one(p) for p in parts))


def refuse_streamed(**options: Any) -> None:
    """Refuse options that a streamed fit does not have.

    Raises:
        FitError: naming the option.
    """
    for name, value in options.items():
        if value is not None:
            raise FitError(
                message(
                    f"fit({name}=...)",
                    "a streamed target, whose rows travel with their data",
                    f"{name}=None",
                    "leave it out; hivi.topics.fitting has passes that go on from where they stopped",
                )
            )


def refuse_start(family: Family) -> None:
    """Refuse a hierarchical family with a start: rows of a stream begin alike.

    Raises:
        FitError: naming the cure.
    """
    members = family.values() if isinstance(family, Mapping) else (family,)
    if any(getattr(member, "start", None) is not None for member in members):
        raise FitError(
            message(
                "Hierarchical(start=...)",
                "a streamed target, whose rows begin alike",
                "start=None",
                "grow from a mean-field fit with hivi.topics.grow",
            )
        )


def _check_closed(proposal: AbstractProposal, strategies: Mapping[str, AbstractStrategy]) -> None:
    """Refuse draws of a family that takes conjugate steps: they would be steps along another gradient."""
    for part in getattr(proposal, "parts", (proposal,)):
        for s in part.sites if part.closed_form else ():
            if not strategies[s.name].closed:
                raise FitError(
                    message(
                        f"site {s.name!r}",
                        f"{type(part).__name__} with the strategy {type(strategies[s.name]).__name__}",
                        "a site in closed form, with Expectation()",
                        "use hivi.MeanField() for it",
                    )
                )
