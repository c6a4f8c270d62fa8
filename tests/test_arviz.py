"""Draws in ArviZ's container."""

from __future__ import annotations

import arviz
import jax
import numpy as np
import pytest
from numpyro.distributions import constraints

import hivi


def test_container_holds_draws_and_statistics() -> None:
    target = hivi.from_log_joint(
        lambda z: {"x": -0.5 * z["x"] ** 2, "n": -0.5 * z["n"]},
        latents={"x": hivi.Latent((2,)), "n": hivi.Latent((), constraints.nonnegative_integer)},
    )
    fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=100, progress=False)
    data = hivi.to_arviz(fit, key=jax.random.key(1), samples=50)
    assert data.posterior["x"].shape == (1, 50, 2)
    assert np.array_equal(data.posterior["x"].values[0], fit.sample(jax.random.key(1), 50)["x"])
    assert list(arviz.summary(data, kind="stats").index) == ["n", "x[0]", "x[1]"]
    with pytest.raises(hivi.FitError, match="samples"):
        hivi.to_arviz(fit, key=jax.random.key(1), samples=0)
