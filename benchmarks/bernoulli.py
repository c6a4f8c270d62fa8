"""The Bernoulli table of Figure 1: exact KL(q||p) by family, flow length and bound; medians of 5 seeds.

Run `python benchmarks/bernoulli.py`; it writes `benchmarks/results/bernoulli.md`.
"""

from __future__ import annotations

import sys
import time

import jax
import numpy as np
from common import SEEDS, medians, spread, write

import hivi
from hivi.diagnostics import kl, marginal_table
from hivi.reproduce.bernoulli import table_target

TABLE = np.array([[0.1, 0.4], [0.4, 0.1]])
STEPS = 10_000
METHODS = {
    "mean-field": (hivi.MeanField(), hivi.Elbo(), 16),
    **{f"HVM, flow length {n}, eq. 5": (hivi.Hierarchical(prior=hivi.Flow(n)), hivi.Elbo(), 16) for n in (1, 2, 4, 8)},
    "HVM, flow length 8, inner K=20, 64 draws": (
        hivi.Hierarchical(prior=hivi.Flow(8), auxiliary=hivi.InverseFlow(8)),
        hivi.ImportanceWeighted(outer=1, inner=20),
        64,
    ),
    "HVM, mixture prior of 2": (hivi.Hierarchical(prior=hivi.Mixture(2)), hivi.Elbo(), 16),
}


def main() -> None:
    """Every method, every seed."""
    target = table_target(TABLE)
    rows, notes = [], []
    for name, (family, bound, samples) in METHODS.items():
        runs = []
        for seed in range(SEEDS):
            began = time.perf_counter()
            k1, k2 = jax.random.split(jax.random.key(seed))
            fit = hivi.fit(
                target, family, key=k1, steps=STEPS, samples=samples, bound=bound, tolerance=None, progress=False
            )
            seconds = time.perf_counter() - began
            found = fit.elbo(k2, samples=65_536)
            divergence = kl(marginal_table(fit).probability, TABLE)
            runs.append({"bound": found.mean, "stderr": found.stderr, "kl": divergence, "seconds": seconds})
            print(name, seed, runs[-1], file=sys.stderr, flush=True)
        m = medians(runs)
        gap = -m["bound"] - m["kl"]
        rows.append(
            [name, f"{m['bound']:.5f} ± {m['stderr']:.5f}", f"{m['kl']:.2e}", f"{gap:.1e}", f"{m['seconds']:.1f}"]
        )
        notes.append(f"- {name}: KL of the seeds {spread([r['kl'] for r in runs], '.1e')}")
    write(
        "bernoulli",
        f"Bernoulli table ((.1, .4), (.4, .1)): {STEPS} steps, medians of {SEEDS} seeds",
        "python benchmarks/bernoulli.py",
        [
            "method",
            "bound, nats (log Z = 0)",
            "exact KL(q‖p), nats",
            "bound gap beyond KL",
            "seconds, compilation included",
        ],
        rows,
        notes,
    )


if __name__ == "__main__":
    main()
