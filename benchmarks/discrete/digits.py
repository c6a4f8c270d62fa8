"""A sigmoid belief network with 50 units on binarised digits: held-out bounds of mean-field and of a hierarchy.

    python benchmarks/discrete/digits.py [--seeds N]

Weights are learned on 1437 digits (minibatches, mean-field q for everything) and then held at their posterior means. On the
360 held-out digits mean-field gets a fit that runs to its end; then mean-field goes on, and a hierarchy grown from
that fit starts, with the same wall time for both. The bound of each held-out digit, paired.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from common import RESULTS, write  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from suite import known, record  # noqa: E402

import hivi  # noqa: E402

UNITS, BATCH, TRAINING, LOCAL = 50, 240, 6000, 1500
PATH = RESULTS / "discrete_digits.json"


def digits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Binary images (rows, 64): 1437 to train on, 360 held out."""
    images = (load_digits().data > 7.5).astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    return images[order[360:]], images[order[:360]]


def network(x: Any, weights: dict[str, Any] | None = None) -> None:
    """One layer of units above the pixels; weights are latent, or given."""
    if weights is None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([UNITS, x.shape[1]]).to_event(2))
        b = numpyro.sample("b", dist.Normal(0.0, 3.0).expand([x.shape[1]]).to_event(1))
        a = numpyro.sample("a", dist.Normal(0.0, 3.0).expand([UNITS]).to_event(1))
    else:
        w, b, a = weights["w"], weights["b"], weights["a"]
    with numpyro.plate("digits", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=a).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=b + z @ w).to_event(1), obs=x)


def learned(seed: int) -> dict[str, np.ndarray]:
    """Posterior means of the weights."""
    train, _ = digits()
    target = hivi.from_numpyro(network, train, subsample={"digits": BATCH})
    fit = hivi.fit(
        target, hivi.MeanField(), key=jax.random.key(seed), steps=TRAINING, samples=2, learning_rate=0.02,
        tolerance=None, progress=False,
    )  # fmt: skip
    draws = fit.sample(jax.random.key(seed + 1), 200)
    return {n: np.asarray(draws[n]).mean(0) for n in ("w", "b", "a")}


def row(seed: int) -> dict[str, float]:
    """The figures of one seed; bounds in nats per digit."""
    weights = learned(seed)
    _, test = digits()
    target = hivi.from_numpyro(network, test, weights, subsample={"digits": len(test)})
    options: dict[str, Any] = {"samples": 4, "progress": False, "tolerance": None, "learning_rate": 0.03}
    first = hivi.fit(target, hivi.MeanField(), key=jax.random.key(seed), steps=LOCAL, **options)
    began = time.perf_counter()
    family = hivi.Hierarchical(prior=hivi.FullRank(), auxiliary=hivi.Linearised(), start=first)
    grown = hivi.fit(target, family, key=jax.random.key(seed), steps=LOCAL, **options)
    seconds, spent, steps = time.perf_counter() - began, 0.0, LOCAL
    while spent < seconds:  # mean-field gets at least the same time
        steps *= 2
        began = time.perf_counter()
        flat = hivi.fit(target, hivi.MeanField(), key=jax.random.key(seed), start=first, steps=steps, **options)
        spent = time.perf_counter() - began
    bounds = [f.elbo(jax.random.key(99), samples=2048) for f in (first, flat, grown)]
    before, after, hvm = (b.mean / len(test) for b in bounds)
    error = float(np.hypot(bounds[1].stderr, bounds[2].stderr)) / len(test)
    return {
        "start": before, "mean-field": after, "HVM": hvm, "gain": hvm - after, "stderr": error,
        "seconds HVM": seconds, "seconds mean-field": spent,
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Held-out digits: mean-field and a hierarchy at equal wall time.")
    parser.add_argument("--seeds", type=int, default=5)
    for seed in range(parser.parse_args().seeds):
        if str(seed) not in known(PATH):
            record(PATH, str(seed), row(seed))
    found = list(known(PATH).values())
    names = ("start", "mean-field", "HVM", "gain", "stderr", "seconds HVM", "seconds mean-field")
    rows = [[k, *(f"{r[n]:.3f}" for n in names)] for k, r in known(PATH).items()]
    rows.append(["median", *(f"{statistics.median(r[n] for r in found):.3f}" for n in names)])
    notes = (
        "Bounds in nats per held-out digit, at the same learned weights. Start: the mean-field fit from which both go on. "
        "HVM: full-rank Gaussian prior over each digit's 50 logits, linearised auxiliary. Standard error: of the gain, by draws."
    )
    write(
        "discrete_digits", "A sigmoid belief network on held-out digits", "python benchmarks/discrete/digits.py",
        ("seed", *names), rows, textwrap.wrap(notes, 130),
    )  # fmt: skip


if __name__ == "__main__":
    main()
