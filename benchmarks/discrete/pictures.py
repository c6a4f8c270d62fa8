"""The pictures of docs/dependence.md and docs/discrete.md, and the figures that they quote.

python benchmarks/discrete/pictures.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from common import RESULTS, write  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from noise import PLAIN, comparable  # noqa: E402
from numpyro.distributions import constraints  # noqa: E402

import hivi  # noqa: E402
from hivi import plots  # noqa: E402
from hivi.diagnostics import kl, marginal_table, sample_lambda  # noqa: E402

IMAGES = HERE.parent.parent / "docs" / "images"
TABLE = np.array([[0.1, 0.4], [0.4, 0.1]])
SPREADS = np.concatenate([[0.0], np.geomspace(0.05, 8.0, 40)])
STATES = np.array([(0, 0), (0, 1), (1, 0), (1, 1)])
DIRECTION = np.array([1.0, -1.0])


def spread_figures(spread: float, nodes: int = 200) -> dict[str, float]:
    """lambda = spread (1,-1) epsilon, by quadrature: correlation, ELBO, and eq. 5 with the linearised r."""
    epsilon, weight = np.polynomial.hermite_e.hermegauss(nodes)
    weight = weight / weight.sum()
    share = 1 / (1 + np.exp(-spread * epsilon[:, None] * DIRECTION))  # (nodes, 2)
    log_q = np.log(np.where(STATES[:, None] == 1, share, 1 - share) + 1e-300).sum(-1)  # (4, nodes): log q(z|lambda)
    q = np.exp(log_q) @ weight
    # r(epsilon|z) = N(u'score/P, 1/P), P = 1 + u'Fu at lambda = 0, where F = 1/4 and score = z - 1/2.
    precision = 1 + 0.25 * 2 * spread**2
    centre = spread * (STATES - 0.5) @ DIRECTION / precision
    log_r = -0.5 * precision * (epsilon - centre[:, None]) ** 2 + 0.5 * np.log(precision)
    log_prior = -0.5 * epsilon**2
    log_p = np.log(TABLE[STATES[:, 0], STATES[:, 1]])
    terms = log_p[:, None] + log_r - log_q - log_prior
    mean = q @ STATES
    covariance = q[3] - mean[0] * mean[1]
    return {
        "correlation": float(covariance / np.sqrt(mean[0] * (1 - mean[0]) * mean[1] * (1 - mean[1]))),
        "elbo": -kl(q, np.exp(log_p)),
        "eq. 5": float(np.sum(np.exp(log_q) * weight * terms)),
    }


def spreading(axes: list[Axes]) -> list[dict[str, float]]:
    """How q(z) gains correlation as the prior spreads along (1,-1), and what the bound sees."""
    found = [spread_figures(s) for s in SPREADS]
    axes[0].plot(SPREADS, [f["correlation"] for f in found], color="black")
    axes[0].axhline(-0.6, color="grey", linestyle=":")
    axes[0].set(xlabel="spread of λ along (1,−1)", ylabel="correlation of z₁, z₂", title="q(z); dotted: the target")
    axes[1].plot(SPREADS, [f["elbo"] for f in found], color="black", label="ELBO of the marginal q(z)")
    axes[1].plot(SPREADS, [f["eq. 5"] for f in found], color="black", linestyle="--", label="eq. 5, linearised r")
    axes[1].set(xlabel="spread of λ along (1,−1)", ylabel="nats", ylim=(-0.6, 0.05), title="what each bound sees")
    axes[1].legend(fontsize=8, loc="center right")
    return found


def target() -> hivi.Target:
    """The paper's table."""
    table = jnp.log(jnp.asarray(TABLE, jnp.float32))
    return hivi.from_log_joint(lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)})


def clouds(fit: hivi.Fit, axes: list[Axes]) -> None:
    """Draws of lambda, and of lambda given z: exact (by weighting) and r's."""
    lam = sample_lambda(fit, jax.random.key(1), 4000)
    axes[0].scatter(*lam[:1500].T, s=2, color="black")
    axes[0].set(title="q(λ; θ)", xlabel="λ₁", ylabel="λ₂")
    p = fit.proposal
    for state, colour in zip(STATES[1:3], ("tab:blue", "tab:orange"), strict=True):
        share = 1 / (1 + np.exp(-lam))
        weight = np.where(state == 1, share, 1 - share).prod(1)
        chosen = np.random.default_rng(0).choice(len(lam), 600, p=weight / weight.sum())
        z = {"z": jnp.asarray(state, jnp.int32)}
        drawn, _ = jax.vmap(lambda k, z=z: p.auxiliary.draw(z, p.prior, k))(jax.random.split(jax.random.key(2), 600))
        label = f"z = ({state[0]},{state[1]})"
        axes[1].scatter(*lam[chosen].T, s=2, color=colour, label=label)
        axes[2].scatter(*np.asarray(drawn).T, s=2, color=colour, label=label)
    for panel, title in zip(axes[1:], ("q(λ | z), exact", "r(λ | z; φ), learnt"), strict=True):
        panel.set(title=title, xlabel="λ₁", xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
        panel.legend(fontsize=8, markerscale=4)


def bounds(fit: hivi.Fit) -> list[tuple[str, float, float]]:
    """Every bound of one fit, and the exact ELBO of its marginal."""
    table = marginal_table(fit)
    rows = [("eq. 5", fit.elbo(jax.random.key(3)))]
    for inner in (1, 4, 16):
        bound = hivi.ImportanceWeighted(outer=1, inner=inner)
        rows.append((f"tighter, K = {inner}", fit.elbo(jax.random.key(3), bound=bound)))
    rows.append(("importance weighted, M = 16", fit.elbo(jax.random.key(3), bound=hivi.ImportanceWeighted(outer=16))))
    exact = -kl(table.probability, TABLE)
    return [*((n, e.mean, e.stderr) for n, e in rows), ("ELBO of the marginal q(z), exact", exact, 0.0)]


def factors(axes: Axes) -> None:
    """The noise table as a picture: factors below the score function, by problem."""
    path = RESULTS / "discrete_noise.json"
    rows = json.loads(path.read_text())
    problems = sorted({k.split("|")[0] for k in rows})
    marks = {"DisARM": "o", "double control variates": "s", "local expectation": "^", "local expectation, coupled": "v",
             "factor expectation": "P", "difference": "D"}  # fmt: skip
    for label, mark in marks.items():
        at, heights = [], []
        for number, name in enumerate(problems):
            both = [
                (a["product"], b["variance"] * comparable(b, a))
                for s in range(5)
                if "product" in (a := rows.get(f"{name}|mean-field|{PLAIN}|{s}", {}))
                and "product" in (b := rows.get(f"{name}|mean-field|{label}|{s}", {}))
            ]
            if both:
                at.append(number)
                heights.append(float(np.median([a / max(b, 1e-30) for a, b in both])))
        axes.scatter(at, np.minimum(heights, 1e5), marker=mark, label=label, s=28)
    axes.axhline(1.0, color="grey", linestyle=":")
    axes.set(yscale="log", ylabel="times less variance × cost than the score", title="at mean-field")
    axes.set_xticks(range(len(problems)), problems, rotation=60, ha="right", fontsize=7)
    axes.legend(fontsize=7)


def main() -> None:
    """The command."""
    IMAGES.mkdir(exist_ok=True)
    figure, axes = plots.panels(2, width=4.0)
    found = spreading(axes)
    figure.savefig(IMAGES / "spread.png", dpi=110)
    fit = hivi.fit(target(), hivi.Hierarchical(prior=hivi.Flow(layers=8)), key=jax.random.key(0), progress=False)
    figure, axes = plots.panels(3)
    clouds(fit, axes)
    figure.savefig(IMAGES / "lambda.png", dpi=110)
    if (RESULTS / "discrete_noise.json").exists():
        figure, (panel,) = plots.panels(1, width=8.0, height=4.5)
        factors(panel)
        figure.savefig(IMAGES / "noise.png", dpi=110)
    best = max(range(len(found)), key=lambda k: found[k]["eq. 5"])
    widest = max(range(len(found)), key=lambda k: found[k]["elbo"])
    rows = [[n, f"{m:.4f} ± {s:.4f}" if s else f"{m:.4f}"] for n, m, s in bounds(fit)]
    write(
        "dependence", "How the dependence is induced: figures of docs/dependence.md",
        "python benchmarks/discrete/pictures.py", ("bound of one fit, Flow(8), on the paper's table", "nats"), rows,
        [
            f"One direction (1,-1), by quadrature: the ELBO of q(z) is best at spread {SPREADS[widest]:.2f} "
            f"({found[widest]['elbo']:.4f}, correlation {found[widest]['correlation']:.3f}); eq. 5 with the",
            f"linearised r at spread {SPREADS[best]:.2f} ({found[best]['eq. 5']:.4f}, correlation "
            f"{found[best]['correlation']:.3f}). Mean-field: {found[0]['elbo']:.4f}. The target's correlation is -0.6.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
