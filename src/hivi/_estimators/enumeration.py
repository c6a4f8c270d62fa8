"""Exact expectation over all coordinates of a site at once; for counts, over their likely values, and the rest by its score."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hivi._bounds import AbstractBound
from hivi._errors import FitError, require_count
from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Site
from hivi._tree import PyTree

WINDOW = 32
"""Most values of a count that are summed, per coordinate."""
BATCH = 256
"""States evaluated at once."""


class Enumeration(AbstractStrategy):
    r"""Sum over the joint values of a whole site: no noise from any of its coordinates.

    `grad E[f] = sum_s grad q(s|lambda) (f(s) - b)` over all values s of the site, where a local expectation sums over one
    coordinate at a time and draws the others; b is the mean of f over the states. The cost is the number of joint values: for
    sites of a few coordinates. Counts have infinitely many values: those in a window W around the mean are summed, and a draw
    outside stands for the rest, `1[z not in W] grad log q(z|lambda) (f(z) - b)`, without bias (Liu et al. 2019, sec. 4).

    Args:
        values: the most joint values that are summed.

    Example:
        >>> import hivi, jax
        >>> from numpyro.distributions import constraints
        >>> target = hivi.from_log_joint(
        ...     lambda z: 1.2 * z["z"][0] * z["z"][1], latents={"z": hivi.Latent(shape=(2,), support=constraints.boolean)}
        ... )
        >>> fit = hivi.fit(
        ...     target, hivi.MeanField(), estimator=hivi.Enumeration(), key=jax.random.key(0), steps=300, progress=False
        ... )
        >>> fit.strategies
        {'z': 'Enumeration'}
    """

    values: int = 4096
    detached: ClassVar[bool] = True

    def __check_init__(self) -> None:
        require_count("Enumeration(values=...)", self.values, "correct the number", 2, FitError)

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        if conditional is None:
            return "its coordinates are not independent given the family's context"
        if site.values.kind == "real":
            return "its support is not discrete"
        if not site.values.count and not conditional.likelihood.averaged:
            return "its counts have a q whose mean has no closed form, so no window of likely values"
        size = math.prod(site.batch_shape)
        each = site.values.count or 2  # of a count: at least two values of every coordinate
        if size * math.log(each) > math.log(self.values) + 1e-9:
            return f"{size} coordinates have more than {self.values} joint values"
        return None

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        if site.local is not None:
            return "a site in minibatches has rows that are better enumerated one by one"
        if bound.plate is not None:
            return "it sums over all rows at once, and the bound is taken row by row"
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        z, rule, lam = evaluation.z[site], conditional.likelihood, conditional.lam
        states, whole = _states(self.values, conditional, z)
        log_q = jnp.sum(jax.vmap(lambda s: rule.log_prob(lam, s))(states).reshape(len(states), -1), 1)
        change = jax.lax.map(lambda s: _change(evaluation, site, s), states, batch_size=BATCH)
        outside = jnp.zeros(())
        if not whole:
            low, high = states[0], states[-1]
            outside = jnp.where(jnp.all((z >= low) & (z <= high)), 0.0, 1.0) * jnp.sum(rule.log_prob(lam, z))
        return jnp.exp(log_q), outside, change

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        weights, outside, change = measured
        gain = increment(jax.lax.stop_gradient(change))
        possible = jnp.where(jnp.isfinite(gain), weights, 0.0)
        mean = jnp.sum(possible * jnp.where(possible > 0, gain, 0.0), -1) / jnp.maximum(jnp.sum(possible, -1), 1e-30)
        # A state whose weight is exactly zero cannot matter, even an impossible one (0 times -inf).
        safe = jnp.where((weights == 0) & ~jnp.isfinite(gain), 0.0, gain - mean[..., None])
        fixed, rest = jax.lax.stop_gradient((safe, -mean))
        return jnp.sum(weights * fixed) + jnp.sum(outside * rest)


def _states(most: int, conditional: Conditional, z: Array) -> tuple[Int[Array, "states ..."], bool]:
    """Joint values of the site (first the smallest of every coordinate, last the largest), and whether they are all."""
    rule, size = conditional.likelihood, z.size
    low, count = rule.support()
    width = count or min(WINDOW, int(most ** (1 / max(size, 1)) + 1e-9))
    grid = np.stack(np.unravel_index(np.arange(width**size), (width,) * size), -1).reshape(-1, *z.shape)
    if count:
        return jnp.asarray(grid, z.dtype) + low, True
    mean = jax.lax.stop_gradient(rule.mean(conditional.lam))
    start = jnp.maximum(low, jnp.round(mean - 0.45 * width)).astype(z.dtype)
    return jnp.asarray(grid, z.dtype) + start, False


def _change(evaluation: Evaluation, site: str, value: Array) -> Array:
    """Of the whole log-weight when the site moves: the terms' differences are summed, not their sums subtracted."""
    after = evaluation.moved(site, value)
    return sum(
        (
            new.sign * new.factored.total([a - b for a, b in zip(new.terms, old.terms, strict=True)])
            for new, old in zip(after.parts, evaluation.parts, strict=True)
        ),
        jnp.zeros(()),
    )
