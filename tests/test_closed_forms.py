"""Mean-field Gamma and `Expectation`: densities, means and conjugate steps against quadrature, SciPy and the exact posterior."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpyro.distributions import constraints
from scipy import special, stats

import hivi
from cases import quick
from hivi._compile import compiled
from hivi._estimators.differences import LocalExpectation
from hivi._estimators.expectation import Expectation
from hivi._estimators.pathwise import Pathwise
from hivi._estimators.surrogate import estimate
from hivi._families.gamma import GammaProposal, MeanFieldGamma, digamma, log_gamma
from hivi._families.product import build_proposal
from hivi._fit.stream import Rates, StreamPlan, split_rows, visit
from hivi._fit.streaming import open_stream
from hivi._space import make_site
from hivi.topics.base import Corpus
from hivi.topics.model import Architecture, Priors, deep_exponential_family

W = make_site("w", (3,), constraints.positive)
SHAPE, RATE = np.array([0.3, 1.7, 40.0]), np.array([0.8, 2.0, 5.0])


def gamma(shape: Any = SHAPE, rate: Any = RATE) -> GammaProposal:
    return GammaProposal((W,), {"w": jnp.asarray(shape)}, {"w": jnp.asarray(rate)})


def test_density_is_that_of_the_logarithm(x64):
    """Normalised over log w, and equal to SciPy's Gamma with its Jacobian."""
    grid = np.linspace(-120, 8, 200_001)
    q = gamma()
    at = jax.vmap(lambda u: q.log_q({"w": jnp.full(3, u)}, None, jax.random.key(0))["q(w)"])(jnp.asarray(grid))
    np.testing.assert_allclose(np.trapezoid(np.exp(at), grid, axis=0), 1.0, rtol=1e-6)
    inside = (grid > -20) & (grid < 4)
    exact = stats.gamma.logpdf(np.exp(grid[inside, None]), SHAPE, scale=1 / RATE) + grid[inside, None]
    np.testing.assert_allclose(np.asarray(at)[inside], exact, rtol=1e-8, atol=1e-7)
    one = q.log_density({"w": jnp.asarray(grid[150_000:150_003])}, jax.random.key(0))
    own = stats.gamma.logpdf(np.exp(grid[150_000:150_003]), SHAPE, scale=1 / RATE) + grid[150_000:150_003]
    np.testing.assert_allclose(one, own.sum(), rtol=1e-8)


def test_means_are_scipys(x64):
    """E[log w], log E[w], and log q at them: the negative entropy of log w."""
    closed = gamma().expecting(("w",))
    views = closed.views()
    np.testing.assert_allclose(views["mean"]["w"], special.digamma(SHAPE) - np.log(RATE), rtol=1e-8)
    np.testing.assert_allclose(views["logmeanexp"]["w"], np.log(SHAPE / RATE), rtol=1e-12)
    z, _ = closed.propose(jax.random.key(0))
    found = closed.log_q(z, None, jax.random.key(0))["q(w)"]
    of_log = stats.gamma.entropy(SHAPE, scale=1 / RATE) - (special.digamma(SHAPE) - np.log(RATE))
    np.testing.assert_allclose(found, -of_log, rtol=1e-7, atol=1e-8)
    plugged = gamma().expecting(("w",), plug_in=True)
    np.testing.assert_allclose(plugged.views()["mean"]["w"], np.log(SHAPE / RATE), rtol=1e-12)
    assert not np.asarray(plugged.log_q(plugged.views()["mean"], None, jax.random.key(0))["q(w)"]).any()


def test_draws_are_gamma():
    draws = np.exp(quick(jax.vmap(lambda k: gamma().propose(k)[0]["w"]))(jax.random.split(jax.random.key(1), 4000)))
    for k in range(3):
        assert stats.kstest(draws[:, k], stats.gamma(SHAPE[k], scale=1 / RATE[k]).cdf).pvalue > 1e-3


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_special_functions(precision):
    """Over ten decades; beyond, as a common word in a large corpus gives, they must at least stay finite."""
    relative = {"float32": 1e-5, "float64": 1e-9}[precision]
    with jax.enable_x64(precision == "float64"):
        x = np.geomspace(1e-4, 1e6, 1001).astype(precision)
        for ours, theirs in ((digamma, special.digamma), (log_gamma, special.gammaln)):
            exact = theirs(x.astype(float))
            # Near their zeros only the absolute error can be small.
            np.testing.assert_allclose(ours(jnp.asarray(x)), exact, rtol=relative, atol=10 * relative)
            large = np.geomspace(1e6, 1e10, 20).astype(precision)
            np.testing.assert_allclose(ours(jnp.asarray(large)), theirs(large.astype(float)), rtol=relative)


def test_start_has_the_means_that_were_asked_for():
    means = np.array([0.02, 0.5, 4.0], np.float32)
    near = MeanFieldGamma().build((W,), jax.random.key(0)).near({"w": jnp.asarray(means)})
    np.testing.assert_allclose(near.means()["w"], means, rtol=1e-5)
    np.testing.assert_allclose(near.centre()["w"], np.log(means), rtol=1e-5)
    with pytest.raises(hivi.FamilyError, match="MeanFieldGamma at site 'r'"):
        MeanFieldGamma().build((make_site("r", (2,), constraints.real),), jax.random.key(0))


# A conjugate step


X = np.random.default_rng(0).poisson(1.3, (4, 5))
CORPUS = Corpus.from_matrix(X)
PRIORS = Priors(floor=0.2, topic_shape=0.4, level=0.4)
Z = np.array([[1, 0], [0, 1], [1, 1], [1, 0]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("plug_in", "batch"), [(False, 4), (False, 2), (True, 2)])
def test_a_whole_step_lands_on_the_conjugate_posterior(plug_in, batch, tied):
    """One layer whose units are surely 0 or 1: shape = prior + expected counts of topic k, rate = prior + sum of z."""
    architecture = Architecture((2,), "bernoulli", priors=PRIORS)
    target = deep_exponential_family(CORPUS, architecture, batch=batch)
    family = {"w0": MeanFieldGamma(tied=tied), "z1": hivi.MeanField()}
    sites = tuple(dataclasses.replace(s, shape=s.batch_shape) for s in target.sites)
    proposal = build_proposal(family, sites, jax.random.key(0)).near(target.starts)
    ids = target.source.blocks()[0]
    sure = 60.0 * (2 * jnp.asarray(Z[ids], float) - 1)[..., None]
    proposal = eqx.tree_at(lambda p: p.parts[1].lam["z1"], proposal, sure)
    stream = open_stream(target, proposal, jax.random.key(1))
    own, shared = split_rows(proposal)
    records = stream.layout.pack((own, stream.layout.unpack(jnp.asarray(stream.records.read(ids)))[1]))
    plan = StreamPlan((("z1", LocalExpectation()), ("w0", Expectation(plug_in))), hivi.Elbo(), 1, True)
    rates = Rates(jnp.array(0.0), jnp.array(0.0), jnp.array(1.0))
    loaded = jax.tree.map(lambda a: jnp.asarray(a[0]), target.source.load([ids]))
    state, after, _ = compiled(visit)(stream.state, records, loaded, rates, target, plan, stream.layout)
    old, new = (next(p for p in s.parts if p.sites[0].name == "w0") for s in (shared, state.shared))

    a, b = (np.asarray(v["w0"], float) for v in (old.shape, old.rate))
    weight = np.exp(special.digamma(a) - np.log(b)) if not plug_in else a / b
    totals = X.sum(0) + 0.5
    floor = 0.2 * X.sum() / 4 * (0.5 / 5 + 0.5 * totals / totals.sum())
    rate = Z[ids] @ weight.T + floor
    prior_rate = 0.4 / (0.8 * X.sum() / 4 / (0.4 * 2 * 5))
    scale = 4 / batch
    np.testing.assert_allclose(new.shape["w0"], 0.4 + scale * weight * ((X[ids] / rate).T @ Z[ids]), rtol=1e-4)
    rates_now = np.asarray(new.rate["w0"])
    assert rates_now.shape == ((1, 2) if tied else a.shape)
    expected = np.broadcast_to(prior_rate + scale * Z[ids].sum(0), rates_now.shape)
    np.testing.assert_allclose(rates_now, expected, rtol=1e-4)
    np.testing.assert_array_equal(after[:, :2], records[:, :2], "rows that were not to move")


# The bound


@pytest.mark.parametrize(
    ("layers", "latent", "observations"), [((2, 2), "poisson", "poisson"), ((2,), "bernoulli", "bernoulli")]
)
def test_closed_form_is_a_lower_bound(layers, latent, observations):
    """By Jensen's inequality below the bound of draws, and clearly so where q(w) is broad; where it is narrow, equal."""
    architecture = Architecture(layers, latent, observations, priors=PRIORS)
    target = deep_exponential_family(CORPUS, architecture, batch=4)
    family = {"w.*": MeanFieldGamma(), "z.*": hivi.MeanField()}
    start = build_proposal(family, target.sites, jax.random.key(0)).near(target.starts)
    closed = [s.name for s in target.sites if not s.discrete]
    moves = {s.name: hivi.Score() for s in target.sites if s.discrete}
    keys = jax.random.split(jax.random.key(2), 20)

    @quick
    def bounds(proposal: Any) -> tuple[Array, Array]:
        def of(weights: Any, key: Array) -> Array:
            chosen = moves | dict.fromkeys(closed, weights)
            rows = target.all_rows()
            return estimate(proposal, target, chosen, hivi.Elbo(), key, 200, rows)[1].bound

        return tuple(jax.lax.map(lambda k, w=w: of(w, k), keys).reshape(-1) for w in (Expectation(), Pathwise()))

    def gap(concentration: float) -> tuple[float, float]:
        parts = []
        for p in start.parts:
            if p.sites[0].name[0] == "w":
                shape = {n: jnp.full_like(v, concentration) for n, v in p.shape.items()}
                rate = {n: concentration / (p.shape[n] / p.rate[n]) for n in shape}
                p = dataclasses.replace(p, shape=shape, rate=rate)
            parts.append(p)
        mean, drawn = (np.asarray(x, float) for x in bounds(dataclasses.replace(start, parts=tuple(parts))))
        return drawn.mean() - mean.mean(), np.sqrt((mean.var() + drawn.var()) / len(mean))

    broad, stderr = gap(0.7)
    assert stderr < 1.0, "not precise enough to judge"
    assert broad > 4 * stderr
    narrow, stderr = gap(1e4)
    assert stderr < 1.0, "not precise enough to judge"
    assert abs(narrow) < 4 * stderr + 0.05
