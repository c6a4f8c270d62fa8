"""Stick the landing: pathwise gradients without the score of q (Roeder, Wu & Duvenaud 2017)."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Site
from hivi._tree import PyTree


class StickTheLanding(AbstractStrategy):
    """Differentiate through the draw, with the parameters inside log q(z) held fixed.

    What is left out, the score grad log q(z), has mean zero; without it the gradient has no noise at all once q is the
    posterior. For exact densities (mean-field, full-rank, flow, mixture) of continuous sites and a bound that is linear in
    the log-weights; in a multi-sample bound it would be biased (Tucker et al. 2019). Elsewhere take `Pathwise()`.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(
        ...     target, hivi.MeanField(), estimator=hivi.StickTheLanding(), key=jax.random.key(0), steps=1500, progress=False
        ... )
        >>> bool(abs(fit.elbo(jax.random.key(1)).mean - 0.91894) < 1e-3)
        True
    """

    detached: ClassVar[bool] = False
    landing: ClassVar[bool] = True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return "a discrete draw has no derivative" if site.discrete else None

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        if not bound.linear(proposal.branches):
            return "the score that it leaves out has mean zero only under a bound that is linear in the log-weights"
        if not proposal.landable(site.name):
            return "its family has no exact density"
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        return ()

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        return jnp.zeros(())
