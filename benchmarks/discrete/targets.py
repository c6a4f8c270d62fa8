"""Two hard targets, reached with which family: the Ising model on a 16x16 torus, and the spin glass of 20 spins.

    python benchmarks/discrete/targets.py [disordered] [ordered] [glass] [--seeds N]

`disordered`: beta = 0.4, where correlations are long and mean-field orders wrongly. `ordered`: beta = 1.0, where all that is
left to gain is the second mode. `glass`: KL(q||p) against the best of 20 mean-field restarts. Adds to
`benchmarks/results/discrete_targets.json` as it goes; what is there is not fitted again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import equinox as eqx  # noqa: E402
import ising  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import sherrington_kirkpatrick  # noqa: E402
from common import RESULTS, write  # noqa: E402
from measure import figures  # noqa: E402
from stationary import Stationary, StationaryInverse  # noqa: E402
from suite import known, record  # noqa: E402

import hivi  # noqa: E402

SIZE, HOT = 16, 0.4
RESTARTS = 20
MULTI = 64
"""Draws of the multi-sample bound."""

Row = dict[str, Any]


@functools.cache
def lattice(beta: float) -> tuple[Any, hivi.Target]:
    """The problem and its target, made once."""
    problem = ising.lattice(SIZE, beta)
    return problem, problem.target()


@functools.cache
def mean_field(beta: float, seed: int) -> hivi.Fit:
    """The mean-field fit that others grow from; cooled down, since a quench leaves walls between domains."""
    if beta > HOT:
        return fit(lattice(beta)[1], None, seed, 800, 0.05, start=mean_field(HOT, seed))
    return fit(lattice(beta)[1], hivi.MeanField(), seed, 800, 0.05)


def fit(target: hivi.Target, family: Any, seed: int, steps: int, rate: float, **options: Any) -> hivi.Fit:
    """All steps are taken: where a hierarchy starts the bound can be level for a while."""
    options |= {"key": jax.random.key(seed), "estimator": hivi.LocalExpectation()}
    return hivi.fit(target, family, steps=steps, learning_rate=rate, tolerance=None, progress=False, **options)


def per_spin(beta: float, found: hivi.Fit, seed: int) -> Row:
    """Bounds over N beta, in the units of the literature."""
    unit = SIZE**2 * beta
    key = jax.random.key(100 + seed)
    one = found.elbo(key, 8192)
    exact = lattice(beta)[0].log_z
    row = {"bound": one.mean / unit, "stderr": one.stderr / unit, "gap": exact - one.mean, "seconds": found.seconds}
    if beta == HOT:  # where it is cold, the bound is tight
        many = found.elbo(key, 128, hivi.ImportanceWeighted(outer=MULTI))
        row |= {"multi": many.mean / unit, "multi stderr": many.stderr / unit}
    return row


def full_rank(seed: int) -> hivi.Fit:
    """A present family: a dense Gaussian grown along 32 directions of the curvature."""
    found = hivi.curvature(mean_field(0.4, seed), key=jax.random.key(seed), top=32)
    family = hivi.Hierarchical(hivi.FullRank(), hivi.Linearised(), start=found)
    return fit(lattice(0.4)[1], family, seed, 3000, 0.01)


def stationary(layers: int, seed: int) -> hivi.Fit:
    """The prior that commutes with the lattice's shifts."""
    shape = (SIZE, SIZE)
    family = hivi.Hierarchical(Stationary(shape, layers), StationaryInverse(layers), start=mean_field(0.4, seed))
    return fit(lattice(0.4)[1], family, seed, 4000, 0.02)


def two_modes(seed: int) -> hivi.Fit:
    """A mixture prior, whose two components start at the mean-field optimum and at its mirror image.

    From random starts both components often fall into the same mode, or stop at walls between domains.
    """
    target, single = lattice(1.0)[1], mean_field(1.0, seed)
    blank = fit(target, hivi.Hierarchical(hivi.Mixture(2)), seed, 1, 0.05, samples=4)
    ordered = single.proposal.parameters()["z"].reshape(-1)

    def place(lam: Any) -> Any:
        return lam.at[..., 0].set(jnp.stack([ordered, -ordered])).at[..., 1].set(jnp.log(0.1))

    planted = eqx.tree_at(lambda p: p.prior.lam["lam"], blank.proposal, replace_fn=place)
    return fit(target, None, seed, 900, 0.02, samples=4, start=dataclasses.replace(blank, proposal=planted))


DISORDERED: dict[str, Callable[[int], hivi.Fit]] = {
    "mean-field": lambda seed: mean_field(0.4, seed),
    "HVM, FullRank + Linearised": full_rank,
    "HVM, stationary Gaussian": lambda seed: stationary(0, seed),
    "HVM, stationary flow of 2 layers": lambda seed: stationary(2, seed),
}
ORDERED: dict[str, Callable[[int], hivi.Fit]] = {
    "mean-field": lambda seed: mean_field(1.0, seed),
    "HVM, Mixture(2)": two_modes,
}
GLASS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mean-field, best of 20": (hivi.MeanField(), {"steps": 1000, "rate": 0.05}),
    "HVM, Mixture(16)": (hivi.Hierarchical(hivi.Mixture(16)), {"steps": 2000, "rate": 0.05, "samples": 2}),
    "HVM, Mixture(32)": (hivi.Hierarchical(hivi.Mixture(32)), {"steps": 2000, "rate": 0.05, "samples": 1}),
}


def glass(label: str, seed: int) -> Row:
    """Exact KL of one family; for mean-field that of the restart with the best KL."""
    problem = sherrington_kirkpatrick.glass()
    target, (family, options) = problem.target(), GLASS[label]
    restarts = RESTARTS if label.startswith("mean-field") else 1
    rows = []
    for number in range(restarts):
        found = fit(target, family, 1000 * seed + number, **options)
        rows.append(figures(problem, found, jax.random.key(seed)) | {"seconds": found.seconds})
    best = min(rows, key=lambda row: row["kl"])
    return best | {"seconds": sum(r["seconds"] for r in rows), "bound over N": best["bound"] / 20}


def run(part: str, label: str, seed: int, path: Path) -> None:
    """One row."""
    key = f"{part}|{label}|{seed}"
    if key in known(path):
        return
    began = time.monotonic()
    if part == "glass":
        row = glass(label, seed)
    else:
        beta, table = (0.4, DISORDERED) if part == "disordered" else (1.0, ORDERED)
        row = per_spin(beta, table[label](seed), seed)
    record(path, key, row | {"total seconds": time.monotonic() - began})


def main() -> None:
    """The command."""
    parts: dict[str, dict[str, Any]] = {"disordered": DISORDERED, "ordered": ORDERED, "glass": GLASS}
    parser = argparse.ArgumentParser(description="Ising 16x16 and the spin glass: what reaches which figure.")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="all if none is given")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    path = RESULTS / "discrete_targets.json"
    for seed in range(options.seeds):
        for part in options.parts or parts:
            for label in parts[part]:
                run(part, label, seed, path)
    table(parts, path)


def table(parts: dict[str, dict[str, Any]], path: Path) -> None:
    """Medians over the seeds that there are."""
    found, rows = known(path), []
    names = {"disordered": "Ising 16x16, beta 0.4", "ordered": "Ising 16x16, beta 1.0", "glass": "SK, n = 20"}
    for part, labels in parts.items():
        for label in labels:
            runs = [row for key, row in found.items() if key.startswith(f"{part}|{label}|")]
            if not runs:
                continue
            middle = {k: statistics.median(r[k] for r in runs) for k in runs[-1]}
            if part == "glass":
                cells = [f"{middle['bound']:.3f}", "-", f"{middle['gap']:.3f}", f"{middle['kl']:.3f}"]
            else:
                multi = f"{middle['multi']:.4f}" if part == "disordered" else "-"
                cells = [f"{middle['bound']:.5f}", multi, f"{middle['gap']:.3f}", "-"]
            rows.append([names[part], label, *cells, f"{middle['seconds']:.0f}", str(len(runs))])
    exact = "; ".join(f"beta {b}: {ising.kaufman(SIZE, b) / SIZE**2 / b:.5f}" for b in (0.4, 1.0))
    notes = [
        f"Medians over seeds. Ising: bounds over N beta (exact {exact}; the gap in nats); multi: the bound of {MULTI} draws,",
        "at the same fit. SK: bounds in nats; KL(q‖p) over the table of 2^20; mean-field is the best of 20 restarts by KL, whose",
        "time is that of all. The stationary prior and its auxiliary: `benchmarks/discrete/stationary.py`.",
    ]
    head = ("target", "family", "bound", "multi", "gap", "KL(q‖p)", "seconds", "seeds")
    write("discrete_targets", "Discrete targets", "python benchmarks/discrete/targets.py", head, rows, notes)


if __name__ == "__main__":
    main()
