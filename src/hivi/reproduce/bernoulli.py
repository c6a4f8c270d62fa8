"""Figure 1 of the paper: two correlated Bernoullis, which mean-field cannot fit and a hierarchical family can."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from hivi import plots
from hivi._bounds import AbstractBound, Elbo, ImportanceWeighted
from hivi._families.base import AbstractFamily
from hivi._families.flow import Flow
from hivi._families.hierarchical import Hierarchical
from hivi._families.mean_field import MeanField
from hivi._families.mixture import Mixture
from hivi._fit.loop import fit
from hivi._fit.result import Estimate, Fit
from hivi._space import Latent
from hivi._target.base import Target
from hivi._target.log_joint import from_log_joint
from hivi.diagnostics import kl, marginal_table, sample_lambda
from hivi.reproduce.report import Column, Report, Table, save_figure

TWO = ((0.1, 0.4), (0.4, 0.1))
"""The table of Figure 1: p(z1, z2)."""
THREE = (((0.03, 0.06), (0.06, 0.12)), ((0.06, 0.12), (0.12, 0.43)))
"""Three Bernoullis that are mostly one together."""
LENGTHS = (1, 2, 4, 8)
INNER = 8
COLUMNS = (
    Column("method", "method"),
    Column("bound", "bound (nats)", ".4f"),
    Column("kl", "exact KL(q||p)", ".5f"),
    Column("table", "q", ".3f"),
    Column("seconds", "seconds", ".1f"),
)


class Result(NamedTuple):
    """One method on one table."""

    method: str
    fit: Fit
    bound: Estimate
    table: np.ndarray
    kl: float
    seconds: float

    def row(self) -> dict[str, object]:
        """As a row of the report."""
        flat = [round(float(v), 6) for v in self.table.ravel()]
        return {"method": self.method, "bound": self.bound, "kl": self.kl, "table": flat, "seconds": self.seconds}


def methods() -> Mapping[str, tuple[AbstractFamily, AbstractBound]]:
    """Name -> family and bound: mean-field, flow priors of growing length, a tighter bound, and a mixture prior."""
    flows = {f"HVM, flow L={n}": (Hierarchical(prior=Flow(layers=n)), Elbo()) for n in LENGTHS}
    return {
        "mean-field": (MeanField(), Elbo()),
        **flows,
        f"HVM, flow L=2, K={INNER}": (Hierarchical(prior=Flow(layers=2)), ImportanceWeighted(outer=1, inner=INNER)),
        "HVM, mixture of 2": (Hierarchical(prior=Mixture(components=2)), Elbo()),
    }


def table_target(probabilities: np.ndarray) -> Target:
    """A table of Bernoullis as a target: log p(z) is looked up."""
    log_p = jnp.log(jnp.asarray(probabilities))

    def log_joint(z: dict[str, jax.Array]) -> jax.Array:
        return log_p[tuple(z["z"][i] for i in range(log_p.ndim))]

    return from_log_joint(log_joint, {"z": Latent(shape=(log_p.ndim,), support=constraints.boolean)})


def run(out: str | Path, *, seed: int = 0, steps: int = 10_000, progress: bool = False) -> Report:
    """Fit every method to both tables, and compare with the exact tables.

    q(z) = integral of prod_i q(z_i|lambda_i) q(lambda) d lambda is integrated by quadrature, so that KL(q||p) is exact
    to six digits.

    Args:
        out: folder of the figures, made if there is none.
        seed: of the random keys.
        steps: gradient steps of every fit; all are taken.
        progress: show progress bars.

    Returns:
        Two tables of bounds, exact KL and the tables themselves; figures `figure1` and `lambda`.
    """
    began = time.monotonic()
    tables, results = [], {}
    everything = list(methods())
    # The lengths between differ little on the second table, and every fit costs seconds of compilation.
    fewer = [name for name in everything if name not in ("HVM, flow L=2", "HVM, flow L=4")]
    for title, table, names in (("two Bernoullis", TWO, everything), ("three Bernoullis", THREE, fewer)):
        p = np.asarray(table, float)
        found = [_run_one(name, p, seed, steps, progress) for name in names]
        rows = [{"method": "exact", "bound": Estimate(0.0, 0.0), "kl": 0.0, "table": [float(v) for v in p.ravel()]}]
        tables.append(Table(title, COLUMNS, (*rows, *(r.row() for r in found))))
        results[title] = found
    figures = _figures(results["two Bernoullis"], Path(out))
    return Report("bernoulli", tuple(tables), _notes(), tuple(figures), time.monotonic() - began)


def _run_one(name: str, p: np.ndarray, seed: int, steps: int, progress: bool) -> Result:
    family, bound = methods()[name]
    k1, k2 = jax.random.split(jax.random.key(seed))
    done = fit(table_target(p), family, key=k1, steps=steps, bound=bound, tolerance=None, progress=progress)
    q = marginal_table(done).probability
    return Result(name, done, done.elbo(k2, samples=16_384), q, kl(q, p), done.seconds)


def _notes() -> tuple[str, ...]:
    return (
        "The bound is at most log p(x) = 0, and -bound >= KL(q||p): they differ by the slack of the auxiliary r(λ|z).",
        f"K={INNER} draws more of λ make the bound tighter (Sobolev & Vetrov 2019). Seconds include compilation.",
    )


def _figures(results: list[Result], out: Path) -> list[Path]:
    """Figure 1 (the tables as grey squares), and the fitted q(lambda) of every hierarchical method."""
    figure, axes = plots.panels(len(results) + 1, rows=2, width=1.9, height=2.5)
    plots.squares(axes[0], np.asarray(TWO, float), "exact")
    for a, r in zip(axes[1:], results, strict=True):
        plots.squares(a, r.table, "\n".join([*r.method.split(", ", 1), f"KL {r.kl:.4f}"]))
    paths = save_figure(figure, out, "figure1")
    hierarchical = [r for r in results if r.method.startswith("HVM")]
    figure, axes = plots.panels(len(hierarchical), rows=2, width=2.4, height=2.6)
    for a, r in zip(axes, hierarchical, strict=True):
        plots.scatter(a, sample_lambda(r.fit, jax.random.key(1), 20_000), r.method)
        a.set_xlabel("λ₁ (logit of z₁)")
        a.set_ylabel("λ₂ (logit of z₂)")
    return paths + save_figure(figure, out, "lambda")
