"""The default on eight posteriors with reference draws, beside NumPyro's AutoIAFNormal in the same run.

    HIVI_DATA=FOLDER python benchmarks/posteriordb.py [POSTERIOR ...] [--seeds N] [--without-peer]

`FOLDER/posteriordb` holds the models, their data, reference draws and the scorer. hivi runs `hivi.fit(target, key=key)`:
no argument is set. The peer gets the same target in hivi's standardised coordinates (location and standard deviations of the
Gaussian that hivi starts at; without them it would have to find scales of several powers of ten), 3 flows, 16 particles, 20,000
steps. Mean-field and full-rank fits are scored, too, to see whether the warnings find what is wrong: a k-hat above 0.7, or a
bound that rises by more than 0.05 nats with 64 draws. Double precision. Adds to `results/posteriordb.json` as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import optax  # noqa: E402
from common import RESULTS, write  # noqa: E402
from numpyro.infer import SVI, Predictive, Trace_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoIAFNormal  # noqa: E402
from numpyro.infer.initialization import init_to_value  # noqa: E402

import hivi  # noqa: E402
from hivi._families.base import Layout  # noqa: E402
from hivi._fit.gaussian_start import best_gaussian  # noqa: E402
from hivi._marginal import marginal_khat  # noqa: E402

STORE = RESULTS / "posteriordb.json"
DRAWS, EVALUATIONS = 10_000, 4096
PEER_STEPS, PARTICLES, RATE = 20_000, 16, 2e-3
OTHERS = {"mean-field": hivi.MeanField(), "full-rank": hivi.FullRank()}
TIGHTER = hivi.ImportanceWeighted(outer=64)


def modules() -> tuple[Any, Any, Path]:
    """The models, the scorer, and their folder."""
    folder = Path(os.environ["HIVI_DATA"]) / "posteriordb"
    sys.path.insert(0, os.fspath(folder))
    import models
    import score

    return models, score, folder


def scored(models: Any, score: Any, model: Any, reference: Any, draws: Any, seed: int) -> dict[str, float]:
    """Errors of draws against the reference, deterministic sites included."""
    more = Predictive(model, posterior_samples=draws, batch_ndims=1)(jax.random.key(seed))
    names = [k for k in reference if not k.startswith("__")]
    every = {**{k: v for k, v in more.items() if np.shape(v)[:1] == (DRAWS,)}, **draws}
    found = score.score(models.to_stan(every, names), reference)
    return {k: found[k] for k in ("mean_max", "logsd_max", "corr_max", "sw2")}


def ours(model: Any, family: Any, key: Any) -> tuple[dict[str, Any], hivi.Fit]:
    """One fit with hivi, its bounds and its warnings."""
    began = time.perf_counter()
    fit = hivi.fit(hivi.from_numpyro(model), family, key=key, progress=False)
    seconds = time.perf_counter() - began
    bound = fit.elbo(jax.random.key(1), EVALUATIONS)
    tight = fit.elbo(jax.random.key(2), 256, bound=TIGHTER)
    log_z = fit.elbo(jax.random.key(3), 8, bound=hivi.ImportanceWeighted(outer=EVALUATIONS))
    row = {"steps": len(fit.history["step"]), "seconds": seconds, "elbo": bound.mean, "tighter": tight.mean}
    khat = marginal_khat(fit, key=jax.random.key(4), samples=EVALUATIONS)
    return {**row, "log_z": log_z.mean, "khat": khat.value, "converged": fit.converged}, fit


def peer(model: Any, key: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """NumPyro's AutoIAFNormal: seconds (compilation included), bound, draws in the model's space."""
    target = hivi.from_numpyro(model)
    location, factor = best_gaussian(target, target.sites, key)
    scale, layout = jnp.sqrt(jnp.sum(factor**2, 1)), Layout(target.sites)
    dim = len(location)

    def standard() -> None:
        u = numpyro.sample(
            "u", numpyro.distributions.ImproperUniform(numpyro.distributions.constraints.real_vector, (), (dim,))
        )
        numpyro.factor("p", target.log_joint(layout.unflatten(location + scale * u)) + jnp.sum(jnp.log(scale)))

    began = time.perf_counter()
    guide = AutoIAFNormal(
        standard, num_flows=3, hidden_dims=[max(32, 2 * dim)] * 2, skip_connections=True,
        init_loc_fn=init_to_value(values={"u": jnp.zeros(dim)}),
    )  # fmt: skip
    rate = optax.cosine_decay_schedule(RATE, PEER_STEPS, 0.005)
    optimizer = numpyro.optim.optax_to_numpyro(optax.chain(optax.clip_by_global_norm(50.0), optax.adam(rate)))
    svi = SVI(standard, guide, optimizer, Trace_ELBO(num_particles=PARTICLES))
    result = svi.run(key, PEER_STEPS, progress_bar=False, stable_update=True)
    jax.block_until_ready(result.params)
    seconds = time.perf_counter() - began
    loss = Trace_ELBO(num_particles=EVALUATIONS).loss(jax.random.key(1), result.params, standard, guide)
    u = guide.sample_posterior(jax.random.key(2), result.params, sample_shape=(DRAWS,))["u"]
    draws = jax.vmap(lambda v: target.constrain(layout.unflatten(location + scale * v)))(u)
    return {"seconds": seconds, "elbo": -float(loss), "steps": PEER_STEPS}, draws


def known() -> dict[str, Any]:
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def record(name: str, row: dict[str, Any]) -> None:
    STORE.write_text(json.dumps({**known(), name: row}, indent=1, sort_keys=True) + "\n")


def run(posterior: str, seed: int, with_peer: bool) -> None:
    """All methods on one posterior with one seed; what is stored already is not run again."""
    models, score, folder = modules()
    data = json.loads((folder / posterior / "data.json").read_text())
    reference = dict(np.load(folder / posterior / "reference.npz"))

    def model() -> None:
        models.MODELS[posterior](data)

    methods: dict[str, Any] = {"hivi": None, **OTHERS}
    for method, family in methods.items():
        if (name := f"{posterior}|{method}|{seed}") not in known():
            row, fit = ours(model, family, jax.random.key(seed))
            draws = fit.sample(jax.random.key(5), DRAWS)
            record(name, {**row, **scored(models, score, model, reference, draws, 6)})
    if with_peer and (name := f"{posterior}|AutoIAFNormal|{seed}") not in known():
        found, draws = peer(model, jax.random.key(seed))
        record(name, {**found, **scored(models, score, model, reference, draws, 6)})


def warned(row: dict[str, Any], rise: float = 0.05) -> bool:
    """Whether `compare` says in words that something is missing: k-hat, or a tighter bound that is higher."""
    return row["khat"] > 0.7 or row["tighter"] - row["elbo"] > rise


def table() -> None:
    """`results/posteriordb.md` from what is stored: medians over seeds."""
    rows, groups = [], {}
    for name, row in known().items():
        posterior, method, _ = name.split("|")
        groups.setdefault((posterior, method), []).append(row)
    best = {
        p: statistics.median(max(r["log_z"] for r in v) for _ in [0]) for (p, m), v in groups.items() if m == "hivi"
    }

    def middle(found: list[Any], key: str, form: str = ".3f") -> str:
        values = [r[key] for r in found if key in r]
        return format(statistics.median(values), form) if values else "-"

    for (posterior, method), found in sorted(groups.items()):
        gap = best.get(posterior, float("nan")) - statistics.median(r["elbo"] for r in found)
        said = "-" if method == "AutoIAFNormal" else f"{sum(map(warned, found))} of {len(found)}"
        rows.append([
            posterior.split("-")[0], method, middle(found, "steps", ".0f"), middle(found, "seconds", ".0f"), f"{gap:.3f}",
            middle(found, "khat", ".2f"), middle(found, "mean_max"), middle(found, "logsd_max"), middle(found, "corr_max"),
            middle(found, "sw2"), said, str(len(found)),
        ])  # fmt: skip
    silent, silent_at = (
        [n for n, r in known().items() if "khat" in r and r["logsd_max"] > 0.3 and not warned(r, rise)]
        for rise in (0.05, 0.3)
    )
    wrong = [n for n, r in known().items() if "khat" in r and r["logsd_max"] > 0.3]
    write(
        "posteriordb",
        "Posteriors with reference draws",
        "HIVI_DATA=FOLDER python benchmarks/posteriordb.py --seeds 3",
        ["posterior", "method", "steps", "seconds", "gap, nats", "k-hat", "mean error, sd", "log-sd error", "correlation error",
         "sliced W2", "warned", "seeds"],
        rows,
        [
            "hivi: `hivi.fit(target, key=key)`, no other argument. gap: to the best estimate of log Z with 4096 draws. Errors:",
            "the largest over the parameters, against 10,000 reference draws; sliced Wasserstein-2 over 2,000 (two halves of the",
            "reference draws are 0.05 to 0.08 apart). Seconds include compilation.",
            f"Fits with a log-sd error above 0.3: {len(wrong)}; of these, without a warning: {len(silent)} {silent or ''}.",
            "Warned, of how many seeds: k-hat above 0.7, or a bound that rises by more than 0.05 nats with 64 draws, as "
            f"`hivi compare` says; with 0.3 nats instead, {len(silent_at)} would go without: {', '.join(silent_at) or 'none'}.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("posteriors", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--without-peer", action="store_true")
    given = parser.parse_args()
    names = list(modules()[0].MODELS)
    for seed in range(given.seeds):
        for posterior in (n for n in names if not given.posteriors or any(n.startswith(g) for g in given.posteriors)):
            run(posterior, seed, not given.without_peer)
            table()
