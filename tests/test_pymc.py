"""`from_pymc`: PyMC's own log-density, term by term, and fits against exact answers."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import gammaln

import hivi

HAS_PYMC = importlib.util.find_spec("pymc") is not None
if HAS_PYMC:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pymc as pm

needs_pymc = pytest.mark.skipif(not HAS_PYMC, reason="PyMC is not installed: pip install 'hivi[pymc]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTensor's, of its C compiler and BLAS

KEY = jax.random.key(0)
EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
X = np.linspace(-1.0, 1.0, 15)
Y = 0.5 + 2.0 * X + 0.3 * np.cos(11 * X)
# Coal-mining disasters by year from 1872 on (Jarrett 1979): the rate falls at about 1890.
DISASTERS = np.array([1, 4, 4, 1, 5, 5, 3, 4, 2, 5, 2, 2, 3, 4, 2, 1, 3, 2, 2, 1, 1, 1, 1, 3, 0, 0, 1, 0, 1, 1, 0, 0])


def eight_schools() -> Any:
    with pm.Model(coords={"school": np.arange(8)}) as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        theta = pm.Normal("theta", 0.0, 1.0, dims="school")
        pm.Deterministic("effect", mu + tau * theta)
        pm.Normal("y", mu + tau * theta, ERROR, observed=EFFECT, dims="school")
    return model


def regression() -> Any:
    with pm.Model() as model:
        beta = pm.Normal("beta", 0.0, 10.0, shape=2)
        sigma = pm.HalfNormal("sigma", 1.0)
        pm.Normal("y", beta[0] + beta[1] * X, sigma, observed=Y)
    return model


def coal_mining() -> Any:
    years = np.arange(len(DISASTERS))
    with pm.Model() as model:
        change = pm.DiscreteUniform("change", 0, len(DISASTERS) - 1)
        early = pm.Exponential("early", 1.0)
        late = pm.Exponential("late", 1.0)
        pm.Poisson("disasters", pm.math.switch(change >= years, early, late), observed=DISASTERS)
    return model


def everything() -> Any:
    """Transforms of every kind, discrete latents of every kind, a potential, and `total_size`."""
    with pm.Model() as model:
        share = pm.Beta("share", 2.0, 3.0)
        weights = pm.Dirichlet("weights", np.ones(3))
        bounded = pm.Uniform("bounded", -1.0, 4.0)
        above = pm.TruncatedNormal("above", 0.0, 1.0, lower=-0.5)
        below = pm.TruncatedNormal("below", 0.0, 1.0, upper=2.0)
        inside = pm.Uniform("inside", 0.0, share)
        ordered = pm.Normal(
            "ordered", 0.0, 1.0, shape=3, transform=pm.distributions.transforms.ordered, initval=[-1, 0, 1]
        )
        flags = pm.Bernoulli("flags", 0.3, shape=2)
        topic = pm.Categorical("topic", weights, shape=2)
        heads = pm.Binomial("heads", 5, share)
        count = pm.Poisson("count", 2.0)
        waits = pm.NegativeBinomial("waits", mu=2.0, alpha=1.5)
        trials = pm.Geometric("trials", 0.4)
        pm.Potential("held", -0.1 * pm.math.sqr(bounded - inside))
        mean = bounded + above * flags.sum() + below * heads + ordered[topic].sum() + 0.1 * (count + waits + trials)
        pm.Normal("y", mean, 1.0 + share, observed=X, total_size=60)
    return model


def random_point(target: hivi.Target, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    point = {}
    for s in target.sites:
        high = s.values.low + (s.values.count or 4)
        value = rng.integers(s.values.low, high, s.shape) if s.discrete else rng.normal(size=s.shape)
        point[s.name] = np.asarray(value, np.int32 if s.discrete else np.float64)
    return point


@needs_pymc
@pytest.mark.parametrize("build", [eight_schools, regression, coal_mining, everything])
def test_log_joint_is_pymcs_own(build: Any, x64: None) -> None:
    model = build()
    target = hivi.from_pymc(model)
    theirs = model.compile_logp()
    names = {rv.name: model.rvs_to_values[rv].name for rv in model.free_RVs}
    back = model.compile_fn(model.replace_rvs_by_values(list(model.free_RVs)), inputs=model.value_vars)
    for seed in range(3):
        point = random_point(target, seed)
        expected = theirs({names[n]: v for n, v in point.items()})
        mine = target.log_joint({n: jnp.asarray(v) for n, v in point.items()})
        assert float(mine) == pytest.approx(float(expected), rel=1e-9, abs=1e-8)
        own = target.constrain({n: jnp.asarray(v) for n, v in point.items()})
        for rv, value in zip(model.free_RVs, back({names[n]: v for n, v in point.items()}), strict=True):
            np.testing.assert_allclose(own[rv.name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@needs_pymc
def test_sites_are_in_pymcs_own_space() -> None:
    target = hivi.from_pymc(everything())
    kinds = {s.name: (s.values.kind, s.values.low, s.values.count) for s in target.sites if s.discrete}
    assert kinds == {
        "flags": ("finite", 0, 2), "topic": ("finite", 0, 3), "heads": ("finite", 0, 6), "count": ("count", 0, 0),
        "waits": ("count", 0, 0), "trials": ("count", 1, 0),
    }  # fmt: skip
    fit = hivi.fit(target, hivi.MeanField(), key=KEY, steps=20, progress=False)
    draws = fit.sample(KEY, 50)
    np.testing.assert_allclose(np.asarray(draws["weights"]).sum(-1), 1.0, rtol=1e-5)
    assert np.all(np.asarray(draws["inside"]) <= np.asarray(draws["share"]))
    assert np.all(np.diff(np.asarray(draws["ordered"]), axis=-1) >= 0)
    assert {n: v.shape[1:] for n, v in draws.items()}["weights"] == (3,)


@needs_pymc
def test_terms_stay_local() -> None:
    """Each school's likelihood touches its own effect; the switch point's terms are apart from the prior's."""
    target = hivi.from_pymc(eight_schools())
    text = hivi.explain(target)
    assert "theta[i]" in text
    assert "locality lost: nowhere" in text
    assert dict(target.site("theta").plates) == {"school": 0}
    assert {f.name for f in target.factored.factors} >= {"mu", "tau", "theta", "y"}


@pytest.mark.slow
@needs_pymc
def test_change_point_against_the_exact_answer() -> None:
    """Exponential(1) priors: the rates integrate out, and the switch point's posterior is a sum over 32 values."""
    target = hivi.from_pymc(coal_mining())
    before = np.array([DISASTERS[: k + 1].sum() for k in range(len(DISASTERS))])
    years = np.arange(1, len(DISASTERS) + 1)
    after, left = DISASTERS.sum() - before, len(DISASTERS) - years
    logs = gammaln(before + 1) - (before + 1) * np.log(years + 1) + gammaln(after + 1) - (after + 1) * np.log(left + 1)
    exact = np.exp(logs - logs.max())
    exact /= exact.sum()
    mean = float((exact * np.arange(len(exact))).sum())
    sd = math.sqrt(float((exact * (np.arange(len(exact)) - mean) ** 2).sum()))
    fit = hivi.fit(target, hivi.MeanField(), key=KEY, steps=2000, progress=False)
    draws = np.asarray(fit.sample(KEY, 4000)["change"], float)
    assert draws.mean() == pytest.approx(mean, abs=0.3 * sd)
    early = np.asarray(fit.sample(KEY, 4000)["early"])
    assert early.mean() == pytest.approx(float((exact * (before + 1) / (years + 1)).sum()), abs=0.15)


@needs_pymc
def test_regression_against_quadrature() -> None:
    """Given sigma the weights are conjugate; sigma by quadrature."""
    fit = hivi.fit(hivi.from_pymc(regression()), hivi.FullRank(), key=KEY, steps=4000, progress=False)
    design = np.stack([np.ones_like(X), X], 1)
    grid = np.linspace(0.02, 2.0, 4000)
    logs, means = [], []
    for sigma in grid:
        covariance = 100 * design @ design.T + sigma**2 * np.eye(len(X))
        logs.append(-0.5 * (np.linalg.slogdet(covariance)[1] + Y @ np.linalg.solve(covariance, Y)) - 0.5 * sigma**2)
        means.append(100 * design.T @ np.linalg.solve(covariance, Y))
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    draws = fit.sample(KEY, 8000)
    np.testing.assert_allclose(np.asarray(draws["beta"]).mean(0), weights @ np.array(means), atol=0.02)
    assert np.asarray(draws["sigma"]).mean() == pytest.approx(float(weights @ grid), rel=0.06)


@needs_pymc
def test_importing_the_backend_changes_no_settings() -> None:
    assert not jax.config.jax_enable_x64
    assert "device_count=100" not in os.environ.get("XLA_FLAGS", "")


@needs_pymc
def test_refusals() -> None:
    with pytest.raises(hivi.TargetError, match=r"expected a pymc\.Model"):
        hivi.from_pymc(lambda: None)
    with pm.Model() as hyper:
        n = pm.HyperGeometric("n", 20, 7, 5)
        pm.Normal("y", n, 1.0, observed=3.0)
    with pytest.raises(hivi.TargetError, match="variable 'n': found a discrete HyperGeometric"):
        hivi.from_pymc(hyper)
    with pm.Model() as varying:
        n = pm.Binomial("n", np.array([3, 5]), 0.5)
        pm.Normal("y", n.sum(), 1.0, observed=3.0)
    with pytest.raises(hivi.TargetError, match="variable 'n': found bounds that are not one number"):
        hivi.from_pymc(varying)
    with pm.Model() as small:
        mu = pm.Normal("mu", 0.0, 1.0)
        pm.Normal("y", mu, 1.0, observed=pm.Minibatch(X, batch_size=5), total_size=len(X))
    with pytest.raises(hivi.TargetError, match=r"variable 'y': found random numbers.*from_numpyro"):
        hivi.from_pymc(small)
    with pm.Model() as empty:
        pm.Normal("y", 0.0, 1.0, observed=1.0)
    with pytest.raises(hivi.TargetError, match="without unobserved variables"):
        hivi.from_pymc(empty)


def test_without_pymc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymc", None)
    with pytest.raises(hivi.TargetError, match=r"pip install 'hivi\[pymc\]'"):
        hivi.from_pymc(None)
