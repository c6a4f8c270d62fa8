"""How far a fit is from a problem's exact answers."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from base import Problem, site_marginals
from jaxtyping import Array, Float

import hivi
from hivi._families.base import AbstractProposal
from hivi.diagnostics import kl

DRAWS, BATCH = 65_536, 2048
SAMPLES = 32_768
"""Draws of z where there is no table: a frequency is then known to 0.003."""


def figures(problem: Problem, fit: hivi.Fit, key: Array) -> dict[str, float]:
    """Bound and gap to log Z, KL(q||p) where there is a table, worst error of a marginal, and errors of statistics."""
    k_bound, k_table, k_draws = jax.random.split(key, 3)
    bound = fit.elbo(k_bound)
    out = {"bound": bound.mean, "stderr": bound.stderr, "gap": problem.log_z - bound.mean}
    draws = {n: np.asarray(v) for n, v in fit.sample(k_draws, SAMPLES).items()}
    found = frequencies(problem, draws)
    if problem.table is not None:
        halves = [q_table(problem, fit, k) for k in jax.random.split(k_table)]
        q = 0.5 * (halves[0] + halves[1])
        out["kl"] = kl(q, problem.table)
        # KL is convex, so that an average over draws overstates it, by about c/draws: half of them by twice as much.
        out["kl overstated by"] = max(0.0, 0.5 * sum(kl(h, problem.table) for h in halves) - out["kl"])
        out["tail"] = max(0.0, 1.0 - float(q.sum()))
        found = site_marginals(q, problem.latents)
    out["worst"] = max(worst(problem, name, found[name]) for name in problem.marginals)
    for name, (function, exact) in problem.statistics.items():
        out[f"error of {name}"] = float(function(draws).mean()) - exact
    return out


def frequencies(problem: Problem, draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The marginals of draws, in the form of `Problem.marginals`."""
    out = {}
    for name, exact in problem.marginals.items():
        z = draws[name]
        if np.issubdtype(z.dtype, np.floating):
            out[name] = np.stack([z.mean(0), z.std(0)], -1)
        else:
            out[name] = np.stack([(z == v).mean(0) for v in range(exact.shape[-1])], -1)
    return out


def worst(problem: Problem, name: str, found: np.ndarray) -> float:
    """Largest error of a probability; for a continuous site of its mean, in posterior standard deviations."""
    exact = problem.marginals[name]
    if problem.latents[name].support.is_discrete:
        return float(np.abs(found - exact).max())
    return float((np.abs(found[..., 0] - exact[..., 0]) / exact[..., 1]).max())


def q_table(problem: Problem, fit: hivi.Fit, key: Array, draws: int = DRAWS // 2) -> Float[np.ndarray, "*shape"]:
    """q(z) over the cells of the problem's table: the mean over draws of lambda of prod_i q(z_i|lambda_i).

    Coordinates are split into two halves, so that a batch of draws is one matrix product, up to 2^20 cells.
    """
    shape = problem.table.shape
    size = 1 if fit.proposal.parameters() else BATCH  # mean-field: lambda is not random
    batches = 1 if size == 1 else draws // size
    parts = (np.asarray(_batch(fit.proposal, shape, size, k), np.float64) for k in jax.random.split(key, batches))
    return sum(parts).reshape(shape) / batches


@eqx.filter_jit
def _batch(proposal: AbstractProposal, shape: tuple[int, ...], size: int, key: Array) -> Float[Array, "left right"]:
    cut = min(range(1, len(shape) + 1), key=lambda k: math.prod(shape[:k]) + math.prod(shape[k:]))

    def halves(k: Array, branch: int) -> tuple[Array, Array]:
        conditionals, masses = proposal.conditionals(proposal.propose(k, branch)[1]), []
        for s in proposal.sites:
            likelihood, lam = conditionals[s.name]
            count = shape[len(masses)]
            values = s.values.low + jnp.arange(count)
            logs = jax.vmap(lambda v, s=s, f=likelihood, lam=lam: f.log_prob(lam, jnp.full(s.shape, v)))(values)
            masses += list(jnp.exp(logs).reshape(count, -1).T)
        return _outer(masses[:cut]), _outer(masses[cut:])

    total = jnp.zeros((math.prod(shape[:cut]), math.prod(shape[cut:])))
    for branch in range(proposal.branches):
        left, right = jax.vmap(lambda i, b=branch: halves(i, b))(jax.random.split(key, size))
        total = total + jnp.exp(proposal.log_weights()[branch]) * left.T @ right / size
    return total


def _outer(vectors: list[Array]) -> Array:
    """Flat outer product."""
    out = jnp.ones(1)
    for v in vectors:
        out = (out[:, None] * v).reshape(-1)
    return out
