"""Correlations of discrete posteriors by family: the paper's table, and ten coupled counts with an exact answer.

The counts are a square-root graphical model (Inouye, Ravikumar & Dhillon 2016), no copula: log p(z) = sum_i z_i log r_i -
log z_i! + sum_i b_i sqrt(z_i z_{i+1}), with b of both signs. Its correlations come exactly by transfer matrices.
Run `python benchmarks/copula.py`; it writes `benchmarks/results/copula.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import SEEDS, medians, spread, write
from jax.scipy.special import gammaln
from numpyro.distributions import constraints

import hivi
from hivi.reproduce.bernoulli import table_target

TABLE = np.array([[0.1, 0.4], [0.4, 0.1]])
RATES = np.array([2.0, 3.0, 1.5, 4.0, 2.0, 3.0, 2.5, 1.5, 3.5, 2.0])
LINKS = np.array([0.6, -0.5, 0.5, -0.6, 0.7, -0.4, 0.5, 0.6, -0.5])
MOST = 80
TIGHT = hivi.ImportanceWeighted(outer=1, inner=10)
METHODS: dict[str, tuple[Any, Any]] = {
    "mean-field": (hivi.MeanField(), hivi.Elbo()),
    "HVM, flow length 8, eq. 5": (hivi.Hierarchical(), hivi.Elbo()),
    "copula, Gaussian, eq. 5": (hivi.Copula(), hivi.Elbo()),
    "copula, Gaussian, inner K=10": (hivi.Copula(), TIGHT),
    "copula, vine of 1 tree, inner K=10": (hivi.Copula("vine"), TIGHT),
    "copula, vine of Frank pairs, inner K=10": (hivi.Copula("vine", pair="frank"), TIGHT),
}


def counts() -> hivi.Target:
    """The chain of counts."""
    rates, links = jnp.log(jnp.array(RATES)), jnp.array(LINKS)

    def log_joint(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
        root = jnp.sqrt(z["z"].astype(rates.dtype))
        return {"own": z["z"] * rates - gammaln(z["z"] + 1.0), "link": links * root[1:] * root[:-1]}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((len(RATES),), constraints.nonnegative_integer)})


def exact_counts() -> tuple[np.ndarray, float]:
    """Correlation matrix and log Z, by transfer matrices over 0..MOST."""
    z = np.arange(MOST + 1.0)
    own = np.exp(z * np.log(RATES)[:, None] - np.array(gammaln(z + 1.0), np.float64))
    link = np.exp(LINKS[:, None, None] * np.sqrt(z[:, None] * z))
    dim = len(RATES)

    def total(marks: dict[int, np.ndarray]) -> float:
        message = own[0] * marks.get(0, 1.0)
        for i in range(1, dim):
            message = (message @ link[i - 1]) * own[i] * marks.get(i, 1.0)
        return float(message.sum())

    norm = total({})
    mean = np.array([total({i: z}) for i in range(dim)]) / norm
    second = np.array([[total({i: z**2} if i == j else {i: z, j: z}) for j in range(dim)] for i in range(dim)]) / norm
    covariance = second - np.outer(mean, mean)
    scale = np.sqrt(np.diag(covariance))
    return covariance / np.outer(scale, scale), float(np.log(norm))


def measure(target: hivi.Target, exact: np.ndarray, method: tuple[Any, Any], seed: int, steps: int) -> dict[str, float]:
    """One fit: the bound, and the largest error of a correlation."""
    began = time.perf_counter()
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    fit = hivi.fit(target, method[0], key=k1, steps=steps, bound=method[1], tolerance=None, progress=False)
    seconds = time.perf_counter() - began
    draws = np.asarray(fit.sample(k2, 100_000)["z"], np.float64)
    error = np.abs(np.corrcoef(draws.T) - exact)
    near = np.abs(np.diagonal(np.corrcoef(draws.T) - exact, 1))
    return {"bound": fit.elbo(k3, samples=8192).mean, "worst": error.max(), "mean": near.mean(), "seconds": seconds}


def main() -> None:
    """Both targets, every method, every seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--methods", default="")
    args = parser.parse_args()
    correlation, log_norm = exact_counts()
    targets = {
        "table": (table_target(TABLE), np.array([[1.0, -0.6], [-0.6, 1.0]]), 0.0),
        "10 counts": (counts(), correlation, log_norm),
    }
    rows, notes = (
        [],
        [f"Exact: log Z = {log_norm:.4f}; correlations of neighbours {np.diagonal(correlation, 1).round(3)}."],
    )
    for name, (target, exact, norm) in targets.items():
        for label, method in METHODS.items():
            if args.methods not in label:
                continue
            runs = []
            for seed in range(args.seeds):
                runs.append(measure(target, exact, method, seed, args.steps))
                print(name, label, seed, runs[-1], file=sys.stderr, flush=True)
            m = medians(runs)
            gap, worst = f"{m['bound'] - norm:.4f}", [r["worst"] for r in runs]
            rows.append([name, label, gap, f"{m['worst']:.3f}", f"{m['mean']:.3f}", f"{m['seconds']:.0f}"])
            notes.append(f"- {name}, {label}: largest errors of the seeds {spread(worst, '.3f')}")
            write(
                "copula",
                f"Correlations of discrete posteriors: {args.steps} steps, medians of {args.seeds} seeds",
                f"python benchmarks/copula.py --seeds {args.seeds} --steps {args.steps}",
                [
                    "target",
                    "method",
                    "bound − log Z, nats",
                    "largest error of a correlation",
                    "mean error, neighbours",
                    "seconds",
                ],
                rows,
                notes,
            )


if __name__ == "__main__":
    main()
