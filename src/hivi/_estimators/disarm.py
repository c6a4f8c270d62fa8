"""DisARM: coupled pairs of draws that cancel each other's noise (Dong, Mnih & Tucker 2020), for any finite support."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._families.base import Conditional
from hivi._space import Site
from hivi._tree import Key, PyTree


class DisARM(AbstractStrategy):
    r"""A second draw b, coupled with the first, a, so that it differs whenever it can; no baseline needed.

    `g_i = 1/2 max(1-q(a_i), 1-q(b_i)) (f_i(a) - f_i(b)) (grad log q(a_i) - grad log q(b_i))`, where all coordinates of
    the site move from a to b together. For two values b is the antithetic draw (uniform 1-u instead of u) and this is
    DisARM (equally U2G; Yin et al. 2020). For more values the coupling is a step of Metropolised Gibbs sampling (Liu 1996):
    b != a is proposed with probability q(b)/(1-q(a)) and accepted with min(1, (1-q(a))/(1-q(b))). It is reversible, so both
    draws have law q and the pair is exchangeable, with probability q(a) q(b) / max(1-q(a), 1-q(b)) for a != b; the weight
    above undoes the coupling (importance weighting, as in Dong et al. 2021), and is at most 1. The cost is two evaluations.

    Example:
        >>> import hivi, jax
        >>> from numpyro.distributions import constraints
        >>> target = hivi.from_log_joint(
        ...     lambda z: 0.5 * z["z"], latents={"z": hivi.Latent(shape=(3,), support=constraints.boolean)}
        ... )
        >>> fit = hivi.fit(
        ...     target, hivi.MeanField(), estimator=hivi.DisARM(), key=jax.random.key(0), steps=300, progress=False
        ... )
        >>> fit.strategies
        {'z': 'DisARM'}
    """

    detached: ClassVar[bool] = True

    @property
    def whole(self) -> bool:
        return True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        if conditional is None:
            return "its coordinates are not independent given the family's context"
        return (
            None
            if conditional.likelihood.table
            else f"its q is no table, its support not finite or too long ({site.values})"
        )

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        assert evaluation.key is not None
        return pair(site, conditional, evaluation, partner(conditional, evaluation.z[site], evaluation.key))

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        difference, weight, change = measured
        gain = -increment(jax.lax.stop_gradient(change))
        # Coordinates whose pair agrees have no gradient, even where the other draw is impossible (0 times inf).
        safe = jnp.where(weight == 0, 0.0, gain)
        return jnp.sum(0.5 * weight * safe * difference)


def pair(site: str, conditional: Conditional, evaluation: Evaluation, b: Array) -> PyTree:
    """What a pair of draws contributes: log q(a) - log q(b), its weight (0 where they agree), and the change of the signal."""
    a, rule, lam = evaluation.z[site], conditional.likelihood, conditional.lam
    log_a, log_b = rule.log_prob(lam, a), rule.log_prob(lam, b)
    most = jnp.maximum(-jnp.expm1(log_a), -jnp.expm1(log_b))
    weight = jnp.where(a == b, 0.0, jax.lax.stop_gradient(most))
    return log_a - log_b, weight, evaluation.change(site, b)


def partner(conditional: Conditional, a: Array, key: Key) -> Array:
    """One step of Metropolised Gibbs sampling from q(z_i|lambda_i), for every coordinate."""
    rule, lam = conditional.likelihood, jax.lax.stop_gradient(conditional.lam)
    k1, k2 = jax.random.split(key)
    values = rule.moves(a)  # every value but a
    log_p = jax.vmap(lambda v: rule.log_prob(lam, v))(values)
    chosen = jax.random.categorical(k1, log_p, axis=0)
    b = jnp.take_along_axis(values, chosen[None], 0)[0]
    accept = jnp.expm1(rule.log_prob(lam, a)) / jnp.minimum(jnp.expm1(rule.log_prob(lam, b)), -1e-30)
    return jnp.where(jax.random.uniform(k2, a.shape) < accept, b, a)
