"""Cost per step against the number of latents: a chain of D Bernoullis, HVM with a planar flow prior of length 4.

Run `python benchmarks/scaling.py`; it writes `benchmarks/results/scaling.md`. Exact local expectations, eq. 5, 4 draws a step.
"""

from __future__ import annotations

import statistics
import sys
import time

import equinox as eqx
import jax
import numpy as np
from common import SEEDS, write
from numpyro.distributions import constraints

import hivi
from hivi._families.product import build_proposal
from hivi._fit.step import Plan, default_optimizer, initial_state, step

SIZES = (100, 1_000, 10_000, 100_000)
SAMPLES = 4


def chain(size: int) -> hivi.Target:
    """An Ising chain with a weak field."""

    def log_joint(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
        spin = 2.0 * z["z"] - 1.0
        return {"pair": 0.5 * spin[1:] * spin[:-1], "field": 0.1 * spin}

    return hivi.from_log_joint(log_joint, latents={"z": hivi.Latent((size,), constraints.boolean)})


def measure(size: int, seed: int) -> dict[str, float]:
    """Seconds to compile, and the median seconds of a step."""
    target = chain(size)
    proposal = build_proposal(hivi.Hierarchical(prior=hivi.Flow(4)), target.sites, jax.random.key(seed))
    strategies = tuple(hivi.Auto().resolve(target, proposal, hivi.Elbo()).items())
    plan = Plan(strategies, hivi.Elbo(), SAMPLES, default_optimizer(0.01), True, None)
    state = initial_state(proposal, target, plan, jax.random.key(seed), 1000)
    run = eqx.filter_jit(lambda s, t: step(s, t, plan))
    began = time.perf_counter()
    jax.block_until_ready(run(state, target)[1])
    compiled = time.perf_counter() - began
    times = []
    for _ in range(30 if size < 50_000 else 8):
        began = time.perf_counter()
        state, info = run(state, target)
        jax.block_until_ready(info)
        times.append(time.perf_counter() - began)
    return {"compile": compiled, "step": statistics.median(times)}


def main() -> None:
    """All sizes for every seed, interleaved."""
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    for seed in range(SEEDS):
        for size in SIZES:
            runs[size].append(measure(size, seed))
            print(size, seed, runs[size][-1], file=sys.stderr, flush=True)
    steps = {size: statistics.median(r["step"] for r in rs) for size, rs in runs.items()}
    slope = np.polyfit(np.log10(SIZES), np.log10([steps[s] for s in SIZES]), 1)[0]
    last = np.log10(steps[SIZES[-1]] / steps[SIZES[-2]])
    compiled = {size: statistics.median(r["compile"] for r in rs) for size, rs in runs.items()}
    rows = [[f"{s:,}", f"{1e3 * steps[s]:.3f}", f"{1e6 * steps[s] / s:.2f}", f"{compiled[s]:.1f}"] for s in SIZES]
    write(
        "scaling",
        f"Cost per step against the number of latents (medians of {SEEDS} seeds)",
        "python benchmarks/scaling.py",
        ["latents D", "ms per step", "µs per step and latent", "seconds to compile"],
        rows,
        [f"Log-log slope over all sizes {slope:.2f}; from 10,000 to 100,000 latents {last:.2f}."],
    )


if __name__ == "__main__":
    main()
