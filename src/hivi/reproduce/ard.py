"""Linear regression with automatic relevance determination: the dependence between weights and their scales."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.diagnostics import summary
from numpyro.infer import MCMC, NUTS
from scipy.stats import spearmanr
from sklearn.datasets import load_diabetes

from hivi import plots
from hivi._families.base import AbstractFamily
from hivi._families.flow import Flow
from hivi._families.full_rank import FullRank
from hivi._families.hierarchical import Hierarchical
from hivi._families.mean_field import MeanField
from hivi._fit.loop import fit
from hivi.interop.numpyro import from_numpyro
from hivi.reproduce.report import Column, Report, Table, save_figure

DRAWS = 20_000
"""Draws of each q for its means and standard deviations."""
COLUMNS = (
    Column("method", "method"),
    Column("bound", "bound (nats)", ".3f"),
    Column("mean_error", "error of means (sd)", ".3f"),
    Column("log_sd_ratio", "|log sd ratio|", ".3f"),
    Column("weights", "of w", ".3f"),
    Column("scales", "of log α", ".3f"),
    Column("dependence", "|w| ~ log α", ".3f"),
    Column("seconds", "seconds", ".1f"),
)

Draws = Float[np.ndarray, "samples coordinates"]
"""Draws of (w, log alpha, log sigma)."""


class Result(NamedTuple):
    """One method: its row, and its draws."""

    row: dict[str, object]
    draws: np.ndarray


def methods() -> Mapping[str, Mapping[str, AbstractFamily]]:
    """Name -> family; all but mean-field treat w and alpha jointly."""

    def joint(family: AbstractFamily) -> Mapping[str, AbstractFamily]:
        return {"w|alpha": family, "sigma": MeanField()}

    return {
        "mean-field": {".*": MeanField()},
        "full-rank": joint(FullRank()),
        "HVM, flow": joint(Hierarchical(prior=Flow(layers=2, kind="maf"))),
        "HVM, full-rank": joint(Hierarchical(prior=FullRank())),
    }


def model(x: Float[Array, "n d"], y: Float[Array, " n"]) -> None:
    """Regression y ~ N(x w, sigma^2) with w_j ~ N(0, alpha_j); every weight has a variance alpha_j of its own.

    alpha_j ~ InverseGamma(0.1, 0.1), and sigma ~ HalfNormal(1), which is wide: y has variance 1.
    """
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("features", x.shape[1]):
        alpha = numpyro.sample("alpha", dist.InverseGamma(0.1, 0.1))
        w = numpyro.sample("w", dist.Normal(0.0, jnp.sqrt(alpha)))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def data() -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """The diabetes data of scikit-learn: 442 patients, 10 features; all columns with mean 0 and variance 1."""
    x, y = load_diabetes(return_X_y=True)
    return jnp.asarray((x - x.mean(0)) / x.std(0)), jnp.asarray((y - y.mean()) / y.std())


def run(out: str | Path, *, seed: int = 0, steps: int = 10_000, draws: int = 2_500, progress: bool = False) -> Report:
    """Fit every family, run NUTS, and compare them in (w, log alpha, log sigma), where all moments exist.

    Args:
        out: folder of the figures, made if there is none.
        seed: of the random keys.
        steps: gradient steps of every fit; all are taken.
        draws: NUTS draws in each of four chains, after 1,000 of warm-up.
        progress: show progress bars.

    Returns:
        A table of bounds, errors against NUTS, and the dependence that each family keeps; figure `ard`.
    """
    began = time.monotonic()
    x, y = data()
    reference, row, note = _nuts(x, y, seed, draws)
    found = [_run_one(name, reference, x, y, seed, steps, progress) for name in methods()]
    title = "automatic relevance determination on the diabetes data, against NUTS"
    table = Table(title, COLUMNS, (row, *(r.row for r in found)))
    figures = _figure(reference, found, Path(out))
    return Report("ard", (table,), (*_notes(), note), tuple(figures), time.monotonic() - began)


def coordinates(draws: Mapping[str, Any]) -> Draws:
    """Draws of the model's sites as columns w, log alpha, log sigma."""
    w, alpha, sigma = (np.asarray(draws[name], float) for name in ("w", "alpha", "sigma"))
    return np.concatenate([w, np.log(alpha), np.log(sigma)[:, None]], 1)


def dependence(draws: Draws) -> float:
    """Spearman's rank correlation of |w_j| with log alpha_j, averaged over j."""
    d = draws.shape[1] // 2
    return float(np.mean([spearmanr(np.abs(draws[:, j]), draws[:, d + j]).statistic for j in range(d)]))


def _nuts(x: Array, y: Array, seed: int, draws: int) -> tuple[Draws, dict[str, object], str]:
    began = time.monotonic()
    sampler = MCMC(
        NUTS(model, target_accept_prob=0.95),
        num_warmup=1000, num_samples=draws, num_chains=4, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    sampler.run(jax.random.key(seed), x, y)
    chains = {n: v if n == "w" else jnp.log(v) for n, v in sampler.get_samples(group_by_chain=True).items()}
    table = summary(chains)
    effective = min(float(np.min(v["n_eff"])) for v in table.values())
    mixing = max(float(np.max(v["r_hat"])) for v in table.values())
    divergent = int(sampler.get_extra_fields()["diverging"].sum())
    found = coordinates(sampler.get_samples())
    row: dict[str, object] = {
        "method": "NUTS", "bound": None, "mean_error": 0.0, "log_sd_ratio": 0.0, "weights": 0.0, "scales": 0.0,
        "dependence": dependence(found), "seconds": time.monotonic() - began,
    }  # fmt: skip
    note = f"NUTS: smallest effective sample {effective:.0f}, largest R-hat {mixing:.4f}, {divergent} divergences."
    return found, row, note


def _run_one(name: str, reference: Draws, x: Array, y: Array, seed: int, steps: int, progress: bool) -> Result:
    k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
    target = from_numpyro(model, x, y)
    done = fit(target, methods()[name], key=k1, steps=steps, tolerance=None, progress=progress)
    draws = coordinates(done.sample(k2, DRAWS))
    ratio = np.abs(np.log(draws.std(0) / reference.std(0)))
    d = x.shape[1]
    row: dict[str, object] = {
        "method": name,
        "bound": done.elbo(k3, samples=16_384),
        "mean_error": float(np.mean(np.abs(draws.mean(0) - reference.mean(0)) / reference.std(0))),
        "log_sd_ratio": float(ratio.mean()),
        "weights": float(ratio[:d].mean()),
        "scales": float(ratio[d : 2 * d].mean()),
        "dependence": dependence(draws),
        "seconds": done.seconds,
    }
    return Result(row, draws)


def _notes() -> tuple[str, ...]:
    return (
        "Means and standard deviations are those of w, log α and log σ (α itself has no posterior mean): errors of "
        "means in units of NUTS's standard deviation, and |log(sd of q / sd of NUTS)|, averaged over all 21, then over "
        "w and over log α.",
        "|w| ~ log α: Spearman's correlation of |w_j| with log α_j, averaged over j; mean-field has none.",
    )


def _figure(reference: Draws, found: list[Result], out: Path) -> list[Path]:
    """Draws of the most uncertain weight with the log of its variance, for every method."""
    d = reference.shape[1] // 2
    j = int(np.argmax(reference[:, :d].std(0)))
    shown = {"NUTS": reference} | {str(r.row["method"]): r.draws for r in found}
    figure, axes = plots.panels(len(shown), width=2.6, height=2.7)
    low, high = np.percentile(reference[:, [j, d + j]], [0.1, 99.9], axis=0)
    for a, (name, draws) in zip(axes, shown.items(), strict=True):
        plots.scatter(a, draws[:, [j, d + j]], name)
        a.set_xlim(low[0], high[0])
        a.set_ylim(low[1], high[1])
        a.set_xlabel(f"w ({load_diabetes().feature_names[j]})")
        a.set_ylabel("log α")
    return save_figure(figure, out, "ard")
