"""Sherrington-Kirkpatrick spin glass: every pair coupled at random, many modes, enumerated."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, normalise, site_marginals, spins
from jaxtyping import Array, Float
from numpyro.distributions import constraints

import hivi


def couplings(number: int, seed: int = 0) -> Float[np.ndarray, "number number"]:
    """J_ij ~ N(0, 1/n), i < j; zero elsewhere."""
    rng = np.random.default_rng([seed, number, 2])
    return np.triu(rng.standard_normal((number, number)), 1) / np.sqrt(number)


def log_table(upper: Float[np.ndarray, "n n"], beta: float) -> Float[np.ndarray, "*twos"]:
    """Beta sum_{i<j} J_ij s_i s_j of all configurations: halves of the spins against each other, as matrix products."""
    number = len(upper)
    half = number // 2
    a, b = spins(half), spins(number - half)
    own_a = np.einsum("ci,ij,cj->c", a, upper[:half, :half], a, optimize=True)
    own_b = np.einsum("ci,ij,cj->c", b, upper[half:, half:], b, optimize=True)
    return beta * (own_a[:, None] + own_b + a @ upper[:half, half:] @ b.T).reshape((2,) * number)


def glass(number: int = 20, beta: float = 1.0, seed: int = 0) -> Problem:
    """The spin glass without a field, log p(z) = beta sum_{i<j} J_ij s_i s_j: marginals 1/2, modes in pairs."""
    upper = couplings(number, seed)
    rows, columns = np.triu_indices(number, 1)
    weights = jnp.asarray(beta * upper[rows, columns])
    matrix = jnp.asarray(beta * upper)
    latents = {"z": hivi.Latent((number,), constraints.boolean)}

    def log_joint(z: dict[str, Array]) -> Array:
        s = 2.0 * z["z"] - 1.0
        return s @ matrix @ s

    def model() -> None:
        with numpyro.plate("spins", number):
            s = 2.0 * numpyro.sample("z", dist.Bernoulli(0.5)) - 1.0
        with numpyro.plate("pairs", len(rows)):
            numpyro.factor("coupling", weights * s[rows] * s[columns])
        numpyro.factor("uniform", number * np.log(2.0))

    log_p = log_table(upper, beta)
    log_z, table = normalise(log_p)
    energy = float(np.sum(table * log_p))

    def coupled(z: Mapping[str, np.ndarray]) -> np.ndarray:
        s = 2.0 * np.asarray(z["z"]) - 1.0
        return beta * np.einsum("si,ij,sj->s", s, upper, s, optimize=True)

    about = f"spin glass of {number} spins at beta {beta}: every pair coupled, modes in pairs"
    return Problem(
        f"sk-{number}", about, latents, log_joint, model, log_z, site_marginals(table, latents), table,
        statistics={"energy": (coupled, energy)},
    )  # fmt: skip
