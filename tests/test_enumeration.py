"""Sums over the joint values of a site: no noise from it where they are all summed, no bias where they are not."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import hivi
from cases import BOUNDS, TARGETS, built
from hivi._estimators.measured import Setting, moments
from test_unbiased import assert_agrees, means

KEY = jax.random.key(0)


@pytest.mark.parametrize("bound", ["elbo", "outer 3"])
@pytest.mark.parametrize("values", [3, 6])
def test_counts_outside_the_window_keep_the_mean_right(values, bound, x64):
    """Three of a count's values are summed, which leave much of its mass to the draw."""
    target = TARGETS["count"]()
    proposal = built("mean-field", target)
    assert_agrees(means(target, proposal, {"z": hivi.Enumeration(values)}, BOUNDS[bound], 1, 14), rounding=1e-4)


def test_a_window_alone_would_be_biased(x64, monkeypatch):
    """The control: without the draw outside, the same check fails."""
    target = TARGETS["count"]()
    plain = hivi.Enumeration.measure

    def cut(self: Any, *args: Any) -> Any:
        weights, outside, change = plain(self, *args)
        return weights, 0 * outside, change

    monkeypatch.setattr(hivi.Enumeration, "measure", cut)
    with pytest.raises(AssertionError):
        assert_agrees(
            means(target, built("mean-field", target), {"z": hivi.Enumeration(3)}, BOUNDS["elbo"], 1, 14), rounding=1e-4
        )


@pytest.mark.parametrize("name", ["triple", "counts"])
def test_a_mean_field_gradient_has_hardly_any_noise(name):
    target = TARGETS[name]()
    setting = Setting(target, built("mean-field", target), hivi.Elbo(), 4)
    best = {"triple": hivi.LocalExpectation(), "counts": hivi.Difference()}[name]
    noise = {s: float(jnp.sum(moments(setting, {"z": s}, KEY, 256)[1])) for s in (hivi.Enumeration(), best)}
    assert noise[hivi.Enumeration()] < 1e-4 * noise[best]


def test_impossible_values_of_no_weight_are_no_obstacle():
    """Where q has left an impossible value, no NaN comes from 0 times -inf."""
    table = jnp.log(jnp.array([[0.0, 0.0], [0.2, 0.8]]))
    target = hivi.from_log_joint(
        lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), dist.constraints.boolean)}
    )
    proposal = eqx.tree_at(lambda p: p.lam, built("mean-field", target), {"z": jnp.array([[200.0], [0.3]])})
    gradient = moments(Setting(target, proposal, hivi.Elbo(), 2), {"z": hivi.Enumeration()}, KEY, 8)[0]
    share = jax.nn.sigmoid(0.3)
    np.testing.assert_allclose(gradient, [0.0, share * (1 - share) * (jnp.log(0.8 / 0.2) - 0.3)], atol=1e-6)


@pytest.mark.slow
def test_auto_measures_it():
    """A cluster whose exact local expectations are dear and whose joint values are few."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3,) * 3), jnp.float32)
    target = hivi.from_log_joint(
        lambda z: table[tuple(z["z"])], {"z": hivi.Latent((3,), dist.constraints.integer_interval(0, 2))}
    )
    fit = hivi.fit(target, hivi.MeanField(), key=KEY, estimator=hivi.Auto(cheap=0), samples=2, steps=5, progress=False)
    assert fit.strategies == {"z": "Enumeration"}


def test_what_it_refuses():
    options: dict[str, Any] = {"key": KEY, "estimator": hivi.Enumeration(8), "steps": 5, "progress": False}
    with pytest.raises(hivi.FitError, match=r"'z'.*4 coordinates have more than 8 joint values"):
        hivi.fit(TARGETS["chain"](), hivi.MeanField(), **options)

    def model(y: Any) -> None:
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    small = hivi.from_numpyro(model, jnp.zeros(8), subsample={"rows": 2})
    with pytest.raises(hivi.FitError, match=r"'z'.*rows"):
        hivi.fit(small, hivi.MeanField(), **options)
