"""What a first fit costs, from a fresh process to a fitted posterior: compiled as hivi chooses, and at XLA's usual setting.

Run `python benchmarks/first_fit.py`; it writes `benchmarks/results/first_fit.md`. Each fit runs in a process of its own,
without a compilation cache, the two settings in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import write

import hivi

REPEATS = 3
RNG = np.random.default_rng(0)


def three_switches() -> hivi.Target:
    """Three Bernoulli latents, one observation."""

    def model() -> None:
        z = numpyro.sample("z", dist.Bernoulli(0.3).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(z.sum(), 1.0), obs=1.0)

    return hivi.from_numpyro(model)


def eight_schools() -> hivi.Target:
    """Rubin's eight schools, centred."""
    y, sigma = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12]), jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model() -> None:
        mu, tau = numpyro.sample("mu", dist.Normal(0, 5)), numpyro.sample("tau", dist.HalfCauchy(5))
        with numpyro.plate("schools", 8):
            theta = numpyro.sample("theta", dist.Normal(mu, tau))
            numpyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return hivi.from_numpyro(model)


def logistic() -> hivi.Target:
    """Logistic regression, 5,000 rows, 25 columns."""
    x = jnp.asarray(RNG.normal(size=(5000, 25)), jnp.float32)
    y = jnp.asarray(RNG.integers(0, 2, 5000))

    def model() -> None:
        scale = numpyro.sample("scale", dist.HalfNormal(1))
        beta = numpyro.sample("beta", dist.Normal(0, scale).expand([25]).to_event(1))
        with numpyro.plate("rows", 5000):
            numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)

    return hivi.from_numpyro(model)


def ising() -> hivi.Target:
    """The Ising model on a periodic lattice of 16 x 16, beta = 0.4."""

    def log_joint(z: Any) -> dict[str, Any]:
        s = 2.0 * z["z"] - 1
        return {"right": 0.4 * s * jnp.roll(s, 1, 0), "down": 0.4 * s * jnp.roll(s, 1, 1)}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((16, 16), dist.constraints.boolean)})


def linear() -> hivi.Target:
    """A linear Gaussian model with 100 latents."""
    g = jnp.asarray(RNG.normal(size=(100, 100)) / 10, jnp.float32)

    def model() -> None:
        x = numpyro.sample("x", dist.Normal(0, 1).expand([100]).to_event(1))
        numpyro.sample("y", dist.Normal(g @ x, 0.1).to_event(1), obs=jnp.ones(100))

    return hivi.from_numpyro(model)


TARGETS: dict[str, Callable[[], hivi.Target]] = {
    fn.__name__: fn for fn in (three_switches, eight_schools, logistic, ising, linear)
}


def one(name: str) -> None:
    """Fit with all defaults; print CPU seconds, steps and the bound."""
    target = TARGETS[name]()
    began = time.process_time()
    fit = hivi.fit(target, key=jax.random.key(0), progress=False)
    spent = time.process_time() - began
    print(spent, len(fit.history["step"]), fit.elbo(jax.random.key(1)).mean)


def main() -> None:
    """All targets, the settings in turn."""
    rows = []
    for name, make in TARGETS.items():
        found: dict[str, list[list[float]]] = {"auto": [], "full": []}
        for _ in range(REPEATS):
            for mode, runs in found.items():
                done = subprocess.run(
                    [sys.executable, __file__, name], env=os.environ | {"HIVI_COMPILE": mode}, check=True,
                    capture_output=True, text=True,
                )  # fmt: skip
                runs.append([float(x) for x in done.stdout.split()])
        ours, usual = (statistics.median(r[0] for r in runs) for runs in found.values())
        last = [runs[-1] for runs in found.values()]
        rows.append((
            str(make.__doc__).rstrip("."), f"{ours:.1f}", f"{usual:.1f}", f"{ours / usual:.2f}",
            f"{last[0][1]:.0f} / {last[1][1]:.0f}", f"{last[0][2]:.2f} / {last[1][2]:.2f}",
        ))  # fmt: skip
        print(rows[-1], flush=True)
    write(
        "first_fit", "The first fit of a process", "python benchmarks/first_fit.py",
        ("target", "CPU s", "CPU s, XLA's usual setting", "ratio", "steps", "bound"), rows,
        [
            f"`hivi.fit(target, key=key)` with nothing else set; medians of {REPEATS} processes, compilation included,",
            "imports and the reading of the model excluded. Steps and bounds: as hivi compiles / at XLA's usual setting.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    one(sys.argv[1]) if len(sys.argv) > 1 else main()
