"""Poisson latents: true case counts behind under-reported ones.

Every week a hidden number of infections is drawn from a Poisson with a common, unknown rate; each infection is reported with
probability p, where p has been measured in a survey. Which counts were real? The hidden counts are discrete and unbounded:
NUTS cannot sample them, and mean-field forgets that they rise and fall with the rate.

Run: `hivi fit examples/poisson_outbreaks.py:model --data examples/poisson_outbreaks.json --out runs/outbreaks`
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array


def model(reported: Array, survey_positive: int = 36, survey_size: int = 60) -> None:
    """Hidden Poisson counts, thinned by under-reporting.

    Args:
        reported: reported cases per week, shape (weeks,), integers.
        survey_positive: survey participants whose case had been reported.
        survey_size: participants of the survey.
    """
    rate = numpyro.sample("rate", dist.Gamma(2.0, 0.2))
    detection = numpyro.sample("detection", dist.Beta(1.0, 1.0))
    numpyro.sample("survey", dist.Binomial(survey_size, detection), obs=survey_positive)
    with numpyro.plate("week", reported.shape[0]):
        hidden = numpyro.sample("undetected", dist.Poisson(rate * (1 - detection)))
        numpyro.sample("reported", dist.Poisson(rate * detection), obs=reported)
        # A strained laboratory: weeks with many undetected cases also returned more inconclusive tests.
        numpyro.factor("inconclusive", -0.02 * jnp.square(hidden - 0.5 * reported))
