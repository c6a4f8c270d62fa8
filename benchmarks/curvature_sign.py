"""Does the curvature test's verdict agree with what a converged hierarchy gains? On the discrete suite and on posteriors.

    HIVI_DATA=FOLDER python benchmarks/curvature_sign.py [TARGET ...] [--seeds N]

For each target: a mean-field fit; `hivi.curvature` there; then two hierarchies that start at it, one over a full-rank Gaussian
along the directions that were found, one over a flow. The gain is the better bound less mean-field's (12,000 steps at most each,
8,192 draws). They agree where both are above zero or neither: a gain counts above 0.02 nats and three standard errors. Where the
prediction is above zero, but below that size, and no gain is seen, the run cannot tell: "too small". Adds to
`results/curvature_sign.json` as it goes; without HIVI_DATA the posteriors are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "discrete"), str(HERE)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common import RESULTS, write  # noqa: E402
from suite import PROBLEMS  # noqa: E402

import hivi  # noqa: E402

STORE = RESULTS / "curvature_sign.json"
STEPS, DRAWS, LEAST = 12_000, 8192, 0.02
DISCRETE = [
    "bernoulli-paper", "bernoulli-2", "bernoulli-4", "bernoulli-8", "ising-chain-12", "ising-4x4-0.4", "sk-20", "sbn-layers",
    "poisson-mixture-2", "poisson-mixture-3", "change-point", "gmm-fixed",
]  # fmt: skip


def posteriors() -> dict[str, Any]:
    """Name -> NumPyro model of posteriordb."""
    if "HIVI_DATA" not in os.environ:
        return {}
    folder = Path(os.environ["HIVI_DATA"]) / "posteriordb"
    sys.path.insert(0, os.fspath(folder))
    import models

    def bound(name: str) -> Any:
        data = json.loads((folder / name / "data.json").read_text())
        return lambda: models.MODELS[name](data)

    return {name.split("-")[0]: bound(name) for name in models.MODELS}


def run(target: hivi.Target, seed: int) -> dict[str, Any]:
    """The verdict and the gain on one target."""
    k_fit, k_test, k_grow, k_bound = jax.random.split(jax.random.key(seed), 4)
    fit = hivi.fit(target, hivi.MeanField(), key=k_fit, steps=STEPS, progress=False)
    found = hivi.curvature(fit, key=k_test)
    before, best = fit.elbo(k_bound, DRAWS), None
    for prior in (hivi.FullRank(), hivi.Flow()):
        family = hivi.Hierarchical(prior=prior, start=found)
        try:
            grown = hivi.fit(target, family, key=k_grow, steps=STEPS, progress=False).elbo(k_bound, DRAWS)
        except hivi.HiviError as error:
            print(error)
            continue
        best = grown if best is None or grown.mean > best.mean else best
    assert best is not None
    return {
        "predicted": found.gain_to_expect.mean, "eigenvalue": float(np.ravel(found.eigenvalues)[0]), "warning": found.warning,
        "gain": best.mean - before.mean, "stderr": float(np.hypot(best.stderr, before.stderr)), "couples": found.couples[0],
    }  # fmt: skip


def verdict(row: dict[str, Any]) -> str:
    """Whether the prediction has the sign of the gain; "too small" where both may well be positive, too little to be seen."""
    least = max(LEAST, 3 * row["stderr"])
    if (row["predicted"] > 0) == (row["gain"] > least):
        return "yes"
    return "too small" if 0 < row["predicted"] < least and abs(row["gain"]) <= least else "no"


def table() -> None:
    """`results/curvature_sign.md` from what is stored."""
    known = json.loads(STORE.read_text())
    rows = [
        [name, seed, f"{r['eigenvalue']:+.3g}", f"{r['predicted']:.3g}", f"{r['gain']:+.3f} ± {r['stderr']:.3f}",
         verdict(r), r["couples"].replace("|", "\\|"), "not level" if r["warning"] else ""]
        for name, seed, r in ((*key.split("|"), row) for key, row in known.items())
    ]  # fmt: skip
    said = [verdict(r) for r in known.values()]
    yes, small = said.count("yes"), said.count("too small")
    write(
        "curvature_sign",
        "What the curvature test predicts, and what a hierarchy gains",
        "HIVI_DATA=FOLDER python benchmarks/curvature_sign.py",
        ["target", "seed", "top eigenvalue", "predicted gain", "gain reached", "agree", "direction", "mean-field"],
        rows,
        [
            f"{yes} of {len(known)} agree, {small} are too small to tell. Nats. Predicted: of a small mixture, not of the best "
            "hierarchy; its sign counts."
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    models = posteriors()
    jax.config.update("jax_enable_x64", True)
    for seed in range(given.seeds):
        for name in [*DISCRETE, *models]:
            if given.targets and name not in given.targets:
                continue
            stored = json.loads(STORE.read_text()) if STORE.exists() else {}
            if f"{name}|{seed}" in stored:
                continue
            target = PROBLEMS[name]().target() if name in PROBLEMS else hivi.from_numpyro(models[name])
            STORE.write_text(json.dumps({**stored, f"{name}|{seed}": run(target, seed)}, indent=1) + "\n")
            table()
            jax.clear_caches()  # each program keeps mappings of memory, of which Linux allows 65,530
            gc.collect()
