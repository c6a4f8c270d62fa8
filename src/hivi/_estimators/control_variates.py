"""Double control variates for pairs of draws (Titsias & Shi 2022)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractStrategy, Average, Evaluation, Increment, nothing
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Site
from hivi._tree import Key, PyTree

DECAY = 0.98


class DoubleControlVariates(AbstractStrategy):
    r"""Two independent draws; each is the other's baseline, corrected to first order by the derivative of log p there.

    With draws a and b, `L_b = grad f(b) (a - b)`, L_a the other way round, and mu = E[z|lambda]:
    `g_i = 1/2 { (f(a) - f(b) - alpha L_b)_i grad log q(a_i) + (f(b) - f(a) - alpha L_a)_i grad log q(b_i)
    + alpha (d_i f(a) + d_i f(b)) grad mu_i }`. Signals f_i and L_i hold only the terms that touch z_i. The weight alpha
    follows `E[A B]/E[B B]` over earlier steps, A the gradient without the derivative and B what it adds, so that it
    never depends on the draws it weighs. It needs a model that can be evaluated, and derived, between the values of z
    (arithmetic and matrix products, not look-ups), costs about six evaluations however many coordinates there are, and
    pays where exact differences would need very many colours. Derivatives are those of log p alone.

    Example:
        >>> import hivi
        >>> hivi.DoubleControlVariates().remembers
        True
    """

    detached: ClassVar[bool] = True

    @property
    def remembers(self) -> bool:
        return True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        if conditional is None:
            return "its coordinates are not independent given the family's context"
        if not site.discrete:
            return "it is continuous"
        return None if conditional.likelihood.averaged else "the mean of its q has no closed form"

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        if bound.linear(proposal.branches):
            return None
        return "its correction has a closed form only under a bound that is linear in the log-weight"

    def start(self, conditional: Conditional, key: Key) -> PyTree:
        return nothing(), nothing()

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        assert evaluation.key is not None
        b = conditional.likelihood.sample(jax.lax.stop_gradient(conditional.lam), evaluation.key)
        return pair(site, conditional, evaluation, b)

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        free, fixed, _ = measured
        gains = [increment(jax.lax.stop_gradient(x)) for x in fixed]
        return 0.5 * sum((jnp.sum(g * x) for g, x in zip(gains, free, strict=True)), jnp.zeros(()))

    def learn(self, memory: PyTree, measured: PyTree) -> PyTree:
        _, _, (ab, bb) = measured
        return memory[0].after(jnp.mean(ab), DECAY), memory[1].after(jnp.mean(bb), DECAY)


def weight(memory: tuple[Average, Average]) -> Array:
    """alpha: 1 before the first step."""
    product, square = memory
    return jnp.where(square.weight > 0, product.mean() / jnp.maximum(square.mean(), 1e-30), 1.0)


def pair(site: str, conditional: Conditional, evaluation: Evaluation, b: Array) -> PyTree:
    """What a pair contributes: log q(a), log q(b) and mu; the factors of their gradients; and A B, B B for the weight."""
    a, rule, lam = evaluation.z[site], conditional.likelihood, conditional.lam
    change, alpha = evaluation.change(site, b), weight(evaluation.memory)
    try:
        along_a, slope_a = evaluation.derivative(site, b - a)
        along_b, slope_b = evaluation.moved(site, b).derivative(site, a - b)
    except (TypeError, IndexError, ValueError, NotImplementedError) as error:
        raise FitError(
            message(
                f"site {site!r}",
                f"a model that cannot be evaluated or derived between the site's values ({str(error).splitlines()[0][:100]})",
                "arithmetic on the values, no look-up by them",
                "use estimator=hivi.Auto()",
            )
        ) from error
    slope = slope_a + slope_b
    factors = (-change - alpha * along_b, change - alpha * along_a, alpha * slope)
    free = (rule.log_prob(lam, a), rule.log_prob(lam, b), rule.mean(lam))
    fixed = jax.lax.stop_gradient(lam)
    score_a, score_b = rule.score(fixed, a), rule.score(fixed, b)
    per_mean = jax.grad(lambda x: jnp.sum(rule.mean(x)))(fixed)
    plain = -change[..., None] * (score_a - score_b)
    added = along_b[..., None] * score_a + along_a[..., None] * score_b - slope[..., None] * per_mean
    return free, factors, (jnp.sum(plain * added), jnp.sum(added * added))
