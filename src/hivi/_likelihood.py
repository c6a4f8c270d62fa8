"""Which variational likelihood a site has, and natural gradients of its parameters."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from hivi._likelihoods.base import AbstractLikelihood
from hivi._likelihoods.binomial import BinomialLikelihood
from hivi._likelihoods.dispersed import DispersedLikelihood
from hivi._likelihoods.finite import FiniteLikelihood
from hivi._likelihoods.marginals import AbstractSpreadMarginal, BinomialMarginal, CountMarginal
from hivi._likelihoods.negative_binomial import NegativeBinomialLikelihood
from hivi._likelihoods.normal import NormalLikelihood
from hivi._likelihoods.poisson import PoissonLikelihood
from hivi._space import Site

TINY = 1e-30


def natural_gradient(rule: AbstractLikelihood, lam: Array, gradient: Array) -> Array:
    """Inverse Fisher matrix times a gradient, coordinate by coordinate; (*shape, width).

    Categorical logits have one redundant direction, in which the gradient is zero: a small ridge leaves it there.
    """
    fisher = rule.fisher(lam)
    if rule.width == 1:
        return gradient / jnp.maximum(fisher[..., 0], TINY)
    if rule.reparameterised:  # Normal: the matrix is diagonal
        return gradient / jnp.diagonal(fisher, axis1=-2, axis2=-1)
    ridge = 1e-6 * jnp.eye(rule.width)
    return jnp.linalg.solve(fisher + ridge, gradient[..., None])[..., 0]


def likelihood(site: Site) -> AbstractLikelihood:
    """The variational likelihood that suits a site's support."""
    values = site.values
    if values.kind == "real":
        return NormalLikelihood()
    if values.kind == "finite":
        return FiniteLikelihood(values)
    bounded = values.kind == "binomial"
    if values.dispersed:
        marginal: AbstractSpreadMarginal = (
            BinomialMarginal(values.low, values.count) if bounded else CountMarginal(values.low)
        )
        return DispersedLikelihood(marginal)
    if bounded:
        return BinomialLikelihood(values.low, values.count)
    if values.concentration > 0:
        return NegativeBinomialLikelihood(values.low, values.concentration)
    return PoissonLikelihood(values.low)
