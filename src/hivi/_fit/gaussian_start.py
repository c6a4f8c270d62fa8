"""The Gaussian at which a continuous fit starts: location and Cholesky factor found by a few Newton-like steps.

The bound of a full-rank Gaussian is maximised over *fixed* base draws e_1..e_n (Giordano, Ingram & Broderick 2024), which makes
it a deterministic function with a line search, by natural-gradient steps (Khan & Rue 2023). In the coordinates whitened by the
present Gaussian, z = m + L e,

    g = 1/n sum_j L' grad log p(z_j),    B = -1/n sum_j L' grad log p(z_j) e_j',

and by Stein's identity B estimates the mean of minus the Hessian there, exactly so for a Gaussian target. The fixed point
g = 0, B = I is the optimum of the bound over these draws. Eigenvalues of B are clipped, so that each standard deviation
changes by a bounded factor in a step and directions of negative curvature widen (saddle-free Newton); the first steps, from a
narrow start, amount to an ascent to the mode.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hivi._compile import compiled
from hivi._errors import TargetError, message
from hivi._estimators.cost import effort_of
from hivi._families.base import Layout
from hivi._space import Site
from hivi._target.base import Target
from hivi._tree import Key, PyTree

ITERATIONS = 200
USUAL_ITERATIONS = 50
STARTS = 4
"""Places from which the search begins; the best bound wins."""
RADIUS = 2.0
"""Starts lie within this many units of zero, in unconstrained space; the first one is zero."""
NARROW = 0.1
"""Standard deviation of every coordinate at the beginning."""
CHANGE = 10.0
"""Most by which a variance changes in one step, either way."""
HALVINGS = 12
WIDEST = 1e7
"""A standard deviation beyond this, in unconstrained space, is no posterior's."""
TOLERANCE = 1e-4
"""Nats: the search ends when a step gains less."""
BATCH = 128
"""Draws evaluated at once."""
LEAST = 128
"""Fewest base draws; there are at least four times as many as coordinates."""


class Gaussian(NamedTuple):
    """N(location, factor factor') over the flat vector of all sites.

    Attributes:
        location: mean.
        factor: lower-triangular Cholesky factor of the covariance.
        bound: mean of log p(x, z) over the base draws, plus the entropy, in nats.
    """

    location: Float[Array, " dim"]
    factor: Float[Array, "dim dim"]
    bound: Float[Array, ""]


def best_gaussian(target: Target, sites: tuple[Site, ...], key: Key) -> tuple[Array, Array]:
    """Mean and Cholesky factor of `gaussian_start`; the standard normal's, narrowed, where log p was finite nowhere.

    Raises:
        TargetError: the Gaussian widens without end along some direction: log p is improper there.
    """
    blank = jnp.zeros(Layout(sites).dim)
    effort = effort_of(_all_draws, blank, target, sites, steps=STARTS * USUAL_ITERATIONS)
    found = gaussian_start.at(effort)(target, sites, key)
    if bool(jnp.isfinite(found.bound)):
        _refuse_improper(sites, found)
        return found.location, found.factor
    dim = Layout(sites).dim
    return jnp.zeros(dim), NARROW * jnp.eye(dim)


def _all_draws(flat: Array, target: Target, sites: tuple[Site, ...]) -> Array:
    """What an iteration of one start evaluates, for its cost."""
    dim = flat.shape[0]
    draws = jnp.zeros((max(LEAST, 4 * dim), dim)) + flat
    log_p = jax.vmap(lambda x: target.log_joint(Layout(sites).unflatten(x)))
    return jax.grad(lambda x: jnp.sum(log_p(x)))(draws)


def _refuse_improper(sites: tuple[Site, ...], found: Gaussian) -> None:
    spread = Layout(sites).unflatten(jnp.sqrt(jnp.sum(found.factor**2, 1)))
    widest = max(spread, key=lambda n: float(jnp.max(spread[n])))
    if not float(jnp.max(spread[widest])) < WIDEST:
        raise TargetError(
            message(
                f"site {widest!r}",
                f"no end of its posterior: a Gaussian still gains by widening at a standard deviation of {WIDEST:g}",
                "a proper posterior (in unconstrained space)",
                "give the site a proper prior or a constraint, or rescale it; a sum of two sites alone identifies neither",
            )
        )


class _Search(NamedTuple):
    location: Float[Array, " dim"]
    root: Float[Array, "dim dim"]
    bound: Float[Array, ""]
    gradients: Float[Array, "draws dim"]
    gain: Float[Array, ""]
    iteration: Int[Array, ""]


def base_draws(dim: int, key: Key) -> Float[Array, "draws dim"]:
    """Antithetic standard normal draws whose sample covariance is exactly the identity."""
    half = max(LEAST, 4 * dim) // 2
    draws = jax.random.normal(key, (half, dim))
    root = jnp.linalg.cholesky(draws.T @ draws / half)
    draws = jax.scipy.linalg.solve_triangular(root, draws.T, lower=True).T
    return jnp.concatenate([draws, -draws])


@compiled
def gaussian_start(target: Target, sites: tuple[Site, ...], key: Key) -> Gaussian:
    """The Gaussian over these sites (all sites of the target) that maximises the bound over fixed draws.

    Its bound is not finite where log p was not finite at any start.
    """
    dim = Layout(sites).dim
    k1, k2 = jax.random.split(key)
    base = base_draws(dim, k1)
    places = jax.random.uniform(k2, (STARTS, dim), minval=-RADIUS, maxval=RADIUS).at[0].set(0.0)
    found = jax.lax.map(lambda place: _search(target, sites, base, place), places)
    best = jnp.argmax(jnp.where(jnp.isfinite(found.bound), found.bound, -jnp.inf))
    location, root, bound = found.location[best], found.root[best], found.bound[best]
    return Gaussian(location, _triangular(root), bound)


def _triangular(root: Float[Array, "dim dim"]) -> Float[Array, "dim dim"]:
    """The Cholesky factor of root root', from the QR decomposition of its transpose."""
    upper = jnp.linalg.qr(root.T, mode="r")
    return (upper * jnp.sign(jnp.diagonal(upper))[:, None]).T


def _evaluate(
    target: Target, sites: tuple[Site, ...], base: Array, location: Array, root: Array
) -> tuple[Array, Array]:
    """The bound over the base draws, and the gradient of log p at each."""
    layout = Layout(sites)
    points = location + base @ root.T
    both = jax.value_and_grad(lambda flat: target.log_joint(layout.unflatten(flat)))
    values, gradients = jax.lax.map(both, points, batch_size=BATCH)
    entropy = jnp.linalg.slogdet(root)[1] + 0.5 * points.shape[1] * (1 + jnp.log(2 * jnp.pi))
    bound = jnp.mean(values) + entropy
    return jnp.where(jnp.all(jnp.isfinite(gradients)), bound, jnp.nan), gradients


def _search(target: Target, sites: tuple[Site, ...], base: Array, place: Array) -> _Search:
    dim = place.shape[0]
    root = NARROW * jnp.eye(dim)
    bound, gradients = _evaluate(target, sites, base, place, root)
    start = _Search(place, root, bound, gradients, jnp.array(jnp.inf, bound.dtype), jnp.array(0))

    def going(s: _Search) -> Bool[Array, ""]:
        widest = jnp.max(jnp.sum(s.root**2, 1))  # without an end, the determinant would overflow, and the bound with it
        return (s.iteration < ITERATIONS) & (s.gain > TOLERANCE) & jnp.isfinite(s.bound) & (widest < WIDEST**2)

    return jax.lax.while_loop(going, lambda s: _step(target, sites, base, s), start)


def _step(target: Target, sites: tuple[Site, ...], base: Array, s: _Search) -> _Search:
    """One natural-gradient step, with a line search on the bound."""
    whitened = s.gradients @ s.root
    slope = jnp.mean(whitened, 0)
    curvature = -(whitened.T @ base) / base.shape[0]
    values, vectors = jnp.linalg.eigh(0.5 * (curvature + curvature.T))
    steepness = jnp.maximum(jnp.abs(values), 1 / CHANGE)
    move = s.root @ (vectors @ ((vectors.T @ slope) / steepness))
    narrowing = jnp.log(jnp.clip(values, 1 / CHANGE, CHANGE))

    def attempt(size: Array) -> tuple[Array, Array, Array, Array]:
        location = s.location + size * move
        root = s.root @ ((vectors * jnp.exp(-0.5 * size * narrowing)) @ vectors.T)
        return location, root, *_evaluate(target, sites, base, location, root)

    def worse(state: PyTree) -> Bool[Array, ""]:
        count, _, (_, _, bound, _) = state
        return (count < HALVINGS) & ~(bound >= s.bound)

    def halve(state: PyTree) -> PyTree:
        count, size, _ = state
        return count + 1, 0.5 * size, attempt(0.5 * size)

    one = jnp.ones((), s.bound.dtype)
    _, _, (location, root, bound, gradients) = jax.lax.while_loop(worse, halve, (jnp.array(0), one, attempt(one)))
    better = bound >= s.bound
    new = _Search(location, root, bound, gradients, bound - s.bound, s.iteration + 1)
    old = s._replace(gain=jnp.zeros((), s.bound.dtype), iteration=s.iteration + 1)
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)
