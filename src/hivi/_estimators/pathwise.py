"""Pathwise (reparameterisation) gradients: Kingma & Welling 2014, Rezende et al. 2014; eq. 12 for lambda itself."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._families.base import Conditional
from hivi._space import Site
from hivi._tree import PyTree


class Pathwise(AbstractStrategy):
    """Differentiate through the draw: lowest variance for continuous latents and a differentiable model.

    Example:
        >>> import hivi
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> print(hivi.Auto().explain(target, hivi.MeanField()))
        site  strategy  evaluations  reason
        x     Pathwise  1            continuous: the draw is reparameterised
    """

    detached: ClassVar[bool] = False

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return "a discrete draw has no derivative" if site.discrete else None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        return ()

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        return jnp.zeros(())
