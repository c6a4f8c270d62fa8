"""Every family on the same three two-dimensional targets: how far its bound stays below log Z, and what it looks like.

    python benchmarks/families.py [FAMILY ...]

Writes `results/families.md` and, for the pages of docs/families/, `docs/images/family_NAME.png`. The targets are normalised,
so that the bound itself is minus the gap; log q of the pictures is the family's own (an estimate where lambda is random).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import RESULTS, write
from jax.scipy.special import logsumexp
from numpyro.distributions import MultivariateNormal, Normal

import hivi
from hivi import plots
from hivi._marginal import marginal_khat

IMAGES = Path(__file__).parent.parent / "docs" / "images"
STORE = RESULTS / "families.json"
STEPS, SEED = 5000, 0
TIGHTER = hivi.ImportanceWeighted(outer=64)


def banana(z: Any) -> Any:
    """Curved: x_1 follows the square of x_0."""
    x = z["x"]
    return Normal(0.0, 1.5).log_prob(x[0]) + Normal(0.5 * x[0] ** 2 - 1.0, 0.5).log_prob(x[1])


def funnel(z: Any) -> Any:
    """Neal's: the scale of x_0 is exp of half x_1."""
    x = z["x"]
    return Normal(0.0, 1.5).log_prob(x[1]) + Normal(0.0, jnp.exp(0.5 * x[1])).log_prob(x[0])


def modes(z: Any) -> Any:
    """Two correlated modes, of weights 0.7 and 0.3."""
    tilted = jnp.array([[0.6, 0.45], [0.45, 0.6]])
    parts = [
        MultivariateNormal(jnp.array(m), c).log_prob(z["x"])
        for m, c in (([1.5, 0.5], tilted), ([-1.5, 0.0], tilted * jnp.array([[1.0, -1.0], [-1.0, 1.0]])))
    ]
    return logsumexp(jnp.stack(parts) + jnp.log(jnp.array([0.7, 0.3])))


TARGETS = {"banana": banana, "funnel": funnel, "two modes": modes}
FAMILIES: dict[str, Any] = {
    "mean_field": hivi.MeanField(),
    "full_rank": hivi.FullRank(),
    "low_rank": hivi.LowRank(1),
    "copula": hivi.Copula(),
    "mixture": hivi.Mixture(8),
    "flow": hivi.Flow(layers=8),
    "standardised": hivi.Standardised(),
    "hierarchical": hivi.Hierarchical(prior=hivi.Flow(layers=8)),
}
GRID = np.linspace(-4.5, 4.5, 91)


def picture(name: str, fits: dict[str, hivi.Fit]) -> None:
    """Contours of p in grey, of q in blue, and draws from q."""
    figure, axes = plots.panels(len(fits), width=2.8, height=2.8)
    mesh = np.stack(np.meshgrid(GRID, GRID), -1).reshape(-1, 2)
    for panel, (title, fit) in zip(axes, fits.items(), strict=True):
        log_p = np.asarray(jax.vmap(lambda v, f=TARGETS[title]: f({"x": v}))(jnp.asarray(mesh)))
        log_q = np.asarray(fit.log_prob({"x": jnp.asarray(mesh)}, key=jax.random.key(1), samples=256))
        draws = np.asarray(fit.sample(jax.random.key(2), 300)["x"])
        panel.plot(*draws.T, ".", color="C0", alpha=0.25, markersize=3)
        for log, colour in ((log_p, "0.4"), (log_q, "C0")):
            density = np.exp(log).reshape(len(GRID), -1)
            # Contours that enclose 50 and 90 % of the mass.
            ranked = np.sort(density.ravel())[::-1]
            levels = [ranked[np.searchsorted(np.cumsum(ranked) / ranked.sum(), share)] for share in (0.9, 0.5)]
            panel.contour(GRID, GRID, density, levels=sorted(set(levels)), colors=colour, linewidths=1.0)
        panel.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xticks=[], yticks=[])
    figure.savefig(IMAGES / f"family_{name}.png", dpi=80)


def run(name: str) -> None:
    """One family on all targets."""
    fits, rows = {}, {}
    for title, log_joint in TARGETS.items():
        target = hivi.from_log_joint(log_joint, {"x": hivi.Latent((2,))})
        began = time.perf_counter()
        fits[title] = fit = hivi.fit(target, FAMILIES[name], key=jax.random.key(SEED), steps=STEPS, progress=False)
        seconds = time.perf_counter() - began
        bound, tight = fit.elbo(jax.random.key(1), 16_384), fit.elbo(jax.random.key(1), 256, bound=TIGHTER)
        khat = marginal_khat(fit, key=jax.random.key(3), samples=2000)
        row = {"gap": -bound.mean, "stderr": bound.stderr, "tighter": -tight.mean, "khat": khat.value}
        rows[title] = {**row, "seconds": seconds}
    stored = json.loads(STORE.read_text()) if STORE.exists() else {}
    STORE.write_text(json.dumps({**stored, name: rows}, indent=1, sort_keys=True) + "\n")
    picture(name, fits)


def table() -> None:
    """`results/families.md` from what is stored."""
    stored = json.loads(STORE.read_text())
    rows = []
    for name in (n for n in FAMILIES if n in stored):
        cells = [f"{r['gap']:.3f} ({r['tighter']:.3f}, {r['khat']:.1f})" for r in (stored[name][t] for t in TARGETS)]
        rows.append([name.replace("_", "-"), str(FAMILIES[name]), *cells])
    write(
        "families",
        "Families on two-dimensional targets",
        "python benchmarks/families.py",
        ["family", "as", *TARGETS],
        rows,
        [
            "Gap of the bound to log Z in nats, lower is better (in brackets: with 64 draws; k-hat of the marginal q).",
            f"{STEPS} steps at most, seed 0, no setting tuned. The standard error of a gap is below 0.02.",
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES])
    for chosen in parser.parse_args().families or FAMILIES:
        run(chosen)
        table()
