"""hivi beside NumPyro's TraceGraph_ELBO on the suite, in one run and at equal wall time.

    python benchmarks/discrete/peers.py [PROBLEM ...] [--seeds N]

NumPyro gets what it has for discrete latents: a mean-field guide with the model's own plates, written generically from a trace
of the model, 16 particles, Adam at the same rate. hivi fits `Mixture(16, dispersed=True)`, the same for every problem: its
default for such models with twice the components. NumPyro then goes on until it has had at least hivi's wall time,
compilation included on both sides. Both q are measured by the same code: the bound, and KL(q||p) where there is a table.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from base import Problem  # noqa: E402
from common import RESULTS, write  # noqa: E402
from measure import figures  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.infer import SVI, TraceGraph_ELBO  # noqa: E402
from suite import PROBLEMS, known, record  # noqa: E402

import hivi  # noqa: E402
from hivi._families.mean_field import MeanFieldProposal  # noqa: E402

STEPS, SAMPLES, RATE, CHUNK = 3000, 16, 0.02, 500
PATH = RESULTS / "discrete_peers.json"
FAMILY = hivi.Mixture(16, dispersed=True)


def guide_of(model: Any) -> Any:
    """A mean-field guide of a model: every site in its own plates, real ones Normal in free coordinates."""
    with handlers.seed(rng_seed=0):
        trace = handlers.trace(model).get_trace()
    sites = [s for s in trace.values() if s["type"] == "sample" and not s["is_observed"]]

    def guide() -> None:
        for s in sites:
            shape, fn = jnp.shape(s["value"]), s["fn"]
            support = fn.support
            while isinstance(support, dist.constraints.independent):
                support = support.base_constraint
            if support is dist.constraints.boolean:
                q = dist.Bernoulli(logits=numpyro.param(f"{s['name']} lam", jnp.zeros(shape)))
            elif support is dist.constraints.nonnegative_integer:
                q = dist.Poisson(jnp.exp(numpyro.param(f"{s['name']} lam", jnp.zeros(shape))))
            elif not support.is_discrete:
                lam = numpyro.param(f"{s['name']} lam", jnp.zeros((*shape, 2)))
                normal = dist.Normal(lam[..., 0], jnp.exp(lam[..., 1]))
                q = dist.TransformedDistribution(normal, dist.biject_to(support))
            else:
                count = int(support.upper_bound) + 1
                q = dist.Categorical(logits=numpyro.param(f"{s['name']} lam", jnp.zeros((*shape, count))))
            with contextlib.ExitStack() as stack:
                for frame in s["cond_indep_stack"]:
                    stack.enter_context(numpyro.plate(frame.name, frame.size, dim=frame.dim))
                numpyro.sample(s["name"], q.to_event(len(fn.event_shape)))

    return guide


def numpyro_for(problem: Problem, seconds: float, seed: int) -> tuple[dict[str, Any], float, int]:
    """The guide's parameters after at least this wall time; seconds and steps taken."""
    began = time.perf_counter()
    svi = SVI(problem.model, guide_of(problem.model), numpyro.optim.Adam(RATE), TraceGraph_ELBO(num_particles=SAMPLES))
    state, steps = svi.init(jax.random.key(seed)), 0

    @jax.jit
    def chunk(start: Any) -> Any:  # compiled once; `svi.run` would compile at every call
        return jax.lax.fori_loop(0, CHUNK, lambda _, s: svi.update(s)[0], start)

    while steps < STEPS or time.perf_counter() - began < seconds:
        state, steps = jax.block_until_ready(chunk(state)), steps + CHUNK
    return svi.get_params(state), time.perf_counter() - began, steps


def row(name: str, seed: int) -> dict[str, float]:
    """Both on one problem."""
    problem = PROBLEMS[name]()
    target, key = problem.target(), jax.random.key(seed)
    options: dict[str, Any] = {"samples": SAMPLES, "learning_rate": RATE, "progress": False, "tolerance": None}
    began = time.perf_counter()
    fit = hivi.fit(target, FAMILY, key=key, steps=STEPS, **options)
    seconds = time.perf_counter() - began
    params, spent, steps = numpyro_for(problem, seconds, seed)
    flat = hivi.fit(target, hivi.MeanField(), key=key, steps=1, **options)
    lam = {}
    for s in target.sites:
        value = jnp.asarray(params[f"{s.name} lam"])
        shape = flat.proposal.parameters()[s.name].shape
        if s.values.kind != "real" and value.size > math.prod(shape):  # two values: one logit says it all
            value = value[..., 1] - value[..., 0]
        lam[s.name] = value.reshape(shape)
    theirs = dataclasses.replace(flat, proposal=MeanFieldProposal(flat.proposal.sites, lam))
    ours, other = (figures(problem, f, jax.random.key(9)) for f in (fit, theirs))
    known_kl = {} if problem.table is None else {"hivi KL": ours["kl"], "NumPyro KL": other["kl"]}
    return {
        "hivi": ours["bound"], "hivi stderr": ours["stderr"], "hivi seconds": seconds, "log Z": problem.log_z,
        "NumPyro": other["bound"], "NumPyro stderr": other["stderr"], "NumPyro seconds": spent,
        "NumPyro steps": float(steps), **known_kl,
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="hivi beside NumPyro on the discrete suite.")
    parser.add_argument("problems", nargs="*", metavar="PROBLEM")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    for seed, name in itertools.product(range(options.seeds), options.problems or PROBLEMS):
        if f"{name}|{seed}" not in known(PATH):
            try:
                found = row(name, seed)
                jax.clear_caches()
            except ValueError as error:  # TraceGraph_ELBO cannot add up the costs of some models
                found = {"failed": str(error)}
            record(PATH, f"{name}|{seed}", found)
    rows = []
    for name in PROBLEMS:
        found = [v for k, v in known(PATH).items() if k.split("|")[0] == name and "failed" not in v]
        if found:
            m = {key: statistics.median(f[key] for f in found) for key in found[0]}
            rows.append([
                name, f"{m['log Z']:.4f}", f"{m['hivi']:.4f} ± {m['hivi stderr']:.4f}",
                f"{m['NumPyro']:.4f} ± {m['NumPyro stderr']:.4f}",
                *([f"{m['hivi KL']:.4f}", f"{m['NumPyro KL']:.4f}", f"{m['hivi KL'] / m['NumPyro KL']:.3f}"]
                  if "hivi KL" in m else ["-"] * 3),
                f"{m['NumPyro seconds'] / m['hivi seconds']:.2f}", str(len(found)),
            ])  # fmt: skip
    notes = (
        "Medians over seeds. hivi: `Mixture(16, dispersed=True)`, 3000 steps of 16 draws. NumPyro: mean-field guide in the "
        "model's plates, TraceGraph_ELBO of 16 particles, for at least the same wall time (compilation included) and at "
        "least 3000 steps. KL over the exact table, where there is one, the same code for both."
    )
    head = ("problem", "log Z", "hivi", "NumPyro", "hivi KL", "NumPyro KL", "ratio", "time, NumPyro/hivi", "seeds")
    write(
        "discrete_peers", "hivi and NumPyro's TraceGraph_ELBO on the discrete suite",
        "python benchmarks/discrete/peers.py", head, rows, textwrap.wrap(notes, 130),
    )  # fmt: skip


if __name__ == "__main__":
    main()
