"""Draws, likelihoods, predictions and statistics in ArviZ's container, and ArviZ's own functions on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import hivi
from hivi._arviz import before_one, load_arviz

arviz = load_arviz()
KEY = jax.random.key(1)
BEFORE_ONE = before_one(arviz)
X = np.linspace(-1.0, 1.0, 12)
Y = 1.5 * X + 0.4 * np.cos(9 * X)

pytestmark = pytest.mark.filterwarnings("ignore")  # of ArviZ, matplotlib and xarray, release by release


def regression(x: Any, y: Any, jitter: float = 0.0) -> None:
    """Two groups of slopes, a discrete switch, a deterministic value and a factor."""
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("group", 2):
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
    on = numpyro.sample("on", dist.Bernoulli(0.5))
    numpyro.deterministic("total", slope.sum())
    numpyro.factor("soft", -jitter * slope**2)
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(slope[0] * x + on * slope[1], noise + 0.1), obs=y)


@pytest.fixture(scope="module")
def fit() -> hivi.Fit:
    target = hivi.from_numpyro(regression, jnp.asarray(X), jnp.asarray(Y), jitter=0.01)
    return hivi.fit(target, hivi.MeanField(), key=KEY, steps=1500, progress=False)


@pytest.fixture(scope="module")
def data(fit: hivi.Fit) -> Any:
    return hivi.to_arviz(fit, key=KEY, samples=200, khat=True)


def group(data: Any, name: str) -> Any:
    return data[name]


def test_groups_hold_what_the_model_says(fit: hivi.Fit, data: Any) -> None:
    draws = fit.sample(KEY, 200)
    posterior = group(data, "posterior")
    assert set(posterior.data_vars) == {"noise", "slope", "on", "total"}
    np.testing.assert_array_equal(posterior["slope"].values[0], draws["slope"])
    np.testing.assert_allclose(posterior["total"].values[0], draws["slope"].sum(1), rtol=1e-5)
    likelihood = group(data, "log_likelihood")
    assert set(likelihood.data_vars) == {"y"}  # not the factor
    mean = draws["slope"][:, :1] * X + draws["on"][:, None] * draws["slope"][:, 1:]
    expected = dist.Normal(mean, draws["noise"][:, None] + 0.1).log_prob(Y)
    np.testing.assert_allclose(likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(group(data, "observed_data")["y"].values, Y, rtol=1e-6)


def test_predictions_are_new_observations(fit: hivi.Fit, data: Any) -> None:
    """Their mean is that of the regression, within 4 standard errors, and they are not the data."""
    predicted = group(data, "posterior_predictive")["y"].values[0]
    assert predicted.shape == (200, 12)
    assert np.all(predicted.std(0) > 0.05)
    draws = {n: np.asarray(v) for n, v in fit.sample(KEY, 200).items()}
    mean = draws["slope"][:, :1] * X + draws["on"][:, None] * draws["slope"][:, 1:]
    error = (predicted - mean).mean(0) / ((draws["noise"] + 0.1).mean() / np.sqrt(200))
    assert np.abs(error).max() < 4


def test_plates_are_dimensions(data: Any) -> None:
    assert group(data, "posterior")["slope"].dims == ("chain", "draw", "group")
    assert group(data, "posterior_predictive")["y"].dims == ("chain", "draw", "row")
    assert group(data, "log_likelihood")["y"].dims == ("chain", "draw", "row")
    assert group(data, "observed_data")["y"].dims == ("row",)
    np.testing.assert_array_equal(group(data, "posterior")["group"].values, [0, 1])


def test_statistics(fit: hivi.Fit, data: Any) -> None:
    found = group(data, "posterior").attrs
    assert found["family"] == "MeanField()"
    assert found["converged"] == int(fit.converged)
    assert found["steps"] == len(fit.history["step"])
    assert found["bound"] == pytest.approx(fit.elbo(KEY).mean, abs=0.5)
    assert found["k_hat_exact"] == 1
    assert np.isfinite(found["k_hat"])


def test_arviz_own_tables_and_plots(data: Any, tmp_path: Path) -> None:
    table = arviz.summary(data, kind="stats")
    assert {"noise", "on", "slope[0]", "slope[1]", "total"} == set(table.index)
    assert np.isfinite(float(arviz.loo(data).elpd_loo if BEFORE_ONE else arviz.loo(data).elpd))
    if BEFORE_ONE:
        arviz.plot_posterior(data, var_names=["noise", "slope"])
        arviz.plot_pair(data, var_names=["noise", "slope"])
        arviz.plot_ppc(data, num_pp_samples=10)
    else:
        arviz.plot_dist(data, var_names=["noise", "slope"])
        arviz.plot_pair(data, var_names=["noise", "slope"])
        arviz.plot_ppc_dist(data, num_samples=10)
    data.to_netcdf(str(tmp_path / "posterior.nc"))
    assert "log_likelihood" in str(arviz.from_netcdf(str(tmp_path / "posterior.nc")))


def test_groups_can_be_left_out(fit: hivi.Fit) -> None:
    bare = hivi.to_arviz(fit, key=KEY, samples=20, log_likelihood=False, predictive=False)
    names = set(bare.groups()) if BEFORE_ONE else set(bare.children)
    assert names == {"posterior", "observed_data"}


def test_a_plain_log_joint_has_draws_only() -> None:
    target = hivi.from_log_joint(
        lambda z: {"x": -0.5 * z["x"] ** 2, "n": -0.5 * z["n"]},
        latents={"x": hivi.Latent((2,), plates={"pair": -1}), "n": hivi.Latent((), constraints.nonnegative_integer)},
    )
    fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=100, progress=False)
    data = hivi.to_arviz(fit, key=jax.random.key(1), samples=50)
    assert group(data, "posterior")["x"].shape == (1, 50, 2)
    assert group(data, "posterior")["x"].dims[-1] == "pair"
    assert (set(data.groups()) if BEFORE_ONE else set(data.children)) == {"posterior"}
    assert np.array_equal(data.posterior["x"].values[0], fit.sample(jax.random.key(1), 50)["x"])
    assert sorted(arviz.summary(data, kind="stats").index) == ["n", "x[0]", "x[1]"]
    with pytest.raises(hivi.FitError, match="samples"):
        hivi.to_arviz(fit, key=jax.random.key(1), samples=0)


def test_a_loaded_fit_without_target_has_draws_and_statistics(fit: hivi.Fit, tmp_path: Path) -> None:
    data = hivi.to_arviz(hivi.load(fit.save(tmp_path / "run")), key=KEY, samples=20)
    assert (set(data.groups()) if BEFORE_ONE else set(data.children)) == {"posterior"}
    assert group(data, "posterior").attrs["family"] == "MeanField()"


def test_names_that_clash() -> None:
    """A plate named like ArviZ's own dimension, an event axis, and an observation with event axes."""

    def model(y: Any) -> None:
        with numpyro.plate("draw", 2):
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            numpyro.sample("w", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.MultivariateNormal(b, jnp.eye(2)), obs=y)

    target = hivi.from_numpyro(model, jnp.zeros((4, 2)))
    fit = hivi.fit(target, hivi.MeanField(), key=KEY, steps=50, progress=False)
    data = hivi.to_arviz(fit, key=KEY, samples=5)
    assert group(data, "posterior")["b"].dims == ("chain", "draw", "draw_plate")
    assert group(data, "posterior")["w"].dims == ("chain", "draw", "draw_plate", "w_dim_1")
    assert group(data, "log_likelihood")["y"].dims == ("chain", "draw", "rows")


def test_a_model_that_runs_only_under_hivi_has_draws_and_the_reason() -> None:
    """NumPyro refuses a plate with the name of a site; hivi reads it."""

    def model(y: Any) -> None:
        with numpyro.plate("b", 2):
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(b.sum(), 1.0), obs=y)

    fit = hivi.fit(hivi.from_numpyro(model, jnp.zeros(())), hivi.MeanField(), key=KEY, steps=50, progress=False)
    data = hivi.to_arviz(fit, key=KEY, samples=5)
    assert group(data, "posterior")["b"].dims == ("chain", "draw", "b_plate")
    assert "unique names" in group(data, "posterior").attrs["omitted"]
    with pytest.raises(AssertionError, match="unique names"):
        hivi.to_arviz(fit, key=KEY, samples=5, predictive=True)


def test_minibatches_have_draws_only() -> None:
    target = hivi.from_numpyro(regression, jnp.asarray(X), jnp.asarray(Y), subsample={"row": 4})
    fit = hivi.fit(target, hivi.MeanField(), key=KEY, steps=50, progress=False)
    data = hivi.to_arviz(fit, key=KEY, samples=5)
    assert (set(data.groups()) if BEFORE_ONE else set(data.children)) == {"posterior"}


def test_origins_compile_nothing_anew() -> None:
    """Targets of the same model with other data are equal but for their data, so that programs are shared."""
    first = hivi.from_numpyro(regression, jnp.asarray(X), jnp.asarray(Y))
    second = hivi.from_numpyro(regression, jnp.asarray(X), jnp.asarray(2 * Y))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(jax.tree.structure(first)) == hash(jax.tree.structure(second))


def test_several_observations_of_one_distribution():
    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    fit = hivi.fit(hivi.from_numpyro(model, jnp.array([0.3, 1.2])), hivi.MeanField(), key=KEY, steps=50, progress=False)
    data = hivi.to_arviz(fit, key=KEY, samples=20)
    assert data.log_likelihood["y"].shape == (1, 20, 2)
    assert "y" not in getattr(data, "posterior_predictive", {})
    assert "predictions of y" in data.posterior.attrs["omitted"]

    def plate():
        with numpyro.plate("p", 5):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=0.3)

    fit = hivi.fit(hivi.from_numpyro(plate), hivi.MeanField(), key=KEY, steps=50, progress=False)
    assert hivi.to_arviz(fit, key=KEY, samples=20).posterior_predictive["y"].shape == (1, 20, 5)


def test_two_processes_that_import_arviz_for_the_first_time_of_a_day(monkeypatch):
    """The slower finds that the file with the date is gone; a second import finds the date."""
    tried = []

    def race(name):
        tried.append(name)
        if len(tried) == 1:
            raise FileNotFoundError("daily_warning.tmp")
        return arviz

    monkeypatch.setattr("hivi._arviz.importlib.import_module", race)
    assert load_arviz() is arviz
    assert tried == ["arviz", "arviz"]
