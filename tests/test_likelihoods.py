"""Variational likelihoods against enumeration of their supports, and against SciPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jaxtyping import Array

from cases import quick
from hivi._likelihood import likelihood
from hivi._likelihoods.base import AbstractLikelihood
from hivi._likelihoods.poisson import MAX_LOG_RATE, PART, SHARE, poisson
from hivi._space import Site, Values
from hivi._tree import sum_all, value_zero

SITES: dict[str, Values] = {
    "bernoulli": Values("finite", 0, 2),
    "two from 5": Values("finite", 5, 2),
    "categorical": Values("finite", 0, 4),
    "three from -1": Values("finite", -1, 3),
    "count": Values("count", 0, 0),
    "count from 1": Values("count", 1, 0),
    "negative binomial": Values("count", 0, 0, 4.0),
    "geometric from 1": Values("count", 1, 0, 1.0),
    "dispersed": Values("count", 0, 0, dispersed=True),
    "dispersed from 1": Values("count", 1, 0, dispersed=True),
    "dispersed binomial": Values("binomial", 0, 101, dispersed=True),
    "dispersed binomial from 2": Values("binomial", 2, 70, dispersed=True),
    "binomial": Values("binomial", 0, 81),
    "binomial from 2": Values("binomial", 2, 12),
    "normal": Values("real"),
}
DISCRETE = [n for n, v in SITES.items() if v.kind != "real"]


class Compiled:
    """A likelihood whose densities are compiled once, and not operation by operation."""

    def __init__(self, kind: AbstractLikelihood):
        self.kind = kind
        for name in ("log_prob", "score", "fisher", "moves", "move_weights"):
            setattr(self, name, jax.jit(getattr(kind, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kind, name)


class Setting(NamedTuple):
    """A likelihood at some lambda, with every value of one coordinate."""

    kind: AbstractLikelihood | Compiled
    lam: Array  # (width,)
    support: Array  # (values,)

    def probabilities(self) -> Array:
        """Of every value."""
        return jnp.exp(self.kind.log_prob(jnp.broadcast_to(self.lam, (len(self.support), len(self.lam))), self.support))


@functools.cache
def compiled(name: str) -> Compiled:
    """The likelihood of a row, once for all tests of it."""
    return Compiled(likelihood(Site("z", (), SITES[name], ())))


def setting(name: str, seed: int = 0) -> Setting:
    """A generic lambda; counts up to 60 and reals on a fine grid stand for an infinite support."""
    values, kind = SITES[name], compiled(name)
    lam = np.random.default_rng(seed).normal(0.3, 0.7, kind.width).astype(np.float32)
    if values.kind == "real":
        return Setting(kind, jnp.asarray(lam), jnp.linspace(-20.0, 20.0, 40_001))
    number = values.count or (400 if values.concentration else 60)
    return Setting(kind, jnp.asarray(lam), jnp.asarray(values.low + np.arange(number), jnp.int32))


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("seed", [0, 1])
def test_normalised(name, seed):
    s = setting(name, seed)
    step = 1.0 if name != "normal" else 40.0 / 40_000
    np.testing.assert_allclose(jnp.sum(s.probabilities()) * step, 1.0, rtol=1e-4)


def test_log_prob_is_the_textbook_one():
    lam = jnp.array([0.4])
    k, p, n = np.arange(12), 1 / (1 + np.exp(-0.4)), jnp.arange(12)
    wide = jnp.broadcast_to(lam, (12, 1))
    log_prob = {name: likelihood(Site("z", (), v, ())).log_prob for name, v in SITES.items()}
    np.testing.assert_allclose(log_prob["count"](wide, n), scipy.stats.poisson.logpmf(k, np.exp(0.4)), rtol=1e-5)
    share, mean = 4 / (4 + np.exp(0.4)), 1 / (1 + np.exp(0.4))  # SciPy's p is 1 - ours
    found, wanted = log_prob["negative binomial"](wide, n), scipy.stats.nbinom.logpmf(k, 4.0, share)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(
        log_prob["geometric from 1"](wide, n + 1), scipy.stats.geom.logpmf(k + 1, mean), rtol=1e-5
    )
    np.testing.assert_allclose(log_prob["binomial"](wide, n), scipy.stats.binom.logpmf(k, 80, p), rtol=1e-4)
    np.testing.assert_allclose(log_prob["bernoulli"](wide[:2], n[:2]), np.log([1 - p, p]), rtol=1e-5)
    np.testing.assert_allclose(log_prob["two from 5"](wide[:2], n[5:7]), np.log([1 - p, p]), rtol=1e-5)
    x = jnp.linspace(-1, 1, 5)
    normal = jnp.broadcast_to(jnp.array([0.2, -0.5]), (5, 2))
    np.testing.assert_allclose(
        log_prob["normal"](normal, x), scipy.stats.norm.logpdf(np.asarray(x), 0.2, np.exp(-0.5)), rtol=1e-5
    )


@pytest.mark.parametrize("name", SITES)
def test_score_is_the_derivative(name):
    s = setting(name)
    some = s.support[:: max(1, len(s.support) // 7)]
    right = quick(jax.vmap(jax.grad(s.kind.log_prob), (None, 0)))(s.lam, some)
    found = s.kind.score(jnp.broadcast_to(s.lam, (len(some), len(s.lam))), some)
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [n for n, v in SITES.items() if not v.dispersed])
def test_fisher_is_the_second_moment_of_the_score(name):
    s = setting(name)
    p = np.asarray(s.probabilities(), np.float64)
    score = np.asarray(s.kind.score(jnp.broadcast_to(s.lam, (len(s.support), len(s.lam))), s.support), np.float64)
    right = np.einsum("v,vi,vj->ij", p / p.sum(), score, score)
    np.testing.assert_allclose(s.kind.fisher(s.lam), right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, v in SITES.items() if v.dispersed])
@pytest.mark.parametrize("lam", [(1.0, -0.4), (1.0, 0.3), (3.0, 0.0), (3.0, 1.0), (-4.0, 0.0), (-6.0, 0.2), (2.0, 3.0)])
def test_fisher_of_a_free_spread_is_about_right(name, lam):
    s = setting(name)._replace(lam=jnp.array(lam))
    p = np.asarray(s.probabilities(), np.float64)
    score = np.asarray(s.kind.score(jnp.broadcast_to(s.lam, (len(p), 2)), s.support), np.float64)
    right = np.einsum("v,vi,vj->ij", p / p.sum(), score, score)
    found = np.asarray(s.kind.fisher(s.lam), np.float64)
    np.testing.assert_array_less(np.diag(found) / np.diag(right), 3.0)
    np.testing.assert_array_less(np.diag(right) / np.diag(found), 3.0)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("seed", [0, 1])
def test_moves_give_the_gradient_of_an_expectation(name, seed):
    """grad E[f] = sum over moves of grad w_m E[f(move m) - f(z)], for any f; by enumeration."""
    s = setting(name, seed)
    start = int(s.support[0])
    # f grows slowly enough that the tail beyond the enumeration does not count
    table = jnp.asarray(np.random.default_rng(seed + 5).normal(size=len(s.support) + 1), jnp.float32)

    def mean(lam: Array) -> Array:
        return jnp.sum(s._replace(lam=lam).probabilities() * table[:-1])

    def by_moves(lam: Array) -> Array:
        wide = jnp.broadcast_to(lam, (len(s.support), len(lam)))
        moved = s.kind.moves(s.support)
        change = table[moved - start] - table[s.support - start]
        p = jax.lax.stop_gradient(s.probabilities())
        return jnp.sum(p * jnp.sum(s.kind.move_weights(wide, s.support) * change, 0))

    found, right = quick(lambda lam: (jax.grad(by_moves)(lam), jax.grad(mean)(lam)))(s.lam)
    np.testing.assert_allclose(found, right, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", DISCRETE)
def test_moves_stay_in_the_support_and_off_the_value(name):
    s = setting(name)
    inner = s.support[:-1]
    moved = s.kind.moves(inner)
    assert (moved != inner).all()
    assert jnp.isin(moved, s.support).all()
    if SITES[name].kind == "finite":
        assert sorted({*np.asarray(moved[:, 0]).tolist(), int(inner[0])}) == np.asarray(s.support).tolist()
    if SITES[name].kind == "binomial":  # nothing lies above the last value, and the weight says so
        last = s.support[-1:]
        assert (s.kind.moves(last) == last).all()
        assert (jax.grad(lambda lam: s.kind.move_weights(lam[None], last)[0, 0])(s.lam) == 0).all()


@pytest.mark.parametrize("name", SITES)
def test_draws_follow_the_density(name):
    s, count = setting(name), 20_000
    lam = jnp.broadcast_to(s.lam, (count, len(s.lam)))
    z = np.asarray(quick(s.kind.sample)(lam, jax.random.key(3)))
    if name == "normal":
        assert scipy.stats.kstest(z, "norm", (float(s.lam[0]), float(jnp.exp(s.lam[1])))).pvalue > 1e-3
        return
    assert z.dtype == np.int32
    observed = np.bincount(z - int(s.support[0]), minlength=len(s.support))
    expected = count * np.asarray(s.probabilities(), np.float64)
    frequent = expected >= 5
    pooled = [*observed[frequent], observed[~frequent].sum()], [*expected[frequent], expected[~frequent].sum()]
    seen, due = (np.array(x, float) for x in pooled)
    statistic = ((seen - due)[due > 0] ** 2 / due[due > 0]).sum()
    assert scipy.stats.chi2.sf(statistic, frequent.sum()) > 1e-3


@pytest.mark.parametrize("name", SITES)
def test_single_precision_is_close_to_double(name):
    s = setting(name)
    some = s.support[:: max(1, len(s.support) // 7)]
    narrow = np.asarray(s.kind.log_prob(jnp.broadcast_to(s.lam, (len(some), len(s.lam))), some))
    with jax.enable_x64(True):
        lam = jnp.asarray(np.asarray(s.lam), jnp.float64)
        real = SITES[name].kind == "real"
        value = jnp.asarray(np.asarray(some), jnp.float64 if real else jnp.int32)
        wide = np.asarray(s.kind.log_prob(jnp.broadcast_to(lam, (len(some), len(lam))), value))
    np.testing.assert_allclose(narrow, wide, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("name", [n for n in DISCRETE if SITES[n].kind != "binomial"])
def test_log_prob_in_double_precision(name, x64):
    s = setting(name)
    lam = jnp.asarray(np.asarray(s.lam), jnp.float64)
    total = jnp.sum(Setting(s.kind, lam, s.support).probabilities())
    assert abs(float(total) - 1) < 1e-12


@pytest.mark.parametrize("name", ["binomial"])
def test_binomial_log_prob_in_double_precision(name, x64):
    s = setting(name)
    lam = jnp.asarray(np.asarray(s.lam), jnp.float64)
    assert abs(float(jnp.sum(Setting(s.kind, lam, s.support).probabilities())) - 1) < 1e-12


# Far from the centre

FAR = [-40.0, -18.0, 18.0, 40.0]


@functools.cache
def values_and_slopes(name: str) -> Callable[[Array], Any]:
    """Log-prob, score, Fisher and move weights of three values, and their gradients, as a function of lambda."""
    s = setting(name)
    z = s.support[jnp.array([0, 1, len(s.support) - 1])]

    def everything(lam: Array) -> Array:
        parts = s.kind.log_prob(lam, z), s.kind.score(lam, z), s.kind.fisher(lam), s.kind.move_weights(lam, z)
        return jnp.concatenate([jnp.ravel(p) for p in parts])

    return quick(lambda lam: (everything(lam), jax.jacrev(everything)(lam)))


@pytest.mark.parametrize("lam", FAR)
@pytest.mark.parametrize("name", DISCRETE)
def test_finite_far_from_the_centre(name, lam):
    wide = jnp.full((3, setting(name).kind.width), lam).at[:, 1:].set(0.0)
    assert all(np.isfinite(found).all() for found in values_and_slopes(name)(wide))


@pytest.mark.parametrize("lam", FAR)
@pytest.mark.parametrize("name", ["bernoulli", "two from 5", "binomial", "categorical"])
def test_score_and_fisher_keep_their_digits_far_from_the_centre(name, lam):
    """Against double precision, relative: 1 - p is zero in float32 from a logit of 17 on, and natural gradients divide by it."""
    s = setting(name)
    wide = np.linspace(0.0, lam, s.kind.width) if s.kind.width > 1 else np.full(1, lam)
    p = np.exp(wide - scipy.special.logsumexp(wide)) if s.kind.width > 1 else scipy.special.expit(wide)
    n = s.kind.support()[1] - 1
    if s.kind.width == 1:
        right = n * p[:, None] * scipy.special.expit(-wide)
        both = s.kind.score(jnp.asarray([wide, wide], jnp.float32), s.support[jnp.array([0, -1])])
        np.testing.assert_allclose(both[:, 0], [-n * p[0], n * scipy.special.expit(-lam)], rtol=1e-5)
    else:
        others = np.array([np.delete(p, k).sum() for k in range(len(p))])
        right = np.diag(p * others) - np.outer(p, p) * (1 - np.eye(len(p)))
        each = s.kind.score(jnp.broadcast_to(jnp.asarray(wide, jnp.float32), (len(p), len(p))), s.support)
        np.testing.assert_allclose(each, np.diag(others) - p * (1 - np.eye(len(p))), rtol=1e-4)
    np.testing.assert_allclose(s.kind.fisher(jnp.asarray(wide, jnp.float32)), right, rtol=1e-4)


def test_log_rates_are_capped():
    """Beyond e^20 an int32 draw would overflow."""
    kind = likelihood(Site("z", (), SITES["count"], ()))
    lam = jnp.full((4, 1), 30.0)
    z = kind.sample(lam, jax.random.key(0))
    assert (z > 0).all()
    np.testing.assert_allclose(kind.rate(lam), np.exp(MAX_LOG_RATE), rtol=1e-5)


@pytest.mark.parametrize("lam", [20.0, 21.0, 30.0, 100.0])
def test_beyond_the_cap_values_and_gradients_are_those_at_the_cap(lam):
    """So that a log rate that strayed there comes back; the score is the derivative there, too."""
    kind = likelihood(Site("z", (), SITES["count"], ()))
    z = jnp.array([3, 400_000_000], jnp.int32)

    def everything(log_rate: Array) -> Array:
        wide = jnp.broadcast_to(log_rate, (2, 1))
        return jnp.stack([kind.log_prob(wide, z), kind.rate(wide), kind.move_weights(wide, z)[0]])

    beyond, cap = jnp.array(lam), jnp.array(MAX_LOG_RATE)
    np.testing.assert_array_equal(everything(beyond), everything(cap))
    slope = jax.jacrev(everything)(beyond)
    np.testing.assert_array_equal(slope, jax.jacrev(everything)(cap))
    np.testing.assert_allclose(slope[0], kind.score(jnp.full((2, 1), lam), z)[:, 0], rtol=1e-6)
    assert slope[0, 0] < -1e8  # a small count pulls the rate down


def test_a_log_rate_comes_back_from_beyond_the_cap():
    """E[-|z - 7|] is largest where the median is 7."""
    kind = likelihood(Site("z", (), SITES["count"], ()))

    def bound(lam: Array, key: Array) -> Array:
        z = kind.sample(jax.lax.stop_gradient(lam), key)
        change = jnp.abs(z - 7) - jnp.abs(kind.moves(z)[0] - 7)
        return jnp.sum(kind.move_weights(lam, z)[0] * change)

    lam = jnp.full((64, 1), 24.0)
    slope = jax.jit(jax.grad(bound))
    for key in jax.random.split(jax.random.key(0), 300):
        lam = lam + 0.1 * jnp.sign(slope(lam, key))
    assert float(lam.mean()) == pytest.approx(np.log(6.67), abs=0.1)


@pytest.mark.parametrize("name", SITES)
def test_features_start_with_one_and_are_finite(name):
    s = setting(name)
    features = s.kind.features(s.support)
    assert (features[..., 0] == 1).all()
    assert jnp.isfinite(features).all()


@pytest.mark.parametrize(
    "rates",
    [(0.02, 3.0, 8.0), (0.5, 8.01, 11.0), (5.0, 12.0, 50.0), (5.0, 40.0, 1500.0)],
    ids=["small", "few", "moderate", "large"],
)
def test_many_poisson_draws_have_their_distribution(rates: tuple[float, ...]):
    # As many of each rate as the sampler needs to take the way of large arrays; each takes another of them.
    times = (2 * SHARE, 1, 1) if rates[1] > PART and rates[2] < 20 else (1, 1, 1)
    layout = np.repeat(rates, 4096 * np.array(times))
    drawn = np.asarray(quick(poisson)(jax.random.key(3), jnp.asarray(layout, jnp.float32)))
    for rate in rates:
        own = drawn[layout == rate]
        edges = scipy.stats.poisson.ppf(np.linspace(0.0, 1.0, 9)[1:-1], rate)
        edges = np.concatenate([[-1.0], np.unique(edges), [np.inf]])
        expected = np.diff(scipy.stats.poisson.cdf(edges, rate)) * len(own)
        observed = np.histogram(own, edges + 0.5)[0]
        statistic = np.sum((observed - expected) ** 2 / expected)
        assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-4, rate
        assert abs(own.mean() - rate) < 4.5 * np.sqrt(rate / len(own))
        assert abs(own.var() / rate - 1) < 4.5 * np.sqrt((2 + 1 / rate) / len(own))


@pytest.mark.parametrize("shape", [(70_001,), (1000, 81), (100, 3, 300)])
def test_large_sums_are_sums(shape: tuple[int, ...]):
    x = np.random.default_rng(0).normal(1.0, 1.0, shape).astype(np.float32)
    found, slope = quick(jax.value_and_grad(lambda a: sum_all(jnp.exp(a))))(x)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)).sum(), rtol=2e-6)
    np.testing.assert_allclose(slope, np.exp(x), rtol=1e-5)
    np.testing.assert_allclose(quick(jax.vmap(sum_all))(x[None]), x.sum(dtype=np.float64), rtol=2e-6)


def test_what_is_zero_has_the_gradient_of_what_it_was():
    """Also where it is mapped, and a function of something that is not."""
    x = jnp.array([0.3, 0.7])

    def f(y, k):
        return jnp.sum(jnp.exp(value_zero(y * k)) * y)

    value, slope = quick(jax.vmap(jax.value_and_grad(f), (None, 0)))(x, jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(value, [1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(slope, [[1.3, 1.7], [1.6, 2.4]], rtol=1e-6)
