"""Integers in long ranges: tables, binomials of free spread, and categories, which are in no order."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.distributions import constraints

import hivi
from hivi._families.base import AbstractFamily
from hivi._families.checks import with_tables
from hivi._families.hierarchical import with_spread
from hivi._fit.loop import default_family
from hivi._likelihood import likelihood
from hivi._likelihoods.marginals import BinomialMarginal
from hivi._space import Site, Values

YEARS = 111
QUIET = {"key": jax.random.key(0), "progress": False}


def change_point(before: float = 2.2, after: float = 1.2) -> hivi.Target:
    """Counts whose rate falls in year 40 of 111; the year is uniform, the rates known. Its posterior has several modes."""
    y = jnp.asarray(np.random.default_rng(0).poisson(np.where(np.arange(YEARS) < 40, before, after)))

    def model() -> None:
        change = numpyro.sample("change", dist.DiscreteUniform(0, YEARS - 1))
        numpyro.sample("y", dist.Poisson(jnp.where(jnp.arange(YEARS) < change, before, after)).to_event(1), obs=y)

    return hivi.from_numpyro(model)


def exactly(target: hivi.Target, site: str) -> tuple[float, np.ndarray]:
    """log Z and the posterior of the only site."""
    values = target.site(site).values
    z = values.low + jnp.arange(values.count)
    log_p = np.asarray(jax.vmap(lambda v: target.log_joint({site: v}))(z), float)
    log_z = np.logaddexp.reduce(log_p)
    return float(log_z), np.exp(log_p - log_z)


@pytest.mark.parametrize("logit", [-8.0, -3.0, 0.0, 1.0, 6.0])
@pytest.mark.parametrize("trials", [64, 1000])
def test_the_plain_spread_is_nearly_binomial(trials, logit):
    marginal = BinomialMarginal(2, trials + 1)
    z = 2 + jnp.arange(trials + 1)
    theta = jnp.broadcast_to(jnp.array([logit, 0.0]), (trials + 1, 2))
    found = scipy.stats.norm.cdf(np.asarray(marginal.thresholds(theta, z)[1], float))
    p = 1 / (1 + np.exp(-logit))
    right = scipy.stats.binom.cdf(np.arange(trials + 1), trials, p)
    usual = trials * min(p, 1 - p) >= 5
    np.testing.assert_allclose(found, right, atol=5e-4 if usual else 0.013)


@pytest.mark.parametrize("logit", [-14.0, -4.0, -0.3, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("free", [-3.0, 0.0, 3.0])
def test_thresholds_rise(logit, free, x64):
    """As far as any draw goes, and at a wide spread (c = 1/2) with a probability of 1e-7 beyond it."""
    for count in (65, 112, 5001):
        marginal = BinomialMarginal(0, count)
        theta = jnp.broadcast_to(jnp.array([logit, free]), (count, 2))
        below, above = (np.asarray(t) for t in marginal.thresholds(theta, jnp.arange(count)))
        np.testing.assert_array_equal(below[1:], above[:-1])
        near = np.abs(above) < 5.3
        assert (np.diff(above)[near[1:]] >= 0).all()
        assert below[0] < -40
        assert above[-1] > 40


def test_spread_and_moments_are_each_others_inverse():
    marginal = BinomialMarginal(3, 112)
    theta = marginal.plain(jnp.array([20.0, 60.0, 100.0]))
    np.testing.assert_allclose(3 + 111 * jax.nn.sigmoid(theta[:, 0]), [20.0, 60.0, 100.0], rtol=1e-5)
    wanted = jnp.array([2.0, 0.5, 30.0])
    np.testing.assert_allclose(marginal.moments(marginal.spread(theta, wanted))[1], wanted, rtol=1e-3)


@pytest.mark.parametrize(
    "family",
    [pytest.param(None, marks=pytest.mark.slow, id="default"), pytest.param(hivi.MeanField(), id="mean-field")],
)
def test_one_long_range_is_exact(family):
    target = change_point()
    log_z, posterior = exactly(target, "change")
    fit = hivi.fit(target, family, **QUIET)
    assert fit.elbo(jax.random.key(1)).mean == pytest.approx(log_z, abs=2e-3)
    found = np.bincount(fit.sample(jax.random.key(2), 20_000)["change"], minlength=YEARS) / 20_000
    assert 0.5 * np.abs(found - posterior).sum() < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("grown", [False, True])
def test_a_hierarchy_narrows(grown):
    """A plain binomial of 110 trials has a standard deviation of 5; this posterior's is less than half of it."""
    target = change_point(3.1, 0.9)
    log_z, _ = exactly(target, "change")
    start = hivi.fit(target, hivi.MeanField(), **QUIET) if grown else None
    free = hivi.fit(target, hivi.Hierarchical(prior=hivi.FullRank(), start=start, dispersed=True), **QUIET)
    plain = hivi.fit(target, hivi.Hierarchical(prior=hivi.FullRank(), start=start), **QUIET)
    worst = log_z - plain.elbo(jax.random.key(1)).mean
    assert log_z - free.elbo(jax.random.key(1)).mean < 0.5 * worst
    if grown:
        found = hivi.curvature(start, key=jax.random.key(3))
        along = hivi.fit(target, hivi.Hierarchical(prior=hivi.FullRank(), start=found, dispersed=True), **QUIET)
        assert log_z - along.elbo(jax.random.key(1)).mean < 0.5 * worst
        assert start.elbo(jax.random.key(1)).mean == pytest.approx(log_z, abs=2e-3), "what it grew from stays as it was"


def test_a_table_becomes_a_count_of_the_same_mean_and_variance():
    values = Values("binomial", 5, 112, dispersed=True)
    site = Site("z", (2,), values, (2,))
    z = 5 + np.arange(112)
    logits = np.stack([-0.5 * (z - 40) ** 2 / 9.0, -0.5 * (z - 100) ** 2 / 2.0])
    lam = with_spread(site, jnp.asarray(logits, jnp.float32))
    draws = np.asarray(jax.vmap(lambda k: likelihood(site).sample(lam, k))(jax.random.split(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(draws.mean(0), [40.0, 100.0], atol=0.3)
    np.testing.assert_allclose(draws.std(0), [3.0, np.sqrt(2.0)], rtol=0.08)
    plain = with_spread(Site("z", (2,), Values("binomial", 5, 112), (2,)), jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(5 + 111 * jax.nn.sigmoid(plain[:, 0]), [40.0, 100.0], rtol=1e-3)


def test_categories_are_in_no_order():
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, 100), jnp.float32)

    def model() -> None:
        numpyro.sample("k", dist.Categorical(logits=logits))

    target = hivi.from_numpyro(model)
    assert target.site("k").values == Values("finite", 0, 100)
    fit = hivi.fit(target, **QUIET)
    assert fit.elbo(jax.random.key(1)).mean == pytest.approx(0.0, abs=2e-3)


def of(shape: tuple[int, ...], last: int) -> hivi.Target:
    """Integers 0 to `last` without a preference."""
    return hivi.from_log_joint(
        lambda z: 0.0 * jnp.sum(z["z"]), {"z": hivi.Latent(shape, constraints.integer_interval(0, last))}
    )


@pytest.mark.parametrize(
    ("shape", "last", "table", "default"),
    [
        ((), 63, True, hivi.MeanField()),
        ((2,), 63, True, hivi.Mixture(8)),
        ((), 200, True, hivi.MeanField()),
        ((2,), 200, True, hivi.Mixture(8, dispersed=True)),
        ((), 1024, False, hivi.Mixture(8, dispersed=True)),
        ((100,), 200, False, hivi.Mixture(8, dispersed=True)),
    ],
)
def test_which_q_a_range_gets(shape: tuple[int, ...], last: int, table: bool, default: AbstractFamily):
    target = of(shape, last)
    assert (with_tables(target.sites)[0].values.kind == "finite") == table
    assert default_family(target) == default


@pytest.mark.parametrize("last", [300, 1000])
def test_one_variable_of_many_values_is_summed_over(last):
    """Beyond the budget of evaluations: the score function would leave it where it started."""
    latents = {"k": hivi.Latent((), constraints.integer_interval(0, last))}
    target = hivi.from_log_joint(lambda z: -0.05 * (z["k"] - 0.9 * last) ** 2, latents)
    assert "LocalExpectation" in hivi.Auto().explain(target, hivi.MeanField())
    fit = hivi.fit(target, key=jax.random.key(0), progress=False)
    assert fit.elbo(jax.random.key(1)).mean == pytest.approx(0.5 * np.log(np.pi / 0.05), abs=1e-3)
    data = jnp.ones(100_000)
    dear = hivi.from_log_joint(lambda z: -jnp.sum((z["k"] - 0.9 * last * data) ** 2), latents)
    assert "exact would cost" in hivi.Auto().explain(dear, hivi.MeanField())


def test_what_auto_says_of_a_table():
    assert re.search(r"z  shape \(2,\)  integers \d+ to \d+  plates", hivi.explain(of((2,), 100)))
    text = hivi.Auto().explain(of((2,), 100), hivi.MeanField())
    assert "every value summed" in text
    assert "difference identity" in hivi.Auto().explain(of((2,), 100), hivi.Hierarchical(dispersed=True))


def test_an_inference_network_of_tables_serves_unseen_rows():
    y = jnp.linspace(5.0, 95.0, 12)

    def model(y):
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.DiscreteUniform(0, 100))
            numpyro.sample("y", dist.Normal(1.0 * z, 5.0), obs=y)

    family = hivi.Amortised(hivi.MeanField(), data=y[:, None] / 50, hidden=4)
    fit = hivi.fit(hivi.from_numpyro(model, y), family, key=jax.random.key(0), steps=300, progress=False)
    again = fit.rows(y[:, None] / 50)
    here, there = (f.sample(jax.random.key(1), 500)["z"].mean(0) for f in (fit, again))
    np.testing.assert_allclose(there, here, atol=1e-3)
