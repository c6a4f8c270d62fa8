"""What one nat would take on the digits: a sigmoid belief network learned by Monte Carlo EM, and bounds at its weights.

    python benchmarks/discrete/digits_em.py

Gibbs chains, one per training digit, go on while Adam climbs log p(x, z) + log prior of the weights: maximum a posteriori without
any family's bound. Held-out log p is by annealed importance sampling (Neal 2001), whose mean is a lower bound; beside it the
bounds that mean-field and hierarchies reach at the very same weights.
"""

from __future__ import annotations

import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from common import RESULTS, write  # noqa: E402
from digits import BATCH, OPTIONS, RATES, UNITS, digits, network  # noqa: E402
from jax.nn import sigmoid, softplus  # noqa: E402
from jax.scipy.special import logsumexp  # noqa: E402
from suite import known, record  # noqa: E402

import hivi  # noqa: E402

PATH = RESULTS / "discrete_digits_em.json"
SWEEPS, TEMPERATURES, CHAINS = 3000, 300, 4
PRIORS = (1.0, 3.0)
"""Standard deviations of the weights' prior: digits.py's, and a wide one, near maximum likelihood."""
FAMILIES: dict[str, tuple[Any, int]] = {
    "mean-field": (hivi.MeanField(), 3000),
    "HVM, mixture of 8": (hivi.Mixture(8, equal=True), 1500),
    "HVM, mixture of 32": (hivi.Mixture(32, equal=True), 1500),
}
Weights = dict[str, jax.Array]


def log_p_x(z: jax.Array, p: Weights, x: jax.Array) -> jax.Array:
    """Log p(x | z), per digit."""
    logits = p["b"] + z @ p["w"]
    return jnp.sum(x * logits - softplus(logits), -1)


def sweep(key: jax.Array, z: jax.Array, p: Weights, x: jax.Array, beta: Any = 1.0) -> jax.Array:
    """One Gibbs sweep over the units of every digit, of p(z) p(x|z)^beta."""

    def unit(carry: Any, k: jax.Array) -> tuple[Any, None]:
        z, logits, key = carry
        key, now = jax.random.split(key)
        off = logits - z[:, k, None] * p["w"][k]
        on = off + p["w"][k]
        odds = p["a"][k] + beta * jnp.sum(x * p["w"][k] - softplus(on) + softplus(off), -1)
        new = (jax.random.uniform(now, odds.shape) < sigmoid(odds)).astype(z.dtype)
        return (z.at[:, k].set(new), off + new[:, None] * p["w"][k], key), None

    start = (z, p["b"] + z @ p["w"], key)
    return jax.lax.scan(unit, start, jnp.arange(UNITS))[0][0]


def learn(x: jax.Array, scale: float, key: jax.Array) -> Weights:
    """Weights by Monte Carlo EM, with Normal(0, scale) and Normal(0, 3) priors."""
    mean = x.mean(0)
    p = {
        "w": 0.3 * jax.random.normal(key, (UNITS, x.shape[1])),
        "b": jnp.log(mean + 0.01) - jnp.log(1.01 - mean),
        "a": -jnp.ones(UNITS),
    }
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, SWEEPS))

    def loss(p: Weights, z: jax.Array) -> jax.Array:
        prior = 0.5 * jnp.sum(p["w"] ** 2) / scale**2 + 0.5 * (jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)) / 9
        return (prior - jnp.sum(log_p_x(z, p, x) + z @ p["a"] - jnp.sum(softplus(p["a"])))) / len(x)

    @jax.jit
    def step(k: jax.Array, carry: Any) -> Any:
        z, p, state = carry
        z = sweep(jax.random.fold_in(key, k), z, p, x)
        updates, state = optimiser.update(jax.grad(loss)(p, z), state)
        return z, optax.apply_updates(p, updates), state

    return jax.lax.fori_loop(0, SWEEPS, step, (jnp.zeros((len(x), UNITS)), p, optimiser.init(p)))[1]


@jax.jit
def annealed(key: jax.Array, p: Weights, x: jax.Array) -> jax.Array:
    """Log-weights of annealed importance sampling from p(z), one chain per digit."""
    betas = jnp.linspace(0.0, 1.0, TEMPERATURES + 1) ** 1.5
    first, rest = jax.random.split(key)
    z = (jax.random.uniform(first, (len(x), UNITS)) < sigmoid(p["a"])).astype(x.dtype)

    def cool(carry: Any, k: jax.Array) -> tuple[Any, None]:
        z, log_w = carry
        log_w = log_w + (betas[k] - betas[k - 1]) * log_p_x(z, p, x)
        return (sweep(jax.random.fold_in(rest, k), z, p, x, betas[k]), log_w), None

    return jax.lax.scan(cool, (z, jnp.zeros(len(x))), jnp.arange(1, TEMPERATURES + 1))[0][1]


def row(scale: float) -> dict[str, float]:
    """Log p and bounds, in nats per held-out digit, at the weights learned under one prior."""
    train, test = digits()
    weights = jax.jit(partial(learn, scale=scale))(jnp.asarray(train, jnp.float32), key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), CHAINS)
    log_w = jnp.stack([annealed(k, weights, jnp.asarray(test, jnp.float32)) for k in keys])
    found = {"log p": float(jnp.mean(logsumexp(log_w, 0) - jnp.log(CHAINS)))}
    given = {name: np.asarray(value) for name, value in weights.items()}
    unseen = hivi.from_numpyro(network, test, given, subsample={"digits": BATCH})
    for name, (family, steps) in FAMILIES.items():
        fit = hivi.fit(unseen, family, key=jax.random.key(2), steps=steps, learning_rate=RATES["held-out"], **OPTIONS)
        bound = fit.elbo(jax.random.key(3), samples=400)
        found |= {name: bound.mean / len(test), f"{name} stderr": bound.stderr / len(test)}
    return found


def main() -> None:
    """The command."""
    for scale in PRIORS:
        if str(scale) not in known(PATH):
            record(PATH, str(scale), row(scale))
    rows = [
        [scale, f"{r['log p']:.3f}", *(f"{r[n]:.3f} ± {r[f'{n} stderr']:.3f}" for n in FAMILIES)]
        for scale, r in known(PATH).items()
    ]
    notes = (
        "Nats per held-out digit, all at the same weights: maximum a posteriori under a Normal prior of this deviation, by Monte "
        f"Carlo EM ({SWEEPS} Gibbs sweeps of all training digits). Log p by annealed importance sampling, {CHAINS} chains of "
        f"{TEMPERATURES} temperatures, a lower bound on average. Families as in digits.py, one fit per digit, one seed."
    )
    write(
        "discrete_digits_em", "The digits' network learned without a bound", "python benchmarks/discrete/digits_em.py",
        ("prior sd", "log p", *FAMILIES), rows, textwrap.wrap(notes, 130),
    )  # fmt: skip


if __name__ == "__main__":
    main()
