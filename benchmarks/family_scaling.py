"""Seconds per gradient step against the number of coordinates, by family: the paper's Table 2, measured.

The target is a chain of Gaussians, whose log-joint costs O(D). The compiled steps are timed in turns, so that a busy
machine slows all alike. Run `python benchmarks/family_scaling.py`; it writes `benchmarks/results/family_scaling.md`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import write

import hivi
from hivi._compile import compiled
from hivi._families.product import build_proposal
from hivi._fit.step import Plan, default_optimizer, initial_state, step

SIZES = (128, 512, 2048, 8192, 32768)
LARGEST = {"O(D²)": 8192}
"""A covariance of 32,768 coordinates alone takes 4 GB."""
SAMPLES = 16
STEPS = 10
FAMILIES: dict[str, tuple[Any, str]] = {
    "MeanField()": (hivi.MeanField(), "O(D)"),
    "FullRank()": (hivi.FullRank(), "O(D²)"),
    "LowRank(4)": (hivi.LowRank(4), "O(KD)"),
    "Mixture(4)": (hivi.Mixture(4), "O(KD)"),
    "Flow(8)": (hivi.Flow(8), "O(KD)"),
    "Hierarchical(Flow(8))": (hivi.Hierarchical(prior=hivi.Flow(8)), "O(KD)"),
    'Copula("vine")': (hivi.Copula("vine"), "O(KD)"),
    'Copula("vine", levels=2)': (hivi.Copula("vine", levels=2), "O(KD)"),
    "Copula()": (hivi.Copula(), "O(D²)"),
}


def chain(size: int) -> hivi.Target:
    """A stationary Gaussian chain of correlation about 0.6."""

    def log_joint(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
        x = z["x"]
        return {"own": -0.5 * x**2, "link": -0.5 * (x[1:] - x[:-1]) ** 2}

    return hivi.from_log_joint(log_joint, {"x": hivi.Latent((size,))})


def stepper(family: Any, size: int) -> Callable[[], float]:
    """Seconds of one of `STEPS` compiled steps."""
    target = chain(size)
    proposal = build_proposal(family, target.sites, jax.random.key(0))
    strategies = tuple(hivi.Auto().resolve(target, proposal, hivi.Elbo()).items())
    plan = Plan(strategies, hivi.Elbo(), SAMPLES, default_optimizer(0.01), True, None)
    state = initial_state(proposal, target, plan, jax.random.key(0), 1000)
    run = compiled(lambda s, t: step(s, t, plan), effort="full")
    jax.block_until_ready(run(state, target)[1])

    def measure() -> float:
        began, now = time.perf_counter(), state
        for _ in range(STEPS):
            now, info = run(now, target)
        jax.block_until_ready(info)
        return (time.perf_counter() - began) / STEPS

    return measure


def main() -> None:
    """All families at all sizes, in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    times: dict[tuple[str, int], float] = {}
    for size in SIZES:
        timers = {
            name: stepper(family, size)
            for name, (family, theory) in FAMILIES.items()
            if size <= LARGEST.get(theory, SIZES[-1])
        }
        found: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(repeats):
            for name, timer in timers.items():
                found[name].append(timer())
        for name, seconds in found.items():
            times[name, size] = statistics.median(seconds)
        print(size, {n: f"{1e3 * times[n, size]:.3f} ms" for n in timers}, file=sys.stderr, flush=True)
        del timers
        jax.clear_caches()
    rows = []
    for name, (_, theory) in FAMILIES.items():
        sizes = [s for s in SIZES if (name, s) in times]
        slopes = [np.log(times[name, b] / times[name, a]) / np.log(b / a) for a, b in itertools.pairwise(sizes)]
        cells = [f"{1e3 * times[name, s]:.2f}" if s in sizes else "-" for s in SIZES]
        rows.append([f"`{name}`", *cells, ", ".join(f"{slope:.2f}" for slope in slopes), theory])
    write(
        "family_scaling",
        f"Milliseconds per gradient step by family ({SAMPLES} draws a step; medians of {repeats} x {STEPS} steps)",
        f"python benchmarks/family_scaling.py --repeats {repeats}",
        ["family", *(f"D = {s}" for s in SIZES), "slopes between these", "Table 2"],
        rows,
        [
            "Slopes of log seconds against log D, from one size to the next. At small D the fixed cost of a step hides them."
        ],
    )


if __name__ == "__main__":
    main()
