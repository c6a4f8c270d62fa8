"""The score gradient of discrete variables on which other draws depend: the family's own above z, or earlier sites."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._estimators.base import AbstractStrategy, Evaluation, Increment, others
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Site
from hivi._tree import PyTree


class HierarchicalScore(AbstractStrategy):
    """grad log q(c_j) times the whole log-weight, less its mean over the other draws.

    z was drawn given c, so every term of log p is downstream of each c_j: no term may be left out, unlike for z itself
    (the hierarchical-sampling score gradient, Chaney 2015). It needs two draws or more in a step for its baseline.

    Example:
        >>> import hivi
        >>> from numpyro.distributions import constraints
        >>> target = hivi.from_log_joint(
        ...     lambda z: 0.5 * z["z"], latents={"z": hivi.Latent(shape=(3,), support=constraints.boolean)}
        ... )
        >>> "code of z  HierarchicalScore" in hivi.Auto().explain(target, hivi.Codes(bits=2))
        True
    """

    detached: ClassVar[bool] = True

    @property
    def whole(self) -> bool:
        return True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return None if conditional is not None else "it has no q of its own"

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        return None if bound.plate is None else "it looks at all rows at once, and the bound is taken row by row"

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        return conditional.likelihood.log_prob(conditional.lam, evaluation.z[site]), evaluation.total()

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        log_q, total = measured
        advantage = -increment(jax.lax.stop_gradient(others(total) - total))
        return jnp.sum(jnp.sum(log_q.reshape(*total.shape, -1), -1) * advantage)
