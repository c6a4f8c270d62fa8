"""Variance times cost of every gradient estimator on the suite's problems, and whether each is unbiased.

    python benchmarks/discrete/noise.py [PROBLEM ...] [--seeds N] [--families mean-field HVM]

At a mean-field q and at a hierarchical one, both after 300 steps of a fit with exact differences: the variance of the gradient
(trace of its covariance over 2000 gradients of 4 draws), and the seconds of one gradient, compiled, in a loop. At
mean-field, where the problem's states can be enumerated, the mean gradient is held against the exact one, entry by entry.
Adds to `benchmarks/results/discrete_noise.json` as it goes; the table is `discrete_noise.md`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402
from base import Problem, states  # noqa: E402
from common import RESULTS, write  # noqa: E402
from jaxtyping import Array  # noqa: E402
from suite import PROBLEMS, known, record  # noqa: E402

import hivi  # noqa: E402
from hivi._bounds import Elbo  # noqa: E402
from hivi._estimators.base import AbstractStrategy  # noqa: E402
from hivi._estimators.cost import operations  # noqa: E402
from hivi._estimators.measured import Setting, gradient, moments  # noqa: E402
from hivi._estimators.surrogate import memories, surrogate  # noqa: E402
from hivi._families.base import AbstractProposal  # noqa: E402
from hivi._target.base import Target  # noqa: E402

SAMPLES, GRADIENTS, LEARNING, STEPS = 4, 2000, 300, 300
CHECKING = 20.0
"""Seconds for the mean gradient of an estimator, and a hundred thousand gradients at most."""
FEW = 4096
"""States of a problem that is enumerated."""
BOUND = Elbo()

ESTIMATORS: dict[str, AbstractStrategy] = {
    "score, leave-one-out": hivi.Score(),
    "score, moving average": hivi.Score(baseline=hivi.MovingAverage(decay=0.98)),
    "score, learned": hivi.Score(baseline=hivi.Learned()),
    "DisARM": hivi.DisARM(),
    "double control variates": hivi.DoubleControlVariates(),
    "local expectation": hivi.LocalExpectation(),
    "local expectation, coupled": hivi.LocalExpectation(coupled=True),
    "factor expectation": hivi.FactorExpectation(),
    "difference": hivi.Difference(),
    "enumeration": hivi.Enumeration(),
}
PLAIN = "score, leave-one-out"
FAMILIES = {"mean-field": hivi.MeanField(), "HVM": hivi.Hierarchical()}
Chosen = tuple[tuple[str, AbstractStrategy], ...]


def learnt(target: Target, proposal: AbstractProposal, chosen: Chosen, key: Array) -> Any:
    """What the strategies remember after some steps at which q stays where it is."""
    memory = memories(proposal, dict(chosen))
    if not memory:
        return memory

    def step(known: Any, k: Array) -> tuple[Any, None]:
        found = surrogate(proposal, target, dict(chosen), BOUND, k, SAMPLES, memory=known)[1].memory
        return {n: found[n] for n in known}, None

    return jax.lax.scan(step, memory, jax.random.split(key, LEARNING))[0]


def exact(problem: Problem, target: Target, proposal: AbstractProposal) -> np.ndarray | None:
    """The gradient of the mean-field bound by enumeration; None where there are too many states."""
    if problem.table is None or any(not s.discrete for s in target.sites):
        return None
    shape = problem.table.shape
    if not 0 < np.prod(shape) <= FEW or problem.upper is not None:
        return None
    cells, latents, start = states(shape), {}, 0
    for s in target.sites:
        size = int(np.prod(s.shape, initial=1))
        latents[s.name] = jnp.asarray(cells[:, start : start + size].reshape(-1, *s.shape) + s.values.low)
        start += size

    def bound(p: AbstractProposal) -> Array:
        log_q = jax.vmap(lambda z: p.log_density(z, jax.random.key(0)))(latents)
        return jnp.sum(jnp.exp(log_q) * (jax.vmap(target.log_joint)(latents) - log_q))

    gradient = eqx.filter_jit(eqx.filter_grad(bound))(proposal)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)]).astype(float)


def run(name: str, seed: int, path: Any, families: Sequence[str] | None = None) -> None:
    """All estimators on one problem."""
    wanted = [
        (f, e)
        for f, e in itertools.product(families or FAMILIES, ESTIMATORS)
        if f"{name}|{f}|{e}|{seed}" not in known(path)
    ]
    if not wanted:
        return
    problem = PROBLEMS[name]()
    target = problem.target()
    k_fit, k_learn, k_draw = jax.random.split(jax.random.key(seed), 3)
    for family in dict.fromkeys(f for f, _ in wanted):
        options: dict[str, Any] = {"steps": STEPS, "samples": SAMPLES, "tolerance": None, "progress": False}
        proposal = hivi.fit(target, FAMILIES[family], key=k_fit, **options).proposal
        right = exact(problem, target, proposal) if family == "mean-field" else None
        labels = [e for f, e in wanted if f == family]
        here = None
        if (
            PLAIN not in labels
        ):  # what was measured in another run is compared by what the score function costs in this one
            here = one(target, proposal, assigned(target, PLAIN), None, k_learn, k_draw)["seconds"]
        for label in labels:
            try:
                row = one(target, proposal, assigned(target, label), right, k_learn, k_draw)
            except (hivi.HiviError, AttributeError, ValueError) as error:
                row = {"refused": str(error).splitlines()[0][:120]}
            record(path, f"{name}|{family}|{label}|{seed}", row if here is None else row | {"plain seconds": here})


def assigned(target: Target, label: str) -> Chosen:
    """Each site with its strategy."""
    return tuple((s.name, ESTIMATORS[label] if s.discrete else hivi.Pathwise()) for s in target.sites)


def comparable(row: dict[str, Any], plain: dict[str, Any]) -> float:
    """Of one gradient, on the scale of the run in which the score function was measured."""
    return row["seconds"] * plain["seconds"] / row.get("plain seconds", plain["seconds"])


def one(
    target: Target, proposal: AbstractProposal, chosen: Chosen, right: np.ndarray | None, k_learn: Array, k_draw: Array
) -> dict[str, Any]:
    """The figures of one estimator."""
    for name, strategy in chosen:
        site = target.site(name)
        reason = strategy.refusal(site, conditional(proposal, name)) or strategy.unsuited(site, proposal, BOUND)
        if reason:
            return {"refused": reason}
    memory = eqx.filter_jit(learnt)(target, proposal, chosen, k_learn)
    setting, seconds = Setting(target, proposal, BOUND, SAMPLES), []
    for _ in range(4):
        began = time.perf_counter()
        found = np.asarray(moments(setting, dict(chosen), k_draw, GRADIENTS, memory), float)
        seconds.append((time.perf_counter() - began) / GRADIENTS)
    mean, variance = found
    cost = operations(lambda s, k: gradient(s, dict(chosen), k, memory), setting, k_draw)
    total, least = float(variance.sum()), min(seconds[1:])  # the first call compiles
    row = {"variance": total, "operations": cost, "seconds": least, "product": total * least}
    if right is not None:
        # Where two rare values have to meet in one gradient, thousands of gradients see it twice or never.
        more = int(np.clip(CHECKING / (least * GRADIENTS), 1, 50))
        runs = [found, *(np.asarray(moments(setting, dict(chosen), k, GRADIENTS, memory), float)
                         for k in jax.random.split(jax.random.fold_in(k_draw, 1), more - 1))]  # fmt: skip
        mean, variance = np.mean(runs, 0)
        # Float32 is right to about 1e-6 of the gradient's size, or of the nats that cancel where that is near zero.
        nats = abs(problem_nats(target, proposal))
        error = np.sqrt(variance / (GRADIENTS * more) + (2e-6 * max(np.abs(right).max(), 1.0) + 1e-7 * nats) ** 2)
        row |= {"z": float(np.abs((mean - right) / error).max()), "entries": len(right), "gradients": GRADIENTS * more}
    return row


def problem_nats(target: Target, proposal: AbstractProposal) -> float:
    """Size of log p at a draw."""
    return float(target.log_joint(proposal.propose(jax.random.key(0))[0]))


def conditional(proposal: AbstractProposal, name: str) -> Any:
    """q(z|lambda) of a site."""
    return proposal.conditionals(proposal.propose(jax.random.key(0))[1]).get(name)


def by_operations(found: dict[str, dict[str, Any]]) -> list[float]:
    """For each problem, q and seed: product in seconds of what operations would choose, as a multiple of the least.

    Of what was timed in one run.
    """
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for key, row in found.items():
        name, family, _, seed = key.split("|")
        if "product" in row and "plain seconds" not in row:
            noise = max(row["variance"], 1e-12)  # nothing but rounding is left
            groups.setdefault((name, family, seed), []).append((noise * row["operations"], noise * row["seconds"]))
    return [min(pairs)[1] / min(s for _, s in pairs) for pairs in groups.values()]


def table(path: Any, seeds: int) -> None:
    """Medians over seeds: each estimator's product, as a factor below the score function with leave-one-out."""
    found, rows = known(path), []
    scores: list[float] = []
    entries = 0

    def factor(name: str, family: str, label: str) -> float | None:
        """Median over the seeds: two estimators are compared at the same q."""
        keys = [[f"{name}|{family}|{which}|{s}" for which in (PLAIN, label)] for s in range(seeds)]
        pairs = [(found[a], found[b]) for a, b in keys if a in found and b in found]
        pairs = [(a, b) for a, b in pairs if "product" in a and "product" in b]
        good = [a["product"] / max(b["variance"] * comparable(b, a), 1e-30) for a, b in pairs]
        return statistics.median(good) if good else None

    for name, family in itertools.product(PROBLEMS, FAMILIES):
        if factor(name, family, PLAIN) is None:
            continue
        factors = [factor(name, family, label) for label in ESTIMATORS]
        cells = ["-" if f is None else ">1e6" if f > 1e6 else f"{f:.3g}" for f in factors]
        runs = sum(f"{name}|{family}|{PLAIN}|{s}" in found for s in range(seeds))
        rows.append([name, family, *cells, str(runs)])
    for row in found.values():
        if "z" in row:
            scores.append(row["z"])
            entries += row["entries"]
    chance = float(scipy.stats.norm.isf(0.025 / max(entries, 1)))
    worst, losses = max(scores, default=0.0), by_operations(found)
    notes = textwrap.wrap(
        f"How many times smaller than for the score function with leave-one-out baseline at the same q; medians over the seeds. "
        f"Cost is seconds of a compiled gradient. {SAMPLES} draws a gradient, {GRADIENTS} gradients, after {STEPS} "
        "steps of a fit; what was added later is timed beside the score function again; baselines that learn had "
        f"{LEARNING} steps for it. A dash: the strategy does not serve the site, or the model cannot be evaluated between "
        "the site's values. Very large factors: hardly any noise is left. Unbiasedness, at mean-field, where the states can "
        "be enumerated, by 2,000 to 100,000 gradients: the largest |z-score| of "
        f"{entries:,} entries of {len(scores)} mean gradients is {worst:.2f}; by chance it is below "
        f"{chance:.2f} with probability 0.95. Auto counts operations in place of seconds: what it would "
        f"choose of those timed in one run has at most {max(losses, default=1.0):.2f} times the least product in seconds (median "
        f"{statistics.median(losses or [1.0]):.2f}; {len(losses)} problems, q and seeds).",
        130,
    )
    write(
        "discrete_noise", "Variance times cost of gradient estimators", "python benchmarks/discrete/noise.py",
        ("problem", "q", *ESTIMATORS, "seeds"), rows, notes,
    )  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure the noise of every estimator on the suite's problems.")
    parser.add_argument("problems", nargs="*", metavar="PROBLEM")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    path = RESULTS / "discrete_noise.json"
    for seed, name in itertools.product(range(options.seeds), options.problems or list(PROBLEMS)):
        run(name, seed, path, options.families)
    table(path, options.seeds)


if __name__ == "__main__":
    main()
