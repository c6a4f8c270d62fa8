"""Copulas: densities against quadrature and dense Gaussians, exact marginals, known correlations, and what is refused."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from jax.scipy.stats import multivariate_normal, norm, poisson
from jaxtyping import Array

import hivi
from cases import TARGETS, built, perturbed, quick
from hivi._dependence import GaussianDependence, VineDependence
from hivi._families.latent_copula import marginal_of
from hivi._likelihoods.marginals import BinomialMarginal, CountMarginal, FiniteMarginal
from hivi._likelihoods.threshold import ThresholdLikelihood
from hivi._normal import from_logit, log_interval, to_logit
from hivi._pairs import FrankPair, GaussianPair
from hivi.reproduce.bernoulli import table_target

KEY = jax.random.key(0)
COPULAS = ["copula", "copula vine", "copula vine, frank"]


# The dependence


@eqx.filter_jit
def there_and_back(pair: Any, parameter: Array, x: Array, y: Array) -> tuple[Array, ...]:
    h, log_slope = pair.onward(parameter, x, y)
    slope = jax.vmap(jax.vmap(jax.grad(lambda a, b: pair.onward(parameter, a, b)[0])))(x, y)
    return h, log_slope, pair.back(parameter, h, y), slope


@pytest.mark.parametrize("pair", [GaussianPair(), FrankPair()], ids=["gaussian", "frank"])
@pytest.mark.parametrize("parameter", [-3.0, -1.0, -1e-4, 0.0, 1e-3, 0.166, 0.9, 3.0])
def test_pairs_go_there_and_back_in_single_precision(pair, parameter):
    x, y = jnp.meshgrid(jnp.linspace(-5, 5, 31), jnp.linspace(-5, 5, 31))
    h, log_slope, back, slope = (np.asarray(a) for a in there_and_back(pair, jnp.array(parameter), x, y))
    kept = np.abs(h) < 8
    np.testing.assert_allclose(back[kept], x[kept], atol=2e-5)
    np.testing.assert_allclose(log_slope[kept], np.log(slope)[kept], atol=2e-5)


def test_frank_pair_is_franks_copula(x64):
    """Against the derivative of its distribution function."""
    theta = 6 * 0.7

    def cdf(u: Any, v: Any) -> Any:
        return -jnp.log1p(jnp.expm1(-theta * u) * jnp.expm1(-theta * v) / jnp.expm1(-theta)) / theta

    for x, y in [(-1.3, 0.4), (0.8, 0.9), (2.5, -2.0)]:
        given = jax.grad(cdf, 1)(norm.cdf(x), norm.cdf(y))
        np.testing.assert_allclose(
            norm.cdf(FrankPair().onward(jnp.array(0.7), jnp.array(x), jnp.array(y))[0]), given, rtol=1e-6
        )


def log_density(dependence: Any, m: jax.Array) -> jax.Array:
    base, log_det = dependence.decouple(m)
    return jnp.sum(norm.logpdf(base)) + log_det


def test_full_vine_of_gaussian_pairs_is_a_gaussian(x64):
    dim = 5
    own = VineDependence(0.6 * jax.random.normal(KEY, (dim - 1, dim)), GaussianPair())
    factor = jax.jacfwd(lambda u: own.couple(u)[0])(jnp.zeros(dim))
    np.testing.assert_allclose(jnp.diagonal(factor @ factor.T), 1.0, rtol=1e-10)
    for m in jax.random.normal(jax.random.key(1), (5, dim)):
        exact = multivariate_normal.logpdf(m, jnp.zeros(dim), factor @ factor.T)
        np.testing.assert_allclose(log_density(own, m), exact, rtol=1e-9)


def test_truncated_vine_is_a_markov_chain(x64):
    """One tree of Gaussian pairs: correlation of i and j is the product of those between."""
    own = VineDependence(jnp.array([[0.0, 0.5, -0.8, 1.1]]), GaussianPair())
    factor = jax.jacfwd(lambda u: own.couple(u)[0])(jnp.zeros(4))
    np.testing.assert_allclose((factor @ factor.T)[0, 3], np.prod(np.tanh([0.5, -0.8, 1.1])), rtol=1e-10)


@pytest.mark.parametrize("kind", ["gaussian", "vine", "frank"])
def test_density_integrates_to_standard_normals(kind, x64):
    own = (
        GaussianDependence(jnp.array([[0.0, 0.0], [1.3, 0.0]]))
        if kind == "gaussian"
        else VineDependence(jnp.array([[0.0, 0.8]]), FrankPair() if kind == "frank" else GaussianPair())
    )
    grid = jnp.linspace(-9, 9, 361)
    at = jax.vmap(jax.vmap(lambda a, b: log_density(own, jnp.array([a, b])), (None, 0)), (0, None))
    values = jnp.exp(quick(at)(grid, grid))
    step = grid[1] - grid[0]
    for axis in (0, 1):
        np.testing.assert_allclose(values.sum(axis) * step, norm.pdf(grid), atol=1e-6)


@pytest.mark.parametrize("family", COPULAS)
def test_continuous_density_integrates_to_one(family, x64):
    """With bent marginals: 2-d quadrature."""
    proposal = built(family, TARGETS["normal"](), scale=0.5)
    location, scale = proposal.affine()
    grid = jnp.linspace(-10, 10, 1001)
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2) * scale + location
    total = jnp.exp(quick(jax.vmap(lambda x: proposal.log_density({"x": x}, KEY)))(points)).sum()
    np.testing.assert_allclose(total * jnp.prod(scale) * (grid[1] - grid[0]) ** 2, 1.0, atol=2e-3)


# Discrete marginals

THETA = {
    "two": (FiniteMarginal(0, 2), jnp.array([0.8]), 2),
    "four": (FiniteMarginal(1, 4), jnp.array([0.3, -1.0, 0.9, 0.1]), 4),
    "counts": (CountMarginal(0), jnp.array([0.7, -0.3]), 60),
    "binomial": (BinomialMarginal(0, 81), jnp.array([-0.4, 0.2]), 81),
}


@pytest.mark.parametrize("name", list(THETA))
@pytest.mark.parametrize("scale", [0.2, 0.9])
def test_marginals_are_exact(name, scale, x64):
    """q(z|m) over m ~ N(0, 1), by quadrature, is F(z) - F(z-1), and the conditionals add up to 1."""
    marginal, theta, count = THETA[name]
    theta, z = theta.astype(jnp.float64), marginal.low + jnp.arange(count)
    every = jnp.broadcast_to(theta, (count, *theta.shape))
    below, above = quick(marginal.thresholds)(every, z)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)

    def given(m: jax.Array) -> jax.Array:
        location = jnp.sqrt(1 - scale**2) * m
        rest = jnp.broadcast_to(jnp.stack([location, jnp.log(scale)]), (count, 2))
        return jnp.exp(ThresholdLikelihood(marginal).log_prob(jnp.concatenate([every, rest], -1), z))

    table = quick(jax.vmap(given))(jnp.asarray(nodes))
    np.testing.assert_allclose(table[np.abs(nodes) < 5].sum(1), 1.0, atol=1e-4)
    np.testing.assert_allclose(weights @ table / np.sqrt(2 * np.pi), norm.cdf(above) - norm.cdf(below), atol=1e-5)


def test_finite_marginals_are_theta():
    marginal, theta, count = THETA["four"]
    _, above = marginal.thresholds(jnp.broadcast_to(theta, (count, count)), 1 + jnp.arange(count))
    np.testing.assert_allclose(norm.cdf(above), jnp.cumsum(jax.nn.softmax(theta)), atol=1e-6)


def test_counts_start_as_poisson():
    for rate in (0.5, 3.0, 40.0):
        z = jnp.arange(int(rate + 8 * rate**0.5 + 8))
        theta = jnp.broadcast_to(jnp.array([jnp.log(rate), 0.0]), (len(z), 2))
        _, above = CountMarginal(0).thresholds(theta, z)
        np.testing.assert_allclose(norm.cdf(above), poisson.cdf(z, rate), atol=0.006)


@pytest.mark.parametrize("name", ["counts", "binomial"])
def test_threshold_draws_and_moves(name):
    """Frequencies of the draws; and the difference identity, against the sum over all values."""
    marginal, theta, count = THETA[name]
    rule, z = ThresholdLikelihood(marginal), jnp.arange(count)
    lam = jnp.concatenate([theta, jnp.array([0.6, -0.7])])

    def mean(free: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(rule.log_prob(jnp.broadcast_to(free, (count, 4)), z)) * jnp.sqrt(z + 1.0))

    def by_moves(free: jax.Array) -> jax.Array:
        every = jnp.broadcast_to(free, (count, 4))
        change = jnp.sqrt(rule.moves(z)[0] + 1.0) - jnp.sqrt(z + 1.0)
        q = jax.lax.stop_gradient(jnp.exp(rule.log_prob(every, z)))
        return jnp.sum(q * rule.move_weights(every, z)[0] * change)

    np.testing.assert_allclose(jax.grad(by_moves)(lam), jax.grad(mean)(lam), rtol=3e-3, atol=3e-4)
    draws = rule.sample(jnp.broadcast_to(lam, (40_000, 4)), KEY)
    q = jnp.exp(rule.log_prob(jnp.broadcast_to(lam, (count, 4)), z))
    found = np.bincount(draws, minlength=count) / 40_000
    assert len(found) == count
    assert (np.abs(found - q) < 5 * np.sqrt(q * (1 - q) / 40_000) + 1e-4).all()


def test_normal_tails():
    logit = jnp.linspace(-79, 79, 501)
    np.testing.assert_allclose(to_logit(from_logit(logit)), logit, rtol=1e-5, atol=1e-5)
    slope = jax.vmap(jax.grad(from_logit))(logit)
    np.testing.assert_allclose(slope, np.gradient(np.asarray(from_logit(logit)), np.asarray(logit)), rtol=0.05)
    assert np.isfinite(jax.grad(log_interval, (0, 1))(12.4, 12.4)).all()
    np.testing.assert_allclose(log_interval(jnp.array(8.0), jnp.array(9.0)), -35.0136, rtol=1e-5)


def test_kinds_of_marginals():
    kinds = {type(marginal_of(s)) for t in ("sites", "binomial") for s in TARGETS[t]().sites}
    assert kinds == {FiniteMarginal, CountMarginal, BinomialMarginal}


def test_extra_draws_from_r_are_those_of_its_density():
    """`solve` inverts `mean`: dense and banded, with a continuous site among the discrete ones."""
    for family in ("copula", "copula vine"):
        own = built(family, TARGETS["sites"](), scale=0.3)
        t, right = jax.random.normal(KEY, (2, 4))
        known = jnp.array([0.0, 1.0, 0.0, 0.0])
        m = own.reverse.solve(right, t, known)
        np.testing.assert_allclose(m, jnp.where(known > 0, t, right + own.reverse.mean(m, t)), atol=1e-5)


# Fits


@pytest.mark.slow
def test_fit_of_the_papers_table():
    """Correlation -0.6, the tighter bound: hivi.Elbo() alone stops at about -0.5."""
    target = table_target(np.array([[0.1, 0.4], [0.4, 0.1]]))
    bound = hivi.ImportanceWeighted(outer=1, inner=10)
    fit = hivi.fit(target, hivi.Copula(), key=KEY, steps=3000, bound=bound, tolerance=None, progress=False)
    draws = np.asarray(fit.sample(jax.random.key(1), 50_000)["z"])
    assert abs(np.corrcoef(draws.T)[0, 1] + 0.6) < 0.05
    assert np.abs(draws.mean(0) - 0.5).max() < 0.02


@pytest.mark.slow
def test_fit_bends_marginals():
    """Two correlated Gammas, in logarithms: the splines take the skewness that FullRank leaves."""
    target = TARGETS["constrained"]()
    bounds = {}
    for family in (hivi.FullRank(), hivi.Copula()):
        fit = hivi.fit(target, family, key=KEY, steps=2000, tolerance=None, progress=False)
        bounds[type(family).__name__] = fit.elbo(jax.random.key(1), 8192)
    assert bounds["Copula"].stderr < 0.005
    assert bounds["Copula"].mean > bounds["FullRank"].mean + 2 * bounds["FullRank"].stderr


@pytest.mark.parametrize(
    ("target", "family"),
    [pytest.param("sites", hivi.Copula("vine"), marks=pytest.mark.slow), ("constrained", hivi.Copula())],
)
def test_saved_copula_is_the_same(target, family, tmp_path):
    model = TARGETS[target]()
    fit = hivi.fit(model, family, key=KEY, steps=20, progress=False)
    again = hivi.load(fit.save(tmp_path))
    for name, draws in fit.sample(KEY, 20).items():
        assert np.array_equal(draws, again.sample(KEY, 20)[name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": 0}, r"Copula\(levels=\.\.\.\): found 0; expected at least 1"),
        ({"scale": 0.0}, r"Copula\(scale=\.\.\.\)"),
        ({"spread": 1.0}, r"Copula\(spread=\.\.\.\)"),
    ],
)
def test_bad_numbers_are_refused(options, match):
    with pytest.raises(hivi.FamilyError, match=match):
        hivi.Copula(**options)


@pytest.mark.slow
def test_gradients_are_finite_far_from_the_start():
    """Long steps of every parameter, in single precision."""
    for name in ("sites", "binomial", "mixed"):
        model = TARGETS[name]()
        proposal = perturbed(hivi.Copula("vine").build(model.sites, KEY), KEY, 3.0)
        z, context = proposal.propose(KEY)
        found = eqx.filter_grad(lambda p, z=z, c=context: sum(jnp.sum(t) for t in p.log_q(z, c, KEY).values()))(
            proposal
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.slow
def test_counts_of_a_subsampled_plate_keep_their_own_likelihood():
    """Row by row q is a copula's, not a Poisson: the bound over all rows stays below log p(x), known row by row."""

    def model(y):
        with numpyro.plate("data", len(y)):
            z = numpyro.sample("z", dist.Poisson(5.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = np.array([3.0, 5.5, 4.0, 7.2])
    z = np.arange(60)
    exact = logsumexp(poisson.logpmf(z, 5.0)[:, None] + norm.logpdf(y, z[:, None], 1.0), 0).sum()
    target = hivi.from_numpyro(model, jnp.asarray(y), subsample={"data": 2})
    fit = hivi.fit(target, hivi.Copula(), key=KEY, steps=600, progress=False)
    bound = fit.elbo(KEY, 8192)
    assert exact - 1.5 < bound.mean < exact + 4 * bound.stderr


def test_strategies_that_need_a_mean_say_so():
    with pytest.raises(hivi.FitError, match=r"'z'.*mean has no closed form"):
        hivi.fit(TARGETS["counts"](), hivi.Copula(), estimator=hivi.Enumeration(), key=KEY, steps=5, progress=False)
