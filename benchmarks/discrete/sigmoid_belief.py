"""Small sigmoid belief networks with fixed weights: explaining away, layer by layer and row by row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, log_sigmoid, normalise, sigmoid, site_marginals, states
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi

WEIGHT = 2.0
"""Standard deviation of the weights: hidden causes compete for the same visible units."""


def _bernoulli(x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Sum over the last axis of log Bernoulli(x; logits)."""
    return np.sum(x * log_sigmoid(logits) + (1 - x) * log_sigmoid(-logits), -1)


def _log_bernoulli(x: Array, logits: Array) -> Array:
    return x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits)


def two_layers(top: int = 3, hidden: int = 5, visible: int = 9, seed: int = 0) -> Problem:
    """Two layers of causes and one observation: sites `hidden` and `top`, drawn from the network itself."""
    rng = np.random.default_rng([seed, top, hidden, visible])
    first, second = WEIGHT * rng.standard_normal((hidden, visible)), WEIGHT * rng.standard_normal((top, hidden))
    low, mid = -0.5 * first.sum(0), -0.5 * second.sum(0)
    drawn = rng.random(top) < 0.5
    above = rng.random(hidden) < sigmoid(drawn @ second + mid)
    x = (rng.random(visible) < sigmoid(above @ first + low)).astype(float)
    latents = {"hidden": hivi.Latent((hidden,), constraints.boolean), "top": hivi.Latent((top,), constraints.boolean)}
    w1, w2, b1, b2, data = (jnp.asarray(a) for a in (first, second, low, mid, x))

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {
            "top": jnp.full(top, -np.log(2.0)),
            "hidden": _log_bernoulli(z["hidden"], z["top"] @ w2 + b2),
            "visible": _log_bernoulli(data, z["hidden"] @ w1 + b1),
        }

    def model() -> None:
        with numpyro.plate("causes of causes", top):
            t = numpyro.sample("top", dist.Bernoulli(0.5))
        with numpyro.plate("causes", hidden):
            h = numpyro.sample("hidden", dist.Bernoulli(logits=t @ w2 + b2))
        with numpyro.plate("pixels", visible):
            numpyro.sample("visible", dist.Bernoulli(logits=h @ w1 + b1), obs=data)

    shape = (2,) * (hidden + top)
    cells = states(shape)
    h, t = cells[:, :hidden], cells[:, hidden:]
    log_p = -top * np.log(2.0) + _bernoulli(h, t @ second + mid) + _bernoulli(x, h @ first + low)
    log_z, table = normalise(log_p.reshape(shape))
    about = f"sigmoid belief network {top}-{hidden}-{visible}, one observation: explaining away over two layers"
    return Problem("sbn-layers", about, latents, log_joint, model, log_z, site_marginals(table, latents), table)


def rows(hidden: int = 4, visible: int = 8, data: int = 3, seed: int = 0) -> Problem:
    """One layer and a few observations, a plate: the posterior is independent over rows, and must be found to be so."""
    rng = np.random.default_rng([seed, hidden, visible, data])
    weights = WEIGHT * rng.standard_normal((hidden, visible))
    bias = -0.5 * weights.sum(0)
    causes = rng.random((data, hidden)) < 0.5
    x = (rng.random((data, visible)) < sigmoid(causes @ weights + bias)).astype(float)
    latents = {"z": hivi.Latent((data, hidden), constraints.boolean)}
    w, b, observed = jnp.asarray(weights), jnp.asarray(bias), jnp.asarray(x)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        prior = jnp.full((data, hidden), -np.log(2.0))
        return {"prior": prior, "visible": _log_bernoulli(observed, z["z"] @ w + b)}

    def model() -> None:
        with numpyro.plate("rows", data):
            z = numpyro.sample("z", dist.Bernoulli(0.5 * jnp.ones(hidden)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=z @ w + b).to_event(1), obs=observed)

    cells = states((2,) * hidden)
    own = -hidden * np.log(2.0) + np.stack([_bernoulli(row, cells @ weights + bias) for row in x])
    log_p = own[0]
    for k in range(1, data):
        log_p = np.add.outer(log_p, own[k])
    log_z, table = normalise(log_p.reshape((2,) * (data * hidden)))
    about = f"sigmoid belief network {hidden}-{visible}, {data} observations: rows are independent, causes are not"
    return Problem("sbn-rows", about, latents, log_joint, model, log_z, site_marginals(table, latents), table)
