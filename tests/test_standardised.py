"""Starts at the best Gaussian, and families in coordinates that it standardises."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import hivi
from hivi._fit.gaussian_start import base_draws, best_gaussian, gaussian_start

KEY = jax.random.key(0)
NORMALISER = 0.5 * np.log(2 * np.pi)


def badly_scaled() -> tuple[hivi.Target, np.ndarray, np.ndarray]:
    """A Gaussian whose standard deviations span five powers of ten, correlated, and far from zero."""
    rng = np.random.default_rng(3)
    root = np.tril(rng.normal(size=(6, 6)), -1) * 0.5 + np.eye(6)
    scale = np.array([1e-2, 1.0, 300.0, 5.0, 0.1, 40.0])
    root, mean = scale[:, None] * root, 20 * scale * rng.normal(size=6)
    # In standardised units, so that single precision serves.
    inverse, units = jnp.asarray(np.linalg.inv(root) * scale), jnp.asarray(scale)

    def log_joint(z: Any) -> Any:
        return -0.5 * jnp.sum((inverse @ ((z["x"] - jnp.asarray(mean)) / units)) ** 2)

    return hivi.from_log_joint(log_joint, {"x": hivi.Latent((6,))}), mean, root


def funnel() -> None:
    scale = numpyro.sample("v", dist.Normal(0.0, 1.5))
    numpyro.sample("x", dist.Normal(0.0, jnp.exp(0.5 * scale)).expand([2]).to_event(1))


def mixture() -> None:
    """Negative curvature between two modes, at the centre of every start."""
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    ends = jnp.stack([dist.Normal(m, 1.0).log_prob(x[0]) for m in (-4.0, 4.0)])
    numpyro.factor("two", jax.scipy.special.logsumexp(ends) + dist.Normal(0.0, 3.0).log_prob(x[1]))


def test_base_draws_have_the_moments_of_the_standard_normal():
    draws = np.asarray(base_draws(5, KEY), float)
    np.testing.assert_allclose(draws.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(draws.T @ draws / len(draws), np.eye(5), atol=1e-5)


def test_the_start_is_exact_for_a_gaussian():
    target, mean, root = badly_scaled()
    found = gaussian_start(target, target.sites, KEY)
    sd = np.sqrt(np.sum(root**2, 1))
    np.testing.assert_allclose((np.asarray(found.location) - mean) / sd, 0, atol=1e-3)
    standard = np.linalg.solve(root, np.asarray(found.factor, float))
    np.testing.assert_allclose(standard @ standard.T, np.eye(6), atol=5e-3)
    assert float(found.bound) == pytest.approx(np.log(np.diagonal(root)).sum() + 6 * NORMALISER, abs=2e-3)


def test_the_start_is_the_best_gaussian_of_a_funnel(x64):
    """Against the optimum of the bound in closed form, its one free number found by a grid.

    E log p of a Gaussian with independent v ~ N(m, s^2) and x ~ N(0, t^2): the optimal t^2 is 1/E exp(-v).
    """
    target = hivi.from_numpyro(funnel)
    found = gaussian_start(target, target.sites, KEY)
    m, s = np.meshgrid(np.linspace(-3, 3, 1201), np.linspace(0.2, 2, 901), indexing="ij")
    log_t2 = m - s**2 / 2
    bound = -(m**2 + s**2) / (2 * 1.5**2) - m - 1 - np.log(1.5) - 3 * NORMALISER + np.log(s) + log_t2
    bound = bound + 1.5 + 3 * NORMALISER
    # Over other draws than those it was found with; the noise of a mean of 4096 terms, twice.
    fresh = hivi.fit(target, hivi.FullRank(), key=KEY, steps=1, progress=False).elbo(jax.random.key(9), 65_536)
    assert fresh.stderr < 0.01
    assert fresh.mean == pytest.approx(bound.max(), abs=0.03 + 4 * fresh.stderr)
    assert float(found.bound) == pytest.approx(bound.max(), abs=0.1)


def test_negative_curvature_does_not_stop_the_search():
    target = hivi.from_numpyro(mixture)
    found = gaussian_start(target, target.sites, KEY)
    one_mode = jnp.abs(found.location[0]) > 3
    both_modes = found.factor[0, 0] > 2
    assert bool(one_mode | both_modes)
    assert float(found.factor[1, 1]) == pytest.approx(3.0, rel=0.02)


def test_a_target_that_is_finite_nowhere_leaves_a_narrow_start():
    target = hivi.from_log_joint(lambda z: jnp.log(z["x"] - 1e6), {"x": hivi.Latent()})
    location, factor = best_gaussian(target, target.sites, KEY)
    assert np.isfinite(location).all()
    assert float(factor[0, 0]) == pytest.approx(0.1)
    with pytest.raises(hivi.TargetError):
        hivi.fit(target, key=KEY, progress=False)


@pytest.mark.parametrize("family", [hivi.FullRank(), hivi.Standardised()], ids=["full-rank", "standardised"])
def test_a_gaussian_posterior_is_right_from_the_start(family):
    target, mean, root = badly_scaled()
    fit = hivi.fit(target, family, key=KEY, steps=200, progress=False)
    draws = np.asarray(fit.sample(jax.random.key(1), 20_000)["x"], float)
    standard = np.linalg.solve(root, (draws - mean).T)
    np.testing.assert_allclose(standard.mean(1), 0, atol=0.04)
    np.testing.assert_allclose(np.cov(standard), np.eye(6), atol=0.05)


def test_the_default_learns_what_no_gaussian_has():
    """A funnel in three dimensions: log Z is 0, and the best Gaussian is half a nat below it."""
    target = hivi.from_numpyro(funnel)
    gaussian = hivi.fit(target, hivi.FullRank(), key=KEY, steps=200, progress=False).elbo(KEY, 16_384)
    fit = hivi.fit(target, key=KEY, steps=1500, progress=False)
    assert isinstance(fit.family, hivi.Standardised)
    assert fit.strategies == {"v": "StickTheLanding", "x": "StickTheLanding"}
    found = fit.elbo(KEY, 16_384)
    assert gaussian.mean < -0.3
    assert -0.06 < found.mean < 4 * found.stderr


def test_saved_with_its_start(tmp_path):
    target, _, _ = badly_scaled()
    fit = hivi.fit(target, key=KEY, steps=100, progress=False)
    again = hivi.load(fit.save(tmp_path))
    np.testing.assert_array_equal(*(f.sample(KEY, 20)["x"] for f in (fit, again)))
    z = fit.sample(KEY, 5)
    np.testing.assert_allclose(*(f.log_prob(z, key=KEY) for f in (fit, again)), rtol=1e-6)


@pytest.mark.slow
def test_one_coordinate_takes_splines():
    target = hivi.from_log_joint(
        lambda z: dist.Gamma(2.0, 1.0).log_prob(z["r"]), {"r": hivi.Latent((), dist.constraints.positive)}
    )
    fit = hivi.fit(target, key=KEY, steps=600, progress=False)
    assert fit.elbo(KEY, 16_384).mean == pytest.approx(0.0, abs=0.02)


def test_minibatches_take_a_gaussian_and_discrete_sites_are_refused():
    def model(y: Any) -> None:
        m = numpyro.sample("m", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    target = hivi.from_numpyro(model, jnp.linspace(-1.0, 3.0, 64), subsample={"rows": 16})
    assert hivi.fit(target, key=KEY, steps=10, progress=False).family == hivi.FullRank()
    discrete = hivi.from_log_joint(lambda z: 0.5 * z["z"], {"z": hivi.Latent((), dist.constraints.boolean)})
    with pytest.raises(hivi.FamilyError, match=r"Standardised at site 'z'"):
        hivi.fit(discrete, hivi.Standardised(), key=KEY, progress=False)


@pytest.mark.slow
def test_posteriors_with_reference_draws(hivi_data: Path, x64):
    """Two of posteriordb's, with the default: means and standard deviations of 10,000 reference draws."""
    folder = hivi_data / "posteriordb"
    sys.path.insert(0, os.fspath(folder))
    try:
        import models
        import score
    finally:
        sys.path.pop(0)
    for name in ("kidiq-kidscore_interaction", "arK-arK"):
        data = json.loads((folder / name / "data.json").read_text())
        reference = dict(np.load(folder / name / "reference.npz"))
        model = models.MODELS[name]
        fit = hivi.fit(hivi.from_numpyro(lambda d=data, m=model: m(d)), key=KEY, progress=False)
        names = [k for k in reference if not k.startswith("__")]
        found = score.score(models.to_stan(fit.sample(jax.random.key(1), 10_000), names), reference)
        assert found["mean_max"] < 0.06
        assert found["logsd_max"] < 0.05


def test_a_posterior_without_end_is_refused():
    ridge = hivi.from_log_joint(lambda z: -0.5 * (z["a"] + z["b"]) ** 2, {"a": hivi.Latent(), "b": hivi.Latent()})
    with pytest.raises(hivi.TargetError, match=r"site '[ab]'.*proper"):
        hivi.fit(ridge, key=KEY, progress=False)
    for seed in range(4):  # by whichever way rounding goes
        assert np.isfinite(gaussian_start(ridge, ridge.sites, jax.random.key(seed)).bound)
        with pytest.raises(hivi.TargetError, match="proper"):
            best_gaussian(ridge, ridge.sites, jax.random.key(seed))
