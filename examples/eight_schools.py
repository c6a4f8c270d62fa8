"""A continuous hierarchy: eight schools (Rubin 1981), the funnel that mean-field gets wrong.

Run: `hivi fit examples/eight_schools.py:model --data examples/eight_schools.csv --family hierarchical --out runs/schools`
"""

from __future__ import annotations

import numpyro
import numpyro.distributions as dist
from jax import Array


def model(effect: Array, error: Array) -> None:
    """School effects around a common mean, with unknown spread.

    Args:
        effect: estimated effect of coaching per school, shape (schools,).
        error: standard error of each estimate, shape (schools,).
    """
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = numpyro.sample("spread", dist.HalfCauchy(5.0))
    with numpyro.plate("school", effect.shape[0]):
        theta = numpyro.sample("theta", dist.Normal(mean, spread))
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)
