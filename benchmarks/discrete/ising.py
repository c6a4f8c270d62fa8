"""Ising models without approximation: a chain by transfer matrices, the periodic square lattice by Kaufman's formula.

The lattice's log Z is that of B. Kaufman, Phys. Rev. 76, 1232 (1949): a finite torus, no limit taken. Its marginals
are 1/2 by symmetry, so that they tell only which of the two modes a family has lost; the correlation of neighbours, the
derivative of log Z, tells the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, normalise, site_marginals, spins
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from scipy.special import logsumexp

import hivi

ENUMERABLE = 16
"""Up to so many spins the table is made, too."""


# The chain


def transfer(
    coupling: Float[np.ndarray, " links"], field: Float[np.ndarray, " spins"]
) -> tuple[float, Float[np.ndarray, "spins 2"], Float[np.ndarray, " links"]]:
    """Log Z, marginals and correlations of neighbours of an open chain, by messages from both ends.

    p(s) is proportional to exp(sum_i J_i s_i s_{i+1} + sum_i h_i s_i).
    """
    s = np.array([-1.0, 1.0])
    link = coupling[:, None, None] * np.outer(s, s)
    local = field[:, None] * s
    size = len(field)
    left, right = np.zeros((size, 2)), np.zeros((size, 2))
    for i in range(1, size):
        left[i] = logsumexp((left[i - 1] + local[i - 1])[:, None] + link[i - 1], axis=0)
    for i in range(size - 2, -1, -1):
        right[i] = logsumexp((right[i + 1] + local[i + 1])[None] + link[i], axis=1)
    joint = left + local + right
    log_z = float(logsumexp(joint[0]))
    ahead = (left + local)[:-1, :, None] + link + (right + local)[1:, None, :]
    pairs = np.einsum("lab,a,b->l", np.exp(ahead - log_z), s, s)
    return log_z, np.exp(joint - log_z), pairs


def chain(length: int, strength: float = 1.0, seed: int = 0) -> Problem:
    """An open chain with couplings strength * N(0, 1) and fields N(0, 1)/2."""
    rng = np.random.default_rng([seed, length, 1])
    coupling, field = strength * rng.standard_normal(length - 1), 0.5 * rng.standard_normal(length)
    latents = {"z": hivi.Latent((length,), constraints.boolean)}
    j, h = jnp.asarray(coupling), jnp.asarray(field)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        s = 2.0 * z["z"] - 1.0
        return {"field": h * s, "link": j * s[1:] * s[:-1]}

    def model() -> None:
        with numpyro.plate("spins", length):
            # Bernoulli(logits=2h) is exp(h s) / (2 cosh h).
            s = 2.0 * numpyro.sample("z", dist.Bernoulli(logits=2.0 * h)) - 1.0
        numpyro.factor("cosh", jnp.sum(jnp.logaddexp(h, -h)))
        with numpyro.plate("links", length - 1):
            numpyro.factor("link", j * s[1:] * s[:-1])

    log_z, marginals, pairs = transfer(coupling, field)
    table = None
    if length <= ENUMERABLE:
        s = spins(length)
        table = normalise(s @ field + (s[:, 1:] * s[:, :-1]) @ coupling)[1].reshape((2,) * length)
    about = f"open chain of {length} spins, random couplings of strength {strength} and fields"
    statistics = {"neighbours": (lambda z: np.mean(_chain_pairs(z), -1), float(pairs.mean()))}
    return Problem(
        f"ising-chain-{length}", about, latents, log_joint, model, log_z, {"z": marginals}, table, statistics=statistics
    )


def _chain_pairs(z: Mapping[str, np.ndarray]) -> np.ndarray:
    s = 2.0 * z["z"] - 1.0
    return s[:, 1:] * s[:, :-1]


# The lattice


def kaufman(size: int, beta: float, rows: int | None = None) -> float:
    """Log Z of the Ising model on a torus of `rows` x `size` sites, J = 1, no field, beta > 0.

    Z = 1/2 (2 sinh 2 beta)^(N/2) (prod 2cosh(m g_odd / 2) + prod 2sinh(m g_odd / 2) + prod 2cosh(m g_even / 2)
    + prod 2sinh(m g_even / 2)), cosh g_r = cosh(2 beta)^2 / sinh(2 beta) - cos(pi r / n), r odd or even below 2n.
    All g_r are positive but g_0 = 2 beta + log tanh beta, which changes sign at the critical point: above that
    temperature the last product is negative.
    """
    n, m = size, size if rows is None else rows
    r = np.arange(2 * n)
    # cosh g - 1 without cancellation, and arccosh(1 + x) = log1p(x + sqrt(x (x + 2))).
    excess = (np.sinh(2 * beta) - 1) ** 2 / np.sinh(2 * beta) + 2 * np.sin(np.pi * r / (2 * n)) ** 2
    gamma = np.log1p(excess + np.sqrt(excess * (excess + 2)))
    gamma[0] = 2 * beta + np.log(np.tanh(beta))
    logs, signs = [], []
    for g in (gamma[1::2], gamma[0::2]):
        half = m * np.abs(g) / 2
        logs.append(np.sum(np.logaddexp(half, -half)))
        signs.append(1.0)
        with np.errstate(divide="ignore"):  # at the critical point the last product vanishes
            logs.append(np.sum(half + np.log(-np.expm1(-2 * half))))
        signs.append(float(np.prod(np.sign(g))))
    return 0.5 * n * m * np.log(2 * np.sinh(2 * beta)) - np.log(2) + float(logsumexp(logs, b=signs))


def neighbour_correlation(size: int, beta: float, step: float = 1e-4) -> float:
    """E[s_i s_j] of neighbours: d log Z / d beta over the 2N bonds, by central differences of fourth order."""

    def f(k: int) -> float:
        return kaufman(size, beta + k * step)

    return (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * step) / (2 * size**2)


def bonds(s: Array) -> dict[str, Array]:
    """The products of all neighbours on the torus; where it closes, terms of their own, so that they stay local."""
    return {
        "right": s[..., :, 1:] * s[..., :, :-1], "close right": s[..., :, 0] * s[..., :, -1],
        "down": s[..., 1:, :] * s[..., :-1, :], "close down": s[..., 0, :] * s[..., -1, :],
    }  # fmt: skip


def lattice(size: int, beta: float) -> Problem:
    """The ferromagnet on a size x size torus, log p(z) = beta sum over bonds of s_i s_j, without a field."""
    shape = (size, size)
    latents = {"z": hivi.Latent(shape, constraints.boolean)}

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {name: beta * pairs for name, pairs in bonds(2.0 * z["z"] - 1.0).items()}

    def model() -> None:
        with numpyro.plate("rows", size, dim=-2), numpyro.plate("columns", size, dim=-1):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
        for name, pairs in bonds(2.0 * z - 1.0).items():
            with contextlib.ExitStack() as plates:
                for axis, count in enumerate(reversed(pairs.shape)):
                    plates.enter_context(numpyro.plate(f"{name} {axis}", count, dim=-1 - axis))
                numpyro.factor(name, beta * pairs)
        numpyro.factor("uniform", size**2 * np.log(2.0))

    table, marginals = None, {"z": np.full((*shape, 2), 0.5)}
    if size**2 <= ENUMERABLE:
        table = lattice_table(size, beta)
        marginals = site_marginals(table, latents)
    about = f"{size}x{size} torus at beta {beta}: " + (
        "two ordered modes" if beta > 0.4407 else "critical fluctuations"
    )
    statistics = {"neighbours": (_neighbours, neighbour_correlation(size, beta))}
    return Problem(
        f"ising-{size}x{size}-{beta}", about, latents, log_joint, model, kaufman(size, beta), marginals, table,
        statistics=statistics,
    )  # fmt: skip


def _neighbours(z: Mapping[str, np.ndarray]) -> np.ndarray:
    found = bonds(2.0 * np.asarray(z["z"]) - 1.0)
    return np.concatenate([b.reshape(len(b), -1) for b in found.values()], 1).mean(1)


def energies(size: int) -> Float[np.ndarray, " cells"]:
    """Sum over bonds of s_i s_j, of all configurations of a size x size torus."""
    s = spins(size**2).reshape(-1, size, size)
    return sum(b.reshape(len(s), -1).sum(1) for b in bonds(s).values())


def lattice_table(size: int, beta: float) -> np.ndarray:
    """p(z) of a small torus, by enumeration."""
    return normalise(beta * energies(size))[1].reshape((2,) * size**2)
