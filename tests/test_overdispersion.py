"""Counts whose q is wider or narrower than Poisson: gradients of the bound, what it gains, and refusals."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jaxtyping import Array
from numpyro.distributions import NegativeBinomial2, Normal, Poisson, constraints

import hivi
from hivi._errors import FamilyError, FitError
from hivi._estimators.surrogate import surrogate
from hivi._families.product import build_proposal


def wide() -> hivi.Target:
    """A geometric-like count with mean 3 and variance 12, normalised."""
    prior = NegativeBinomial2(3.0, 1.0)
    return hivi.from_log_joint(
        lambda z: prior.log_prob(z["z"]), {"z": hivi.Latent((), constraints.nonnegative_integer)}
    )


def gap(family: Any) -> float:
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 1500, "progress": False}
    return -hivi.fit(wide(), family, **options).elbo(jax.random.key(1), samples=20_000).mean


@pytest.mark.slow
def test_the_right_concentration_is_exact_and_poisson_is_not():
    assert abs(gap(hivi.MeanField(concentration=1.0))) < 0.01
    assert gap(hivi.MeanField()) > 0.2


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(hivi.MeanField(concentration=2.5), marks=pytest.mark.slow, id="NB"),
        pytest.param(hivi.MeanField(dispersed=True), id="free"),
    ],
)
def test_gradient_against_the_sum_over_the_support(family: hivi.MeanField):
    target, z = wide(), jnp.arange(400)
    proposal = build_proposal(family, target.sites, jax.random.key(0))
    if family.dispersed:
        proposal = eqx.tree_at(lambda p: p.lam["z"], proposal, jnp.array([0.8, 0.3]))

    def exact(p: Any) -> Array:
        given = p.conditionals(p.parameters())["z"]
        log_q = given.likelihood.log_prob(jnp.broadcast_to(given.lam, (400, given.lam.shape[-1])), z)
        log_p = jax.vmap(lambda v: target.log_joint({"z": v}))(z)
        return jnp.sum(jnp.exp(log_q) * (log_p - log_q))

    def draw(key: Array, strategy: Any) -> Array:
        return eqx.filter_grad(lambda p: surrogate(p, target, {"z": strategy}, hivi.Elbo(), key, 2)[0])(proposal).lam[
            "z"
        ]

    right = np.asarray(eqx.filter_grad(exact)(proposal).lam["z"], float)
    keys = jax.random.split(jax.random.key(3), 20_000)
    for strategy in (hivi.Difference(), hivi.Score()):
        found = np.asarray(jax.jit(jax.vmap(lambda k, s=strategy: draw(k, s)))(keys), float)
        stderr = found.std(0, ddof=1) / np.sqrt(len(found))
        assert stderr.max() < 0.05 * abs(right).max(), "not precise enough to judge"
        assert (abs(found.mean(0) - right) < 4.5 * stderr).all()


@pytest.mark.slow
def test_a_hierarchy_takes_it_and_a_saved_run_keeps_it(tmp_path):
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 200, "progress": False}
    family = hivi.Hierarchical(prior=hivi.FullRank(), concentration=1.0)
    fit = hivi.fit(wide(), family, **options)
    fit.save(tmp_path / "run")
    again = hivi.load(tmp_path / "run")
    np.testing.assert_array_equal(again.sample(jax.random.key(1), 50)["z"], fit.sample(jax.random.key(1), 50)["z"])


def narrow(prior: float = 20.0, y: float = 17.2, noise: float = 0.8) -> tuple[hivi.Target, float]:
    """A count seen almost exactly, and its log evidence."""
    z = np.arange(200)
    exact = float(np.log(np.sum(scipy.stats.poisson.pmf(z, prior) * scipy.stats.norm.pdf(y, z, noise))))
    log_joint = lambda v: {"z": Poisson(prior).log_prob(v["z"]), "y": Normal(1.0 * v["z"], noise).log_prob(y)}  # noqa: E731
    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((), constraints.nonnegative_integer)}), exact


def test_a_count_narrower_than_a_poisson_needs_a_free_spread():
    target, exact = narrow()
    options: dict[str, Any] = {"key": jax.random.key(0), "progress": False}
    assert hivi.fit(target, hivi.MeanField(), **options).elbo(jax.random.key(1)).mean < exact - 5
    fit = hivi.fit(target, hivi.MeanField(dispersed=True), **options)
    assert abs(fit.elbo(jax.random.key(1)).mean - exact) < 0.01
    values = np.asarray(fit.sample(jax.random.key(2), 20_000)["z"])
    weights = scipy.stats.poisson.pmf(np.arange(200), 20.0) * scipy.stats.norm.pdf(17.2, np.arange(200), 0.8)
    found = np.bincount(values, minlength=200) / len(values)
    assert 0.5 * np.abs(found - weights / weights.sum()).sum() < 0.03


@pytest.mark.slow
def test_the_default_for_counts_narrows_and_hierarchies_grow_from_poissons(tmp_path):
    target, exact = narrow()
    options: dict[str, Any] = {"key": jax.random.key(0), "progress": False}
    fit = hivi.fit(target, **options)
    assert abs(fit.elbo(jax.random.key(1)).mean - exact) < 0.05
    first = hivi.fit(target, hivi.MeanField(), **options)
    found = hivi.curvature(first, key=jax.random.key(3))
    for start in (first, found):
        grown = hivi.fit(target, hivi.Hierarchical(prior=hivi.FullRank(), start=start, dispersed=True), **options)
        assert abs(grown.elbo(jax.random.key(1)).mean - exact) < 0.05
    fit.save(tmp_path / "run")
    again = hivi.load(tmp_path / "run")
    np.testing.assert_array_equal(again.sample(jax.random.key(1), 50)["z"], fit.sample(jax.random.key(1), 50)["z"])


def test_refusals():
    with pytest.raises(FamilyError, match="concentration"):
        hivi.fit(wide(), hivi.MeanField(concentration=-1.0), key=jax.random.key(0), progress=False)
    fit = hivi.fit(wide(), hivi.MeanField(concentration=1.0), key=jax.random.key(0), steps=50, progress=False)
    with pytest.raises(FitError, match="negative-binomial"):
        hivi.curvature(fit, key=jax.random.key(0))
    with pytest.raises(FamilyError, match="one of them"):
        hivi.fit(wide(), hivi.Hierarchical(concentration=1.0, dispersed=True), key=jax.random.key(0), progress=False)
    fit = hivi.fit(wide(), hivi.MeanField(dispersed=True), key=jax.random.key(0), steps=50, progress=False)
    with pytest.raises(FitError, match="free spread"):
        hivi.curvature(fit, key=jax.random.key(0))


@pytest.mark.slow
def test_the_default_serves_large_counts():
    """Three counts, of 300 to 2,000, seen through their sums: a hierarchy from scratch levels off 6 nats below mean-field."""

    def model() -> None:
        with numpyro.plate("i", 3):
            n = numpyro.sample("n", dist.Poisson(jnp.array([1000.0, 300.0, 2000.0])))
        sums = jnp.stack([n[0] + n[1], n[1] + n[2], jnp.sum(n)])
        noise = dist.Normal(1.0 * sums, jnp.array([10.0, 10.0, 15.0])).to_event(1)
        numpyro.sample("y", noise, obs=jnp.array([1250.0, 2280.0, 3260.0]))

    target = hivi.from_numpyro(model)
    fit = hivi.fit(target, key=jax.random.key(0), progress=False)
    flat = hivi.fit(target, hivi.MeanField(dispersed=True), key=jax.random.key(0), progress=False)
    assert fit.elbo(jax.random.key(1)).mean > flat.elbo(jax.random.key(1)).mean - 0.2
