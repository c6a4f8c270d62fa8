"""Tables of dependent Bernoullis: the paper's, and random ones of 2^2 to 2^12 cells."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, normalise, site_marginals, spins
from jaxtyping import Array, Float
from numpyro.distributions import constraints

import hivi

ROUGHNESS = 0.5
"""Size of the part of a random table's log-probabilities that has no structure, beside its pairwise part."""


def from_table(name: str, about: str, log_p: Float[np.ndarray, "*twos"]) -> Problem:
    """The problem whose log-joint is a look-up in a table of log-probabilities, normalised or not."""
    number = log_p.ndim
    latents = {"z": hivi.Latent((number,), constraints.boolean)}
    cells, flat = jnp.asarray(log_p), jnp.asarray(log_p.reshape(-1))
    places = jnp.asarray(2 ** np.arange(number)[::-1])

    def log_joint(z: dict[str, Array]) -> Array:
        return cells[tuple(z["z"][k] for k in range(number))]

    def model() -> None:
        with numpyro.plate("coordinates", number):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.factor("table", flat[jnp.sum(z * places)] + number * np.log(2.0))

    log_z, table = normalise(log_p)
    return Problem(name, about, latents, log_joint, model, log_z, site_marginals(table, latents), table)


def paper() -> Problem:
    """The 2x2 table of Figure 1 of Ranganath, Tran & Blei (2016)."""
    log_p = np.log(np.array([[0.1, 0.4], [0.4, 0.1]]))
    return from_table("bernoulli-paper", "the paper's table ((.1, .4), (.4, .1)): two modes, flat marginals", log_p)


def random_table(number: int, strength: float = 1.5, seed: int = 0) -> Problem:
    """A random table of 2^number cells.

    log p(z) = strength (n^-1/2 sum_{i<j} J_ij s_i s_j + ROUGHNESS g(z)), s = 2z - 1, with J_ij and g(z) standard normal:
    dependent pairs, and a part that no pairwise model has. It is not normalised.

    Args:
        number: of Bernoullis, 2 to 12.
        strength: of the dependence; 0 is the uniform table.
        seed: of the couplings.
    """
    if not 2 <= number <= 12:
        raise ValueError(f"random_table(number={number}): expected 2 to 12 Bernoullis")
    rng = np.random.default_rng([seed, number])
    couplings = np.triu(rng.standard_normal((number, number)), 1)
    s = spins(number)
    pairs = np.einsum("ci,ij,cj->c", s, couplings, s, optimize=True) / np.sqrt(number)
    log_p = strength * (pairs + ROUGHNESS * rng.standard_normal(len(s)))
    about = f"random table of 2^{number} cells, strength {strength}: pairwise couplings and unstructured noise"
    return from_table(f"bernoulli-{number}", about, log_p.reshape((2,) * number))
