"""Inference networks against parameters per datum: 10,000 data points with three correlated bits each.

    python benchmarks/amortised.py [--rows N] [--steps N]

Each point is a noisy two-dimensional sum of what its bits switch on, so that causes explain each other away: mean-field
loses the dependence, a hierarchy keeps it. The evidence of a point is a sum over eight states: exact.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from common import write
from jax.scipy.special import logsumexp

import hivi

EFFECT = np.array([[1.0, 0.4], [0.9, -0.5], [1.1, 0.1]], np.float32)
NOISE, RATE, TEST, HIDDEN = 0.35, 0.4, 2000, 48
STATES = np.array(list(np.ndindex(2, 2, 2)), np.float32)


def points(rows: int, seed: int) -> np.ndarray:
    """Draws of the model."""
    rng = np.random.default_rng(seed)
    bits = rng.random((rows, 3)) < RATE
    return (bits @ EFFECT + NOISE * rng.standard_normal((rows, 2))).astype(np.float32)


def model(y: Any) -> None:
    """Three bits for each row."""
    with numpyro.plate("data", y.shape[0]):
        z = numpyro.sample("z", dist.Bernoulli(RATE).expand([3]).to_event(1))
        numpyro.sample("y", dist.Normal(z @ EFFECT, NOISE).to_event(1), obs=y)


def evidence(y: np.ndarray) -> float:
    """Log p(y) per row."""
    prior = dist.Bernoulli(RATE).log_prob(STATES).sum(-1)
    each = dist.Normal(STATES @ EFFECT, NOISE).log_prob(jnp.asarray(y)[:, None]).sum(-1)
    return float(logsumexp(each + prior, -1).mean())


def size(fit: hivi.Fit) -> int:
    """Number of parameters that the optimiser moves; a network's own, not those that it gives to rows."""
    proposal: Any = fit.proposal
    own = proposal if not proposal.amortised else (proposal.network, proposal.start)
    return sum(x.size for x in jax.tree.leaves(eqx.filter(own, eqx.is_inexact_array)))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=12_000)
    args = parser.parse_args()
    y, new = points(args.rows, 0), points(TEST, 1)
    target = hivi.from_numpyro(model, y, subsample={"data": args.rows // 4})
    test = hivi.from_numpyro(model, new)
    hierarchy = hivi.Hierarchical(prior=hivi.FullRank())
    families: dict[str, Any] = {
        "mean-field, network": hivi.Amortised(hivi.MeanField(), data=y, hidden=HIDDEN),
        "hierarchy, parameters per datum": hierarchy,
        "hierarchy, network": hivi.Amortised(hierarchy, data=y, hidden=HIDDEN),
    }
    rows, bounds, sizes = [], {}, {}
    for name, family in families.items():
        began = time.perf_counter()
        fit = hivi.fit(target, family, key=jax.random.key(0), steps=args.steps, samples=1, learning_rate=0.05,
                       tolerance=None, progress=False)  # fmt: skip
        seconds = time.perf_counter() - began
        bound = fit.elbo(jax.random.key(1), samples=400)
        bounds[name], sizes[name] = bound.mean, size(fit)
        found = "needs a fit"
        if name.endswith("network"):
            unseen = fit.rows(new, target=test).elbo(jax.random.key(2), samples=400)
            found = f"{unseen.mean / TEST:.4f} ± {unseen.stderr / TEST:.4f}"
        per = f"{bound.mean / args.rows:.4f} ± {bound.stderr / args.rows:.4f}"
        rows.append([name, str(sizes[name]), per, found, f"{seconds:.0f}"])
        print(rows[-1], flush=True)
    rows.append(["log evidence, exact", "", f"{evidence(y):.4f}", f"{evidence(new):.4f}", ""])
    own, net = bounds["hierarchy, parameters per datum"], bounds["hierarchy, network"]
    ratio = sizes["hierarchy, parameters per datum"] / sizes["hierarchy, network"]
    write(
        "amortised", f"An inference network against parameters per datum, {args.rows} data points",
        "python benchmarks/amortised.py", ("family", "parameters", "bound per datum, nats", "per unseen datum", "seconds"), rows,
        [
            f"The network's bound is {100 * (net - own) / abs(own):+.2f} % from that of parameters per datum, with "
            f"{ratio:.0f} times fewer parameters.",
            f"{args.steps} steps each, minibatches of {args.rows // 4} rows, the same step size; unseen: {TEST} points, "
            "no further fitting.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
