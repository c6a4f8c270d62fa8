"""A posterior over two counts with four modes: which family finds them, and with how much of their mass."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logsumexp
from jaxtyping import Float, Int
from numpyro.distributions import constraints
from scipy.stats import poisson

from hivi import plots
from hivi._bounds import AbstractBound, Elbo, ImportanceWeighted
from hivi._families.base import AbstractFamily
from hivi._families.flow import Flow
from hivi._families.hierarchical import Hierarchical
from hivi._families.mean_field import MeanField
from hivi._families.mixture import Mixture
from hivi._fit.loop import fit
from hivi._fit.result import Estimate
from hivi._space import Latent
from hivi._target.base import Target
from hivi._target.log_joint import from_log_joint
from hivi.diagnostics import exact_table, kl, marginal_table, total_variation
from hivi.reproduce.report import Column, Report, Table, save_figure

RATES = np.array([[1.0, 0.1, 5.0, 10.0], [1.0, 12.0, 0.01, 10.0]])
"""Rate of each count (rows) in each component (columns)."""
WEIGHTS = np.array([0.07, 0.09, 0.04, 0.7])
"""Weights of the components; they do not sum to one and are normalised."""
UPPER = 40
"""Counts from 0 to this are tabulated; what q puts beyond counts as error."""
COLUMNS = (
    Column("method", "method"),
    Column("bound", "bound (nats)", ".4f"),
    Column("kl", "exact KL(q||p)", ".4f"),
    Column("total_variation", "total variation", ".4f"),
    Column("modes", "mass of the modes", ".3f"),
    Column("worst", "worst share", ".2f"),
    Column("seconds", "seconds", ".1f"),
)


class Result(NamedTuple):
    """One method: its row, and its table of q."""

    row: dict[str, object]
    table: np.ndarray


def methods() -> Mapping[str, tuple[AbstractFamily, AbstractBound]]:
    """Name -> family and bound. None of them knows where the modes are: all start near a rate of one."""
    flow = Hierarchical(prior=Flow(layers=8))
    return {
        "mean-field": (MeanField(), Elbo()),
        "HVM, flow": (flow, Elbo()),
        "HVM, flow, M=8": (flow, ImportanceWeighted(outer=8)),
        "HVM, mixture of 4": (Hierarchical(prior=Mixture(components=4)), Elbo()),
        "HVM, mixture of 8": (Hierarchical(prior=Mixture(components=8)), Elbo()),
    }


def target() -> Target:
    """p(z) = sum_k pi_k Poisson(z1; M_1k) Poisson(z2; M_2k), with log p(x) = 0."""
    rates, log_weights = jnp.asarray(RATES), jnp.log(jnp.asarray(WEIGHTS / WEIGHTS.sum()))

    def log_joint(z: dict[str, jax.Array]) -> jax.Array:
        counts = z["z"][:, None].astype(rates.dtype)
        return logsumexp(log_weights + jnp.sum(counts * jnp.log(rates) - rates - gammaln(counts + 1), 0))

    return from_log_joint(log_joint, {"z": Latent(shape=(2,), support=constraints.nonnegative_integer)})


def regions(upper: int = UPPER) -> Int[np.ndarray, "n n"]:
    """The region of each mode: every (z1, z2) belongs to the component with the largest share of p there."""
    grid = np.arange(upper + 1)
    parts = [
        np.log(w) + np.add.outer(poisson.logpmf(grid, a), poisson.logpmf(grid, b))
        for w, a, b in zip(WEIGHTS, *RATES, strict=True)
    ]
    return np.argmax(parts, axis=0)


def mode_masses(table: Float[np.ndarray, "n n"]) -> list[float]:
    """Mass of a table in the region of each mode."""
    region = regions(table.shape[0] - 1)
    return [float(table[region == k].sum()) for k in range(len(WEIGHTS))]


def run(out: str | Path, *, seed: int = 0, steps: int = 10_000, progress: bool = False) -> Report:
    """Fit every method, and compare with the exact table of p over 0..40 x 0..40.

    Args:
        out: folder of the figures, made if there is none.
        seed: of the random keys.
        steps: gradient steps of every fit; all are taken.
        progress: show progress bars.

    Returns:
        A table of bounds, total variation, and mass of the modes; figure `mixture_poisson`.
    """
    began = time.monotonic()
    p = exact_table(target(), UPPER)
    found = [_run_one(name, p, seed, steps, progress) for name in methods()]
    exact = {
        "method": "exact", "bound": Estimate(0.0, 0.0), "kl": 0.0, "total_variation": 0.0,
        "modes": mode_masses(p), "worst": 1.0,
    }  # fmt: skip
    rows = (exact, *(r.row for r in found))
    figures = _figure(p, found, Path(out))
    table = Table("a mixture of Poissons with four modes", COLUMNS, rows)
    return Report("mixture-poisson", (table,), _notes(rows), tuple(figures), time.monotonic() - began)


def _run_one(name: str, p: np.ndarray, seed: int, steps: int, progress: bool) -> Result:
    family, bound = methods()[name]
    k1, k2 = jax.random.split(jax.random.key(seed))
    done = fit(target(), family, key=k1, steps=steps, bound=bound, tolerance=None, progress=progress)
    q = marginal_table(done, UPPER).probability
    masses = mode_masses(q)
    row: dict[str, object] = {
        "method": name,
        "bound": done.elbo(k2, samples=16_384),
        "kl": kl(q, p),
        "total_variation": total_variation(q, p),
        "modes": masses,
        "worst": min(m / t for m, t in zip(masses, mode_masses(p), strict=True)),
        "seconds": done.seconds,
    }
    return Result(row, q)


def _notes(rows: tuple[Mapping[str, object], ...]) -> tuple[str, ...]:
    best = min(rows[1:], key=lambda r: float(str(r["total_variation"])))
    return (
        "Modes, in the order of the components: near (1, 1), (0, 12), (5, 0), (10, 10). A point belongs to the "
        "component with the largest share of p there; the worst share is the smallest ratio of q's mass to p's.",
        f"Closest: {best['method']}. The ELBO seeks modes: mean-field and a flow settle on one of them. Of four "
        "components two can end up in one mode (with some seeds they do); eight leave room. M=8 importance samples of "
        "z spread a flow over all modes, at the price of a q that is itself less like p.",
    )


def _figure(p: np.ndarray, found: list[Result], out: Path) -> list[Path]:
    shown, top = 24, float(p.max())
    figure, axes = plots.panels(len(found) + 1, width=2.4, height=2.7)
    plots.heatmap(axes[0], p[:shown, :shown], "exact", top)
    for a, r in zip(axes[1:], found, strict=True):
        plots.heatmap(a, r.table[:shown, :shown], f"{r.row['method']}\nTV {r.row['total_variation']:.3f}", top)
    for a in axes:
        a.set_xlabel("z₁")
        a.set_ylabel("z₂")
    return save_figure(figure, out, "mixture_poisson")
