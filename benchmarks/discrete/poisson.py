"""Posteriors over counts: mixtures of Poissons, and sources that share what was observed. Tables are cut where it is safe."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, normalise, site_marginals
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from scipy import stats
from scipy.special import logsumexp

import hivi

MODES = np.array([[1.0, 1.0], [0.1, 12.0], [5.0, 0.01], [10.0, 10.0]])
"""Rates (components, counts) of four modes in two dimensions."""
MODE_WEIGHTS = np.array([0.07, 0.09, 0.04, 0.7]) / 0.9


def mixture(rates: Float[np.ndarray, "k d"], weights: Float[np.ndarray, " k"], upper: int, name: str) -> Problem:
    """p(z) = sum_k w_k prod_i Poisson(z_i; r_ki): log Z is zero, whatever the cut; the tail beyond it is exact."""
    size = rates.shape[1]
    latents = {"z": hivi.Latent((size,), constraints.nonnegative_integer)}
    r, log_w = jnp.asarray(rates), jnp.log(jnp.asarray(weights))

    def log_joint(z: dict[str, Array]) -> Array:
        return jax.nn.logsumexp(log_w + jnp.sum(dist.Poisson(r).log_prob(z["z"]), -1))

    def model() -> None:
        # The prior is one Poisson per count; the factor replaces it by the mixture.
        with numpyro.plate("counts", size):
            z = numpyro.sample("z", dist.Poisson(weights @ rates))
        reference = jnp.sum(dist.Poisson(weights @ rates).log_prob(z))
        numpyro.factor("mixture", log_joint({"z": z}) - reference)

    grid = np.arange(upper + 1)
    masses = stats.poisson.pmf(grid, rates[..., None])
    marginals = np.einsum("k,kiv->iv", weights, masses)
    parts = [
        np.log(w) + _outer_sum(stats.poisson.logpmf(grid, row[:, None])) for w, row in zip(weights, rates, strict=True)
    ]
    _, table = normalise(logsumexp(parts, axis=0))
    tail = 1.0 - float(weights @ np.prod(stats.poisson.cdf(upper, rates), -1))
    about = f"mixture of {len(rates)} modes over {size} counts: far apart, of unequal width"
    return Problem(name, about, latents, log_joint, model, 0.0, {"z": marginals}, table, upper, tail)


def _outer_sum(vectors: np.ndarray) -> np.ndarray:
    """Table of v_1[a] + v_2[b] + ..."""
    total = vectors[0]
    for v in vectors[1:]:
        total = total[..., None] + v
    return total


def two_counts() -> Problem:
    """Four modes over two counts."""
    return mixture(MODES, MODE_WEIGHTS, 40, "poisson-mixture-2")


def three_counts() -> Problem:
    """Three modes over three counts; in each, another count is large."""
    rates = np.array([[8.0, 1.0, 1.0], [1.0, 8.0, 1.0], [1.0, 1.0, 8.0]])
    return mixture(rates, np.array([0.5, 0.3, 0.2]), 30, "poisson-mixture-3")


def sources(size: int = 3, observed: int = 12, noise: float = 1.5, upper: int = 22) -> Problem:
    """Counts z_i ~ Poisson(r_i) whose sum was measured: x ~ Normal(sum z, noise). They compete for it.

    The tail is certified: the likelihood is nowhere above its peak, so that what is cut off weighs no more than
    P(some z_i > upper) / (noise sqrt(2 pi)).
    """
    rates = 2.0 + 2.0 * np.arange(size)
    latents = {"z": hivi.Latent((size,), constraints.nonnegative_integer)}
    r = jnp.asarray(rates)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        likelihood = dist.Normal(jnp.sum(z["z"]), noise).log_prob(float(observed))
        return {"sources": dist.Poisson(r).log_prob(z["z"]), "measured": likelihood}

    def model() -> None:
        with numpyro.plate("sources", size):
            z = numpyro.sample("z", dist.Poisson(r))
        numpyro.sample("measured", dist.Normal(jnp.sum(z), noise), obs=float(observed))

    grid = np.arange(upper + 1)
    prior = _outer_sum(stats.poisson.logpmf(grid, rates[:, None]))
    total = _outer_sum(np.tile(grid, (size, 1)))
    log_z, table = normalise(prior + stats.norm.logpdf(observed, total, noise))
    beyond = float(np.sum(stats.poisson.sf(upper, rates))) * stats.norm.pdf(0, 0, noise)
    about = f"{size} Poisson sources of which the noisy sum {observed} was observed: strong negative dependence"
    return Problem(
        "poisson-sources", about, latents, log_joint, model, log_z, site_marginals(table, latents), table, upper,
        beyond / np.exp(log_z),
    )  # fmt: skip
