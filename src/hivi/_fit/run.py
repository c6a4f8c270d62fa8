"""The host's side of one fit: compiled chunks, and between them history, stopping, recovery and checkpoints."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hivi._compile import Effort, compiled
from hivi._errors import FitError, LoadError, message
from hivi._estimators.auto import label
from hivi._estimators.base import AbstractStrategy
from hivi._estimators.cost import effort_of
from hivi._estimators.measured import CANDIDATES
from hivi._families.base import AbstractProposal
from hivi._fit import store
from hivi._fit.history import History
from hivi._fit.progress import Bar
from hivi._fit.step import CHUNK, Plan, State, run_chunk, step
from hivi._fit.stopping import EARLIEST, MAX_LOST, WORTH, levelled
from hivi._space import Latents
from hivi._target.base import Target, bounded, terms_of_draws
from hivi._tree import Key, PyTree, finite

RECOVERIES = 6
FORGIVE_AFTER = 20
"""Chunks without trouble after which earlier recoveries no longer count."""
USUAL_STEPS = 4000
"""More than most fits take before their bound is level, whatever number of steps they may take."""
SAVE_EVERY = 20.0
"""Seconds between two checkpoints."""


@compiled(effort="quick")
def starting_draws(proposal: AbstractProposal, key: Key) -> Latents:
    return jax.vmap(lambda k: proposal.propose(k)[0])(jax.random.split(key, 16))


finite_now = compiled(finite, effort="quick")
"""`finite`, for the host: one small program in place of several for every shape of array."""


def settled(folder: Path | None, identity: str, sites: tuple[str, ...]) -> dict[str, AbstractStrategy]:
    """What the interrupted run that a folder holds measured for these sites; empty where there is none.

    Raises:
        LoadError: the folder holds a run of another configuration.
    """
    if folder is None or not (folder / "checkpoint.safetensors").exists():
        return {}
    meta = store.read(folder, "checkpoint")[1]
    _check_identity(folder, meta, identity)
    chosen, known = meta.get("strategies", {}), {label(s): s for s in CANDIDATES}
    return {n: known[chosen[n]] for n in sites} if all(chosen.get(n) in known for n in sites) else {}


def _check_identity(folder: Path, meta: dict[str, Any], identity: str) -> None:
    if meta["identity"] != identity:
        raise LoadError(
            message(
                f"checkpoint {folder}",
                "a run of another configuration (model, data, family, key, steps or options differ)",
                "the same configuration",
                "choose another folder, or delete this one",
            )
        )


def _one_step(state: State, target: Target, plan: Plan) -> PyTree:
    return eqx.filter(step(state, target, plan), eqx.is_array)


class Run:
    """The host's side of one fit: state, history, stopping, recovery and checkpoints."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        steps: int,
        tolerance: float | None,
        began: float,
        folder: Path | None,
        identity: str,
        state: State,
    ):
        self.target, self.plan, self.steps, self.tolerance = target, plan, steps, tolerance
        self.began, self.folder, self.identity, self.state = began, folder, identity, state
        self.found = History(CHUNK)
        self.last = steps
        self.converged = False
        self.recoveries = 0
        self.paces: list[float] = []
        self._saved = time.monotonic()
        self._clean = 0

    def history(self) -> dict[str, np.ndarray]:
        """One entry per step."""
        elbo, stderr = self.found.elbo.copy(), self.found.stderr.copy()
        return {"step": np.arange(1, len(elbo) + 1), "elbo": elbo, "stderr": stderr}

    def pace(self) -> float | None:
        """Seconds per step: the median over the compiled chunks after the first, which includes compilation."""
        return float(np.median(self.paces[1:])) if len(self.paces) > 1 else None

    def go(self, progress: bool, throw: bool, label: str) -> str:
        """Run to the end; return in words why it ended."""
        chunk = run_chunk.at(self._effort())
        with Bar(self.steps, label, progress) as bar:
            while len(self.found) < self.last:
                good, before, started = self.state, int(self.state.skipped), time.monotonic()
                new, info = chunk(good, self.target, self.plan, jnp.array(self.last, jnp.int32))
                taken = min(CHUNK, self.last - len(self.found))
                elbo, stderr = (np.asarray(x, float)[:taken] for x in info)
                self.paces.append((time.monotonic() - started) / taken)
                trouble = self._trouble(new, before, elbo, taken)
                if trouble is not None:
                    failure = self._recover(good, trouble)
                    if failure is None:
                        continue
                    if throw:
                        raise FitError(failure)
                    self.converged = False
                    return failure
                self.state = new
                self.found.add(elbo, stderr)
                self._clean = self._clean + 1
                if self._clean >= FORGIVE_AFTER:
                    self.recoveries = 0
                self._maybe_stop()
                bar.update(len(self.found), elbo, len(self.found) / (time.monotonic() - self.began))
                self._checkpoint(finished=len(self.found) >= self.last)
        if self.tolerance is None or not self.converged:
            plain = self.found.elbo[: int(self.state.decay_from)] if self.plan.scheduled else self.found.elbo
            self.converged = levelled(plain, 1.0 if self.tolerance is None else self.tolerance, WORTH)
        return "the bound levelled off" if self.converged else "all steps were taken before the bound levelled off"

    def _effort(self) -> Effort:
        """How well to compile the steps: small ones are soon taken, and all the time goes to the compiler."""
        return effort_of(_one_step, self.state, self.target, self.plan, steps=min(self.steps, USUAL_STEPS))

    def _maybe_stop(self) -> None:
        """Once the bound is level, decay the step size over a last stretch and end."""
        if self.tolerance is None or self.converged or len(self.found) >= int(self.state.decay_from):
            return
        if len(self.found) < EARLIEST or not levelled(self.found.elbo, self.tolerance):
            return
        self.converged = True
        done = len(self.found)
        if not self.plan.scheduled:
            self.last = done
            return
        decay = min(max(500, int(0.4 * done)), self.steps - done)
        self.last = done + decay
        self.state = dataclasses.replace(
            self.state, decay_from=jnp.array(done, jnp.int32), decay_steps=jnp.array(max(decay, 1), jnp.int32)
        )

    def _trouble(self, new: State, before: int, elbo: np.ndarray, taken: int) -> str | None:
        skipped = int(new.skipped) - before
        if skipped > MAX_LOST * taken or not bool(finite_now(new.proposal)):
            return f"bound or gradient not finite in {skipped} of {taken} steps"
        if self.found.collapsed(elbo):
            return f"the bound fell to {np.nanmedian(elbo):.4g} from {self.found.best:.4g}"
        return None

    def _recover(self, good: State, trouble: str) -> str | None:
        """Go back to the last good state with half the step size; a message once that has failed too often."""
        self.recoveries += 1
        self._clean = 0
        if self.recoveries > RECOVERIES:
            return message(
                f"fit, after {len(self.found)} steps",
                f"{trouble}, also with the step size halved {RECOVERIES} times; {self._blame(good)}",
                "a finite bound",
                "check the model there (a log of zero, an impossible value), rescale the data, or lower learning_rate",
            )
        self.state = dataclasses.replace(good, rate=good.rate / 2, key=jax.random.fold_in(good.key, self.recoveries))
        return None

    def _blame(self, state: State) -> str:
        """Name the factors that are not finite at draws from the last good state."""
        bad: set[str] = set()
        for number in range(32):
            key = jax.random.fold_in(state.key, number)
            terms = terms_of_draws(self.target, starting_draws(state.proposal.gather(self.target.all_rows()), key))
            bad |= {
                f.name for f, a in zip(self.target.factored.factors, terms, strict=True) if not np.isfinite(a).all()
            }
        if not bad:
            return "all factors are finite at draws from q"
        return f"not finite at draws from q: factors {sorted(bad)}{bounded(self.target)}"

    def _checkpoint(self, finished: bool) -> None:
        if self.folder is None or not (finished or time.monotonic() - self._saved > SAVE_EVERY):
            return
        self._saved = time.monotonic()
        arrays = store.pack(self.state) | {"history.elbo": self.found.elbo, "history.stderr": self.found.stderr}
        meta = {
            "identity": self.identity,
            "last": self.last,
            "converged": self.converged,
            "recoveries": self.recoveries,
            "strategies": {n: label(s) for n, s in self.plan.strategies},
        }
        store.write(self.folder, "checkpoint", arrays, meta)

    def resume(self) -> None:
        """Take up the run that the checkpoint folder holds, if it is one of this configuration.

        Raises:
            LoadError: the folder holds a run of another configuration.
        """
        if self.folder is None or not (self.folder / "checkpoint.safetensors").exists():
            return
        arrays, meta = store.read(self.folder, "checkpoint")
        _check_identity(self.folder, meta, self.identity)
        chosen = {n: label(s) for n, s in self.plan.strategies}
        if meta.get("strategies") != chosen:
            found, cure = f"gradients by {meta.get('strategies')}", "choose another folder, or delete this one"
            raise LoadError(message(f"checkpoint {self.folder}", found, f"{chosen}", cure))
        self.state = store.unpack(self.state, arrays, self.folder)
        self.found.add(arrays["history.elbo"], arrays["history.stderr"])
        self.last, self.converged, self.recoveries = meta["last"], meta["converged"], meta["recoveries"]
