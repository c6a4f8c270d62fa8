"""Which estimator for the bits of `Codes`? Variance and operations of a gradient on densely coupled spins.

    python benchmarks/discrete/bits.py

At a fit of 300 steps (seeds 0 to 4): variance of the gradient over 256 gradients of 16 draws, summed over all parameters, and its
elementary operations. The bits alone differ; z itself has the exact local expectation. Writes `results/discrete_bits.md`.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from common import write  # noqa: E402
from numpyro.distributions import constraints  # noqa: E402

import hivi  # noqa: E402
from hivi._bounds import Elbo  # noqa: E402
from hivi._estimators.cost import operations  # noqa: E402
from hivi._estimators.measured import Setting, gradient, moments  # noqa: E402

SIZES = ((4, 2), (12, 4), (12, 8))
SEEDS = range(5)
STRATEGIES = {
    "HierarchicalScore": hivi.HierarchicalScore(),
    "DisARM": hivi.DisARM(),
    "LocalExpectation": hivi.LocalExpectation(),
}


def spins(n: int, key: jax.Array) -> hivi.Target:
    """Every pair of n spins is coupled, by normal numbers of variance 1/n."""
    half = jax.random.normal(key, (n, n))
    couplings = (half + half.T) / jnp.sqrt(n)

    def log_joint(z: dict[str, jax.Array]) -> jax.Array:
        value = 2.0 * z["z"] - 1.0
        return 0.5 * value @ couplings @ value

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((n,), constraints.boolean)})


def measured(n: int, bits: int, seed: int) -> dict[str, tuple[float, float]]:
    """Strategy -> variance and operations."""
    k_model, k_fit, k_gradient = jax.random.split(jax.random.key(seed), 3)
    target = spins(n, k_model)
    fit = hivi.fit(target, hivi.Codes(bits=bits, spread=1.0), key=k_fit, steps=300, progress=False)
    setting = Setting(target, fit.proposal, Elbo(), 16)
    exact: dict[str, Any] = {"z": hivi.LocalExpectation()}
    out = {}
    for name, strategy in STRATEGIES.items():
        chosen = {**exact, "code of z": strategy}
        cost = operations(lambda s, k, c=chosen: gradient(s, c, k), setting, k_gradient)
        out[name] = float(jnp.sum(moments(setting, chosen, k_gradient, 256)[1])), cost
    return out


if __name__ == "__main__":
    rows = []
    for n, bits in SIZES:
        runs = [measured(n, bits, seed) for seed in SEEDS]
        for name in STRATEGIES:
            ratios = [[r[name][0] / r["HierarchicalScore"][0], r[name][1] / r["HierarchicalScore"][1]] for r in runs]
            variance, cost = (statistics.median(column) for column in zip(*ratios, strict=True))
            rows.append([str(n), str(bits), name, f"{variance:.2f}", f"{cost:.2f}", f"{variance * cost:.2f}"])
    write(
        "discrete_bits", "Estimators for the bits of Codes", "python benchmarks/discrete/bits.py",
        ["spins", "bits", "strategy of the bits", "variance", "operations", "product"], rows,
        ["As multiples of `HierarchicalScore()`, at the same q; medians of 5 seeds."],
    )  # fmt: skip
