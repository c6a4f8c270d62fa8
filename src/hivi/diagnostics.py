"""How far a fit can be trusted: k-hat and bounds, exact tables of small discrete targets, tables of q, and distances."""

from __future__ import annotations

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpyro.distributions import Normal

from hivi._compile import compiled
from hivi._errors import FamilyError, FitError, TargetError, message
from hivi._families.auxiliary import LAM
from hivi._families.base import AbstractProposal, Conditional
from hivi._families.hierarchical import HierarchicalProposal
from hivi._fit.result import Fit
from hivi._marginal import KHat as KHat
from hivi._marginal import Ladder as Ladder
from hivi._marginal import bound_ladder as bound_ladder
from hivi._marginal import marginal_khat as marginal_khat
from hivi._space import Latents, Site
from hivi._target.base import Target, full_size
from hivi._tree import Key

MAX_CELLS = 10_000_000
"""Largest table that is made."""
QUADRATURE_DIM = 3
"""Up to so many parameters lambda are integrated by quadrature."""
REACH = 7.0
"""The grid over base noise goes so many standard deviations to each side."""
NODES = 1_000_000
"""Most nodes of a grid."""
BATCH = 4096


class Table(NamedTuple):
    """Probabilities of all values of a few discrete latents.

    Attributes:
        probability: one axis per coordinate, in the order of the sites; entry 0 is the smallest value.
        error: largest numerical or Monte Carlo standard error of an entry.
        method: "exact", "quadrature" or "Monte Carlo".
    """

    probability: np.ndarray
    error: float
    method: str

    @property
    def tail(self) -> float:
        """Mass outside the table, where counts were cut."""
        return max(0.0, 1.0 - float(self.probability.sum()))


def exact_table(target: Target, upper: int | None = None) -> np.ndarray:
    """p(z|x) of a small discrete target, by enumeration and normalised over the table.

    Args:
        target: a target whose latents are all discrete, without minibatches.
        upper: largest value of a count without a bound; needed only for those.

    Returns:
        Probabilities, one axis per coordinate in the order of the sites, entry 0 the smallest value.

    Raises:
        TargetError: a continuous site, a count without `upper`, minibatches, or too many values.

    Example:
        >>> import hivi, jax.numpy as jnp
        >>> from hivi.diagnostics import exact_table
        >>> from numpyro.distributions import constraints
        >>> coin = hivi.from_log_joint(lambda z: jnp.log(3.0) * z["z"], {"z": hivi.Latent(support=constraints.boolean)})
        >>> exact_table(coin).round(6)
        array([0.25, 0.75])
    """
    if not full_size(target):
        raise TargetError(message("exact_table", "a target with minibatches", "whole data", "drop subsample=..."))
    shape = _table_shape(target.sites, upper)
    lows = np.concatenate([np.full(math.prod(s.shape), s.values.low, int) for s in target.sites])
    cells = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), -1) + lows

    @compiled
    def log_p(target: Target, values: Array) -> Array:
        return jax.lax.map(lambda v: target.log_joint(_split(target.sites, v)), values, batch_size=BATCH)

    values = np.asarray(log_p(target, jnp.asarray(cells, jnp.int32)), np.float64)
    weights = np.exp(values - values.max())
    return (weights / weights.sum()).reshape(shape)


def marginal_table(fit: Fit, upper: int | None = None, *, key: Key | None = None, draws: int = 65_536) -> Table:
    """q(z) = integral of prod_i q(z_i|lambda_i) q(lambda) d lambda over all values of a few discrete latents.

    Exact where lambda is a parameter (mean-field, mixtures of it). A hierarchical family with up to three parameters
    lambda is integrated by the midpoint rule over the base noise of its prior, in double precision, with twice as many
    nodes until nothing changes. Otherwise it is the mean of prod_i q(z_i|lambda_i) over draws of lambda, which has less
    noise than counting draws of z (Rao-Blackwell).

    Args:
        fit: a fit of discrete latents only.
        upper: largest value of a count without a bound; the mass beyond is `Table.tail`.
        key: randomness of the draws; fixed if None.
        draws: number of draws of lambda, where there is no quadrature.

    Raises:
        TargetError: a continuous site, a count without `upper`, or too many values.
        FitError: a family without q(z_i|lambda_i).
    """
    shape = _table_shape(fit.sites, upper)
    key = jax.random.key(0) if key is None else key
    with jax.enable_x64(True):
        proposal = jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, fit.proposal)
        if bool(_same_lambda(proposal, key)):
            weights = jnp.exp(proposal.log_weights())
            found = sum(w * _one(proposal, shape, key, b) for b, w in enumerate(weights))
            return Table(np.asarray(found), 0.0, "exact")
        if isinstance(proposal, HierarchicalProposal) and _integrable(proposal, key):
            return _quadrature(proposal, shape)
        return _monte_carlo(proposal, shape, key, draws)


def sample_lambda(fit: Fit, key: Key, samples: int = 1000) -> Float[np.ndarray, "samples dim"]:
    """Draws of lambda ~ q(lambda; theta) of a hierarchical fit, as flat vectors.

    Raises:
        FitError: the family has no random lambda.
    """
    proposal = fit.proposal
    if not isinstance(proposal, HierarchicalProposal):
        raise FitError(
            message("sample_lambda", type(proposal).__name__, "a hierarchical fit", "fit with hivi.Hierarchical()")
        )
    prior = proposal.prior

    def one(k: Key) -> Array:
        k1, k2 = jax.random.split(k)
        branch = jax.random.categorical(k1, prior.log_weights())
        return prior.propose(k2, branch)[0][LAM]

    return np.asarray(compiled(jax.vmap(one))(jax.random.split(key, samples)))


def kl(q: np.ndarray, p: np.ndarray) -> float:
    """KL(q||p) = sum q log(q/p) of two tables, in nats; infinite where q > 0 = p.

    Example:
        >>> import numpy as np
        >>> from hivi.diagnostics import kl
        >>> round(kl(np.full((2, 2), 0.25), np.array([[0.1, 0.4], [0.4, 0.1]])), 5)
        0.22314
    """
    q, p = np.asarray(q, np.float64), np.asarray(p, np.float64)
    inside = q > 0
    with np.errstate(divide="ignore"):
        return float(np.sum(q[inside] * (np.log(q[inside]) - np.log(p[inside]))))


def total_variation(q: np.ndarray, p: np.ndarray) -> float:
    """Half of sum |q - p|, with the mass that either table lacks counted in full (an upper bound for cut tables).

    Example:
        >>> import numpy as np
        >>> from hivi.diagnostics import total_variation
        >>> total_variation(np.array([0.5, 0.5]), np.array([1.0, 0.0]))
        0.5
    """
    q, p = np.asarray(q, np.float64), np.asarray(p, np.float64)
    tails = max(0.0, 1 - q.sum()) + max(0.0, 1 - p.sum())
    return float(0.5 * (np.abs(q - p).sum() + tails))


def _table_shape(sites: tuple[Site, ...], upper: int | None) -> tuple[int, ...]:
    shape: list[int] = []
    for s in sites:
        if not s.discrete:
            raise TargetError(message(f"site {s.name!r}", "a continuous site", "discrete sites only", "use Fit.sample"))
        if s.values.kind == "count" and upper is None:
            raise TargetError(
                message(
                    f"site {s.name!r}", "a count without upper bound", "a largest value", "pass upper=..., such as 40"
                )
            )
        count = s.values.count or (upper or 0) - s.values.low + 1
        shape += [count] * math.prod(s.shape)
    if math.prod(shape) > MAX_CELLS:
        raise TargetError(
            message("table", f"{math.prod(shape)} values", f"at most {MAX_CELLS}", "use Fit.sample for large targets")
        )
    return tuple(shape)


def _split(sites: tuple[Site, ...], flat: Array) -> Latents:
    out, start = {}, 0
    for s in sites:
        stop = start + math.prod(s.shape)
        out[s.name] = flat[start:stop].reshape(s.shape)
        start = stop
    return out


def _masses(sites: tuple[Site, ...], found: dict[str, Conditional], shape: tuple[int, ...]) -> list[Array]:
    """q(z_i = v | lambda_i) for every coordinate i and value v: one vector per coordinate."""
    out: list[Array] = []
    for s in sites:
        if s.name not in found:
            cure = "use a family with factorised conditionals, such as Hierarchical()"
            raise FitError(message(f"site {s.name!r}", "a family without q(z_i|lambda_i)", "one that has it", cure))
        size = math.prod(s.shape)
        values = s.values.low + np.arange(shape[len(out)])
        likelihood, lam = found[s.name]
        table = jax.vmap(lambda v, s=s, f=likelihood, lam=lam: f.log_prob(lam, jnp.full(s.shape, v)))(values)
        out += list(jnp.exp(table).reshape(len(values), size).T)
    return out


def _outer(masses: list[Array]) -> Array:
    """Sum over the leading axis (the draws) of the outer products of the coordinates' vectors."""
    table = masses[0]
    for m in masses[1:-1]:
        table = table[..., None] * m.reshape((m.shape[0],) + (1,) * (table.ndim - 1) + (-1,))
    if len(masses) == 1:
        return table.sum(0)
    return jnp.tensordot(table, masses[-1], axes=(0, 0))


def _one(proposal: AbstractProposal, shape: tuple[int, ...], key: Key, branch: int) -> Array:
    _, context = proposal.propose(key, branch)
    return _outer([m[None] for m in _masses(proposal.sites, proposal.conditionals(context), shape)])


@compiled
def _same_lambda(proposal: AbstractProposal, key: Key) -> Bool[Array, ""]:
    """Whether lambda is a parameter: two draws have the same one, in every branch."""

    def lam(k: Key, branch: int) -> list[Array]:
        return jax.tree.leaves({n: c.lam for n, c in proposal.conditionals(proposal.propose(k, branch)[1]).items()})

    pairs = [[lam(k, b) for k in jax.random.split(key)] for b in range(proposal.branches)]
    return jnp.all(jnp.array([jnp.all(x == y) for first, second in pairs for x, y in zip(first, second, strict=True)]))


def _integrable(proposal: HierarchicalProposal, key: Key) -> bool:
    """Whether q(lambda) has at most three dimensions, and a standard normal base (tested at 64 points)."""
    if proposal._link.dim > QUADRATURE_DIM:
        return False
    if proposal.prior.branches > 1:
        try:
            proposal.prior.components()
        except FamilyError:  # a mixture on a higher level: its lambda is not a mixture of Gaussians
            return False
        return True
    return bool(jnp.all(jnp.abs(_base_gap(proposal, key)) < 1e-6))


@compiled
def _base_gap(proposal: HierarchicalProposal, key: Key) -> Float[Array, " points"]:
    """Gap log q(lambda) |d lambda / d base| - log N(base; 0, 1) at points of the base: zero for flows and Gaussians."""

    def gap(k: Key) -> Array:
        base = jax.random.normal(k, (proposal._link.dim,))
        value, log_det = proposal.prior.from_coordinates(base)
        return proposal.prior.log_density(value, k) + log_det - jnp.sum(Normal(0.0, 1.0).log_prob(base))

    return jax.vmap(gap)(jax.random.split(key, 64))


def _quadrature(proposal: HierarchicalProposal, shape: tuple[int, ...], tolerance: float = 1e-6) -> Table:
    """Midpoint rule over base noise, which converges geometrically for smooth integrands; doubled until level."""
    dim = proposal._link.dim
    n = int(16_000 ** (1 / dim))
    table, error = np.zeros(shape), np.inf
    while n**dim <= NODES and error > tolerance:
        new = np.asarray(_grid_sum(proposal, shape, jnp.asarray(n)))
        error, table, n = float(np.abs(new - table).max()), new, 2 * n
    return Table(table, error, "quadrature")


@compiled
def _grid_sum(proposal: HierarchicalProposal, shape: tuple[int, ...], n: Int[Array, ""]) -> Array:
    """The integral with n nodes per dimension; n is traced, so that all grids share one compilation."""
    prior, dim = proposal.prior, proposal._link.dim
    log_branch = prior.log_weights()

    def lam(base: Array, branch: Array) -> Array:
        if prior.branches == 1:
            return prior.from_coordinates(base)[0][LAM]
        _, location, scale = prior.components()
        return location[branch] + scale[branch] * base

    def chunk(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        index = number * BATCH + jnp.arange(BATCH)
        position = jnp.stack([index // n**k % n for k in range(dim)], -1)
        base = (position + 0.5) * (2 * REACH / n) - REACH
        branch = index // n**dim
        inside = branch < prior.branches
        branch = jnp.minimum(branch, prior.branches - 1)
        weight = jnp.where(inside, jnp.exp(Normal(0.0, 1.0).log_prob(base).sum(-1) + log_branch[branch]), 0.0)
        contexts = jax.vmap(lam)(base, branch)
        masses = jax.vmap(lambda c: _masses(proposal.sites, proposal.conditionals((c, None)), shape))(contexts)
        masses[0] = masses[0] * weight[:, None]
        return sums[0] + weight.sum(), sums[1] + _outer(masses)

    chunks = -(-prior.branches * n**dim // BATCH)
    weight, table = jax.lax.fori_loop(0, chunks, chunk, (jnp.zeros(()), jnp.zeros(shape)))
    return table / weight


def _monte_carlo(proposal: AbstractProposal, shape: tuple[int, ...], key: Key, draws: int) -> Table:
    """Mean over draws of lambda, in 32 batches that give the standard error."""
    weights = jnp.exp(proposal.log_weights())

    @compiled
    def batch(proposal: AbstractProposal, k: Key) -> Array:
        def masses(k: Key, branch: int) -> list[Array]:
            return _masses(proposal.sites, proposal.conditionals(proposal.propose(k, branch)[1]), shape)

        keys = jax.random.split(k, max(1, draws // 32))
        parts = [w * _outer(jax.vmap(lambda i, b=b: masses(i, b))(keys)) for b, w in enumerate(weights)]
        return sum(parts, jnp.zeros(shape)) / len(keys)

    means = np.stack([np.asarray(batch(proposal, k)) for k in jax.random.split(key, 32)])
    return Table(means.mean(0), float((means.std(0, ddof=1) / np.sqrt(32)).max()), "Monte Carlo")
