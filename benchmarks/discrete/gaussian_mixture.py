"""Gaussian mixtures with every assignment enumerated: fixed means, and means as latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, normalise, site_marginals, states
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from scipy import stats

import hivi

NOISE, PRIOR = 1.0, 2.0
"""Standard deviations of a point around its mean, and of a mean around zero."""


def points(number: int, components: int, seed: int = 0) -> Float[np.ndarray, " number"]:
    """Points around means at equal distances, which overlap."""
    rng = np.random.default_rng([seed, number, components])
    means = 2.0 * (np.arange(components) - (components - 1) / 2)
    return means[np.arange(number) % components] + NOISE * rng.standard_normal(number)


def cluster_evidence(count: np.ndarray, total: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Log-density of points x_1..n of one cluster, its mean N(0, PRIOR^2) integrated out; from n, sum x and sum x^2."""
    noise, prior = NOISE**2, PRIOR**2
    log_det = count * np.log(noise) + np.log1p(count * prior / noise)
    quadratic = (square - prior * total**2 / (noise + count * prior)) / noise
    return -0.5 * (count * np.log(2 * np.pi) + log_det + quadratic)


def _assignments(x: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One-hot assignments of all cells, and every cluster's number of points and their sum."""
    hot = np.eye(components)[states((components,) * len(x))]
    return hot, hot.sum(1), np.einsum("cnk,n->ck", hot, x)


def collapsed(number: int = 9, components: int = 3) -> Problem:
    """Assignments only; the means are integrated out, which makes every point depend on all others.

    Labels can be exchanged: `components`! modes, and marginals 1/components.
    """
    x = points(number, components)
    shape = (components,) * number
    hot, count, total = _assignments(x, components)
    square = np.einsum("cnk,n->ck", hot, x**2)
    log_p = -number * np.log(components) + np.sum(cluster_evidence(count, total, square), -1)
    log_z, table = normalise(log_p.reshape(shape))
    latents = {"z": hivi.Latent((number,), constraints.integer_interval(0, components - 1))}
    data = jnp.asarray(x)

    def likelihood(z: Array) -> Array:
        own = jax.nn.one_hot(z, components)
        n, s = own.sum(0), own.T @ data
        noise, prior = NOISE**2, PRIOR**2
        gain = jnp.sum(-0.5 * jnp.log1p(n * prior / noise) + 0.5 * prior * s**2 / (noise * (noise + n * prior)))
        return gain + jnp.sum(dist.Normal(0.0, NOISE).log_prob(data))

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {"prior": jnp.full(number, -np.log(components)), "points": likelihood(z["z"])}

    def model() -> None:
        with numpyro.plate("points", number):
            z = numpyro.sample("z", dist.Categorical(jnp.full(components, 1 / components)))
        numpyro.factor("points given z", likelihood(z))

    about = f"{number} points, {components} clusters with means integrated out: {components}! exchangeable labellings"
    return Problem("gmm-collapsed", about, latents, log_joint, model, log_z, site_marginals(table, latents), table)


def fixed(number: int = 10, components: int = 3) -> Problem:
    """Assignments with fixed means, weights and scale: independent, so that every family must reach log Z."""
    x = points(number, components)
    means = 2.0 * (np.arange(components) - (components - 1) / 2)
    own = stats.norm.logpdf(x[:, None], means, NOISE) - np.log(components)
    cells = states((components,) * number)
    log_z, table = normalise(own[np.arange(number), cells].sum(1).reshape((components,) * number))
    latents = {"z": hivi.Latent((number,), constraints.integer_interval(0, components - 1))}
    data, centres = jnp.asarray(x), jnp.asarray(means)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        likelihood = dist.Normal(centres[z["z"]], NOISE).log_prob(data)
        return {"prior": jnp.full(number, -np.log(components)), "points": likelihood}

    def model() -> None:
        with numpyro.plate("points", number):
            z = numpyro.sample("z", dist.Categorical(jnp.full(components, 1 / components)))
            numpyro.sample("x", dist.Normal(centres[z], NOISE), obs=data)

    about = f"{number} points, {components} clusters with fixed means: independent, mean-field is exact"
    return Problem("gmm-fixed", about, latents, log_joint, model, log_z, site_marginals(table, latents), table)


def with_means(number: int = 8, components: int = 2) -> Problem:
    """Assignments and means: sites `mean` (continuous) and `z`. Given z the means are Gaussian, and enter in closed form."""
    x = points(number, components)
    hot, count, total = _assignments(x, components)
    square = np.einsum("cnk,n->ck", hot, x**2)
    log_p = -number * np.log(components) + np.sum(cluster_evidence(count, total, square), -1)
    log_z, weight = normalise(log_p)
    precision = count / NOISE**2 + PRIOR**-2
    centre = total / NOISE**2 / precision
    first, second = weight @ centre, weight @ (centre**2 + 1 / precision)
    latents = {
        "mean": hivi.Latent((components,), constraints.real),
        "z": hivi.Latent((number,), constraints.integer_interval(0, components - 1)),
    }
    data = jnp.asarray(x)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {
            "mean": dist.Normal(0.0, PRIOR).log_prob(z["mean"]),
            "prior": jnp.full(number, -np.log(components)),
            "points": dist.Normal(z["mean"][z["z"]], NOISE).log_prob(data),
        }

    def model() -> None:
        with numpyro.plate("clusters", components):
            mean = numpyro.sample("mean", dist.Normal(0.0, PRIOR))
        with numpyro.plate("points", number):
            z = numpyro.sample("z", dist.Categorical(jnp.full(components, 1 / components)))
            numpyro.sample("x", dist.Normal(mean[z], NOISE), obs=data)

    about = f"{number} points, {components} clusters with their means: two labellings, discrete and continuous latents"
    marginals = {
        "mean": np.stack([first, np.sqrt(second - first**2)], -1),
        "z": np.einsum("c,cnk->nk", weight, hot),
    }
    return Problem("gmm-means", about, latents, log_joint, model, log_z, marginals)
