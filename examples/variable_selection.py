"""Bernoulli indicators: which variables belong in a linear regression.

The weights are integrated out, so that only the indicators and the noise are latent. Two of the predictors are nearly copies of
each other, and the posterior says "one of the two, not both": a dependence between discrete latents that mean-field cannot
hold (it settles on one of them and is sure of it).

Run: `hivi fit examples/variable_selection.py:model --data examples/variable_selection.csv --out runs/selection`
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def model(y: Array, x1: Array, x2: Array, x3: Array, x4: Array) -> None:
    """Spike-and-slab regression, weights ~ N(0, 1) integrated out.

    Args:
        y: response, shape (n,).
        x1: first predictor, shape (n,).
        x2: almost a copy of the first.
        x3: a predictor with a weak effect.
        x4: a predictor without effect.
    """
    x = jnp.stack([x1, x2, x3, x4], 1)
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("predictor", 4):
        included = numpyro.sample("included", dist.Bernoulli(0.3))
    # y ~ N(0, noise^2 I + X diag(included) X'), in its low-rank form.
    factor = x * included + 1e-6
    numpyro.sample("y", dist.LowRankMultivariateNormal(jnp.zeros(len(y)), factor, jnp.full(len(y), noise**2)), obs=y)
