"""The second-order test at a mean-field optimum, against enumeration."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
import scipy.optimize
from jaxtyping import Array
from numpyro.distributions import Bernoulli, Poisson, constraints

import hivi
from cases import categorical, counts, mixed, pair
from hivi._curvature import Curvature, curvature
from hivi._estimators.second_order import Block, _lanczos, _operator, signals
from hivi._families.base import Directions
from hivi._families.mean_field import MeanFieldProposal
from hivi._families.product import build_proposal
from hivi._likelihood import likelihood

UPPER = 24
"""Counts are enumerated to here; the rates below are near 1."""
SAMPLES = 16_384


def at(target: hivi.Target, lam: dict[str, Array]) -> hivi.Fit:
    """A fit with given mean-field parameters."""
    none = np.zeros(0)
    history = {"step": none, "elbo": none, "stderr": none}
    proposal = MeanFieldProposal(target.sites, lam)
    return hivi.Fit(proposal, target.sites, hivi.Elbo(), hivi.MeanField(), True, history, 0.0, "given", target)


def bernoullis() -> hivi.Target:
    """Six Bernoullis with random fields, pairs and one triple."""
    draw = np.random.default_rng(3)
    pairs, field = np.triu(draw.normal(size=(6, 6)), 1), draw.normal(size=6)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        v = z["z"] * 1.0
        return {"field": field * v, "pairs": v @ pairs @ v, "triple": 0.8 * v[0] * v[2] * v[5]}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((6,), constraints.boolean)})


def binomials() -> hivi.Target:
    """Two coupled counts up to 69, which get a binomial q."""

    def log_joint(z: dict[str, Array]) -> Array:
        a, b = z["z"][0] / 69, z["z"][1] / 69
        return -12 * (a - 0.5) ** 2 - 10 * (b - 0.4) ** 2 + 16 * (a - 0.5) * (b - 0.4) - 9 * a**3

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((2,), constraints.integer_interval(0, 69))})


def factors() -> hivi.Target:
    """A one-layer Poisson factor model: x_v ~ Poisson(sum_k z_k W_kv + .1), three counts z."""
    weights = np.random.default_rng(1).gamma(0.7, 1.0, (3, 5))
    x = np.array([2, 0, 3, 1, 4])

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {"z": Poisson(0.8).log_prob(z["z"]), "x": Poisson(z["z"] @ weights + 0.1).log_prob(x)}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((3,), constraints.nonnegative_integer)})


@functools.cache
def optimum(make: Callable[[], hivi.Target]) -> tuple[hivi.Fit, np.ndarray]:
    """The mean-field optimum of a one-site target by enumeration, and M there, in double precision."""
    target = make()
    site = target.sites[0]
    own, size = likelihood(site), site.shape[0]
    shape, count = (size, own.width), site.values.count or UPPER
    values = range(site.values.low, site.values.low + count)
    cells = np.array(list(itertools.product(values, repeat=size)), np.int32)
    exact = np.asarray(jax.jit(jax.vmap(lambda v: target.log_joint({site.name: v})))(cells), np.float64)
    with jax.enable_x64(True):
        z, log_p = jnp.asarray(cells), jnp.asarray(exact)

        def log_q(flat: Array) -> Array:
            return jax.vmap(lambda v: own.log_prob(flat.reshape(shape), v).sum())(z)

        def loss(flat: Array) -> Array:
            return -jnp.sum(jnp.exp(log_q(flat)) * (log_p - log_q(flat)))

        value = jax.jit(jax.value_and_grad(loss))
        start = np.random.default_rng(0).normal(size=size * own.width) * 0.1
        solved = scipy.optimize.minimize(
            lambda f: [np.asarray(v, np.float64) for v in value(f)], start, jac=True, options={"gtol": 1e-9}
        )
        mu = jnp.asarray(solved.x)
        assert float(jnp.abs(value(mu)[1]).max()) < 1e-5
        fixed = log_p - jax.jit(log_q)(mu)
        hessian = np.asarray(jax.jit(jax.hessian(lambda f: jnp.sum(jnp.exp(log_q(f)) * fixed)))(mu))
        lam = {site.name: np.asarray(mu, np.float32).reshape(shape)}
    return at(target, {n: jnp.asarray(v) for n, v in lam.items()}), hessian


@pytest.mark.parametrize(
    "make",
    [
        bernoullis,
        pytest.param(categorical, marks=pytest.mark.slow),
        counts,
        pytest.param(binomials, marks=pytest.mark.slow),
    ],
    ids=lambda f: f.__name__,
)
def test_against_the_hessian_by_enumeration(make: Callable[[], hivi.Target]):
    fit, exact = optimum(make)
    found = curvature(fit, key=jax.random.key(0), samples=SAMPLES, top=2)
    vectors = found.vectors["z"].reshape(2, -1)
    expected = np.einsum("ki,ij,kj->k", vectors, exact, vectors)
    scale = np.abs(np.linalg.eigvalsh(exact)).max()
    assert np.all(found.stderr < 0.05 * scale)
    assert np.all(np.abs(found.eigenvalues - expected) < 4 * found.stderr + 1e-4 * scale)
    assert np.abs(expected[0] - np.linalg.eigvalsh(exact)[-1]) < 0.05 * scale
    assert found.warning == ""


@pytest.mark.parametrize("make", [bernoullis, categorical, counts, binomials], ids=lambda f: f.__name__)
def test_operator_entry_by_entry(make: Callable[[], hivi.Target]):
    fit, exact = optimum(make)
    target = fit.target
    block = Block(target.sites)
    h, score = signals(fit.proposal, target, block, {}, jax.random.key(1), SAMPLES)
    h, score = np.asarray(h[:, 0]), np.asarray(score[:, 0])
    apply = _operator(block.link, jnp.asarray(h), jnp.asarray(score))
    operator = np.asarray(jax.vmap(apply)(jnp.eye(h.shape[1])))
    products = (h - h.mean(0))[:, :, None] * score[:, None, :]
    stderr = (0.5 * (products + products.transpose(0, 2, 1))).std(0) / np.sqrt(SAMPLES)
    assert np.all(np.abs(operator - exact) < 4.5 * stderr + 1e-5)
    np.testing.assert_allclose(operator, operator.T, atol=1e-5)


def test_lanczos_finds_the_top_of_a_wide_spectrum():
    draw = np.random.default_rng(0)
    basis = np.linalg.qr(draw.normal(size=(40, 40)))[0]
    values = np.concatenate([[1.5, 1.0, 0.5], np.zeros(20), -np.geomspace(0.1, 200, 17)])
    matrix = jnp.asarray((basis * values) @ basis.T, jnp.float32)
    vectors = np.asarray(_lanczos(lambda u: matrix @ u, 40, 3, jax.random.key(0)))
    np.testing.assert_allclose(np.abs(vectors @ basis[:, :3]), np.eye(3), atol=2e-3)


@pytest.fixture(scope="module")
def table() -> Curvature:
    return curvature(at(pair(), {"z": jnp.zeros((2, 1))}), key=jax.random.key(0))


def test_bernoulli_table(table: Curvature):
    """The paper's table: eigenvalues +-.173 along (1, -1) and (1, 1); .00172 nats at s = .1 on each coordinate."""
    np.testing.assert_allclose(table.eigenvalues, [np.log(4) / 8, -np.log(4) / 8], rtol=2e-3)
    np.testing.assert_allclose(table.vectors["z"][0, :, 0], [0.5**0.5, -(0.5**0.5)], atol=1e-3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    assert table.gain(0.1 * 2**0.5).mean == pytest.approx(_gain(nodes, weights, 0.1 * 2**0.5), abs=2e-5)
    assert _gain(nodes, weights, 0.1 * 2**0.5) == pytest.approx(0.00172, abs=5e-6)
    promised, true = table.gain_to_expect.mean, _gain(nodes, weights, float(table.spread[0]))
    assert 0.7 * promised < true < promised
    assert table.couples[0] == "z[0] (+0.71) against z[1] (-0.71)"
    assert table.share == 1.0
    assert str(table).splitlines()[-1] == ("Mixing along z[0] (+0.71) against z[1] (-0.71) is worth about 0.079 nats.")


def _gain(nodes: np.ndarray, weights: np.ndarray, spread: float) -> float:
    """ELBO of the mixture along (1, -1) with an exact r, less mean-field's, by quadrature."""
    p = np.array([[0.1, 0.4], [0.4, 0.1]])
    one = 1 / (1 + np.exp(-spread * nodes / np.sqrt(2)))
    first, second = np.stack([1 - one, one]), np.stack([one, 1 - one])
    q = np.einsum("n,an,bn->ab", weights / weights.sum(), first, second)
    return float(np.sum(q * (np.log(p) - np.log(q))) - np.mean(np.log(4 * p)))


def test_one_layer_of_poissons_has_no_direction():
    """The theorem: M <= 0 for a one-layer Poisson model, whatever its weights."""
    fit, exact = optimum(factors)
    assert np.linalg.eigvalsh(exact).max() < 1e-4
    found = curvature(fit, key=jax.random.key(2), samples=SAMPLES)
    assert np.all(found.eigenvalues < 2.5 * found.stderr + 1e-4)
    assert found.stderr.max() < 0.05 * np.abs(np.linalg.eigvalsh(exact)).max()
    assert found.gain_to_expect.mean == 0.0
    assert str(found).endswith("No direction is worth mixing: mean-field is locally best.")


def test_too_early_is_said():
    found = curvature(at(bernoullis(), {"z": jnp.full((6, 1), 0.3)}), key=jax.random.key(0))
    assert found.slack.mean > 0.05
    assert "fit it longer" in found.warning
    assert found.warning in str(found)


ROWS = 12
COUPLING = np.linspace(-3.0, 4.0, ROWS)  # no row without any


def rows_model(coupling: np.ndarray) -> None:
    with numpyro.plate("docs", len(coupling)) as i:
        z = numpyro.sample("z", Bernoulli(0.5).expand([2]).to_event(1))
        numpyro.factor("pair", coupling[i] * (z[..., 0] - 0.5) * (z[..., 1] - 0.5))


@pytest.fixture(scope="module")
def documents() -> hivi.Fit:
    """Pairs of Bernoullis, one per row of a subsampled plate; mean-field is at one half by symmetry."""
    target = hivi.from_numpyro(rows_model, jnp.asarray(COUPLING, jnp.float32), subsample={"docs": 5})
    return at(target, {"z": jnp.zeros((ROWS, 2, 1))})


def test_rows_of_a_subsampled_plate(documents: hivi.Fit):
    chosen = [11, 0, 3, 8, 4, 7, 5]  # two minibatches, the second filled up
    found = curvature(documents, key=jax.random.key(0), rows=chosen, top=1, samples=1024)
    assert found.eigenvalues.shape == (7, 1)
    assert found.vectors["z"].shape == (7, 1, 2, 1)
    np.testing.assert_allclose(found.eigenvalues[:, 0], np.abs(COUPLING[chosen]) / 16, rtol=0.02)
    np.testing.assert_allclose(found.vectors["z"][:, 0, 1, 0], np.sign(COUPLING[chosen]) * 0.5**0.5, atol=0.01)
    assert found.share == 1.0
    assert "row of 'docs'" in str(found)
    assert found.couples == ("z[0] (+0.71) with z[1] (+0.71)",)
    everything = curvature(documents, key=jax.random.key(0), samples=64)
    assert sorted(everything.rows) == list(range(ROWS))
    assert everything.eigenvalues.shape == (ROWS, 2)


def test_rows_start_along_their_own_directions(documents: hivi.Fit):
    found = curvature(documents, key=jax.random.key(0), rows=[11, 0], top=1, samples=1024)
    family = hivi.Hierarchical(prior=hivi.FullRank(), start=found)
    proposal = build_proposal(family, documents.sites, jax.random.key(0))
    draws = np.asarray(jax.vmap(lambda k: proposal.propose(k)[1][0])(jax.random.split(jax.random.key(1), 2000)))
    spread = draws.std(0)
    assert np.all(spread[[0, 11]] > 0.6)
    assert np.all(spread[1:11] < 0.04)
    for row, sign in ((0, -1), (11, 1)):
        assert sign * np.corrcoef(draws[:, row].T)[0, 1] > 0.7


def lambdas(proposal: Any, count: int = 4000) -> np.ndarray:
    return np.asarray(
        jax.vmap(lambda k: proposal.prior.propose(k)[0]["lam"])(jax.random.split(jax.random.key(9), count))
    )


def grown(table: Curvature, family: hivi.Hierarchical, key: int = 0) -> hivi.Fit:
    proposal = build_proposal(family, table.fit.sites, jax.random.key(key))
    return dataclasses.replace(table.fit, proposal=proposal, family=family)


MEAN_FIELD = float(np.mean(np.log([0.1, 0.4, 0.4, 0.1])) + np.log(4))
"""The mean-field bound of the table."""


def test_starting_along_gains_what_was_promised(table: Curvature):
    small = dataclasses.replace(table, spread=np.array([0.4, 0.0]))
    fit = grown(table, hivi.Hierarchical(prior=hivi.FullRank(), start=small))
    factor = np.asarray(fit.proposal.prior.factor())
    expected = np.full((2, 2), -0.08) + 0.16 * np.eye(2)
    np.testing.assert_allclose(factor @ factor.T, expected + 0.03**2 * np.eye(2), atol=1e-4)
    bound, gain = fit.elbo(jax.random.key(1), 131_072), table.gain(0.4).mean
    assert bound.stderr < 0.2 * gain
    assert abs(bound.mean - MEAN_FIELD - gain) < 3 * bound.stderr + 0.1 * gain


@pytest.mark.slow
def test_a_flow_starts_wide_enough_to_leave_the_fit(table: Curvature):
    """Ten times as wide as a Gaussian, along no direction, and not worse than mean-field by more than that costs."""
    fit = grown(table, hivi.Hierarchical(prior=hivi.Flow(layers=3), start=table.fit))
    covariance = np.cov(lambdas(fit.proposal).T)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), 0.3, rtol=0.1)
    bound = fit.elbo(jax.random.key(1), 32_768)
    assert abs(bound.mean - MEAN_FIELD) < 0.02 + 3 * bound.stderr
    kwargs: dict[str, Any] = {"key": jax.random.key(2), "steps": 2000, "learning_rate": 0.02, "progress": False}
    left = hivi.fit(table.fit.target, fit.family, tolerance=None, **kwargs).elbo(jax.random.key(3))
    assert left.mean > MEAN_FIELD + 0.1


def test_along_and_start_by_name_are_the_same(table: Curvature):
    one = grown(table, hivi.Hierarchical(prior=hivi.FullRank(), start=table)).proposal
    other = grown(table, hivi.Hierarchical(prior=hivi.FullRank(), start=table.fit, along=table)).proposal
    third = grown(table, hivi.Hierarchical(prior=hivi.FullRank(), start=table.fit, along=table.directions)).proposal
    plain = grown(table, hivi.Hierarchical(prior=hivi.FullRank(), start=table.fit)).proposal
    np.testing.assert_array_equal(one.prior.lower, other.prior.lower)
    np.testing.assert_array_equal(one.prior.lower, third.prior.lower)
    assert float(jnp.abs(plain.prior.lower).max()) == 0.0


@pytest.mark.parametrize("prior", [hivi.Mixture(2), hivi.MeanField(), hivi.Flow(layers=2)], ids=repr)
def test_other_priors_start_from_the_fit_alone(table: Curvature, prior: Any):
    along = grown(table, hivi.Hierarchical(prior=prior, start=table)).proposal
    plain = grown(table, hivi.Hierarchical(prior=prior, start=table.fit)).proposal
    for a, b in zip(jax.tree.leaves(along), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_fit_along_directions_leaves_the_saddle(table: Curvature, tmp_path: Any):
    """From the isotropic start it stays there for as long; and such a run is saved and loaded."""
    kwargs = {"key": jax.random.key(3), "steps": 400, "progress": False}
    along = hivi.fit(table.fit.target, hivi.Hierarchical(prior=hivi.FullRank(), start=table), **kwargs)
    assert along.elbo(jax.random.key(4), 8192).mean > -0.2231 + 0.05
    again = hivi.load(along.save(tmp_path))
    np.testing.assert_array_equal(again.proposal.prior.lower, along.proposal.prior.lower)


def test_continuous_sites_are_drawn():
    """A Bernoulli beside two Normals: the block has one coordinate, whose own second derivative is zero."""
    fit = hivi.fit(mixed(), hivi.MeanField(), key=jax.random.key(0), steps=200, progress=False)
    found = curvature(fit, key=jax.random.key(1), samples=256, sites=["z"])
    assert found.eigenvalues.tolist() == [0.0]
    assert found.share == 0.0


def test_bad_input(table: Curvature, documents: hivi.Fit):
    key = jax.random.key(0)
    with pytest.raises(hivi.FitError, match="samples"):
        curvature(table.fit, key=key, samples=10)
    with pytest.raises(hivi.FitError, match="top"):
        curvature(table.fit, key=key, top=0)
    with pytest.raises(hivi.FitError, match="without its target"):
        curvature(dataclasses.replace(table.fit, target=None), key=key)
    with pytest.raises(hivi.FitError, match="without a subsampled plate"):
        curvature(table.fit, key=key, rows=[0])
    for rows in ([0, 0], [12], [-1], [], np.array([0.5]), np.array([[1]])):
        with pytest.raises(hivi.FitError, match="distinct row numbers"):
            curvature(documents, key=key, rows=rows)
    with pytest.raises(hivi.FitError, match="numbers to keep"):
        curvature(table.fit, key=key, samples=2**29)
    never = hivi.from_log_joint(
        lambda z: jnp.where(z["z"][0] == 1, -jnp.inf, 0.0), {"z": hivi.Latent((2,), constraints.boolean)}
    )
    with pytest.raises(hivi.FitError, match=r"'z'.*not finite"):
        curvature(at(never, {"z": jnp.zeros((2, 1))}), key=key)


def test_bad_directions(table: Curvature, documents: hivi.Fit):
    def build(family: hivi.Hierarchical) -> None:
        build_proposal(family, table.fit.sites, jax.random.key(0))

    with pytest.raises(hivi.FamilyError, match="no start"):
        build(hivi.Hierarchical(along=table))
    with pytest.raises(hivi.FamilyError, match="str"):
        build(hivi.Hierarchical(start=table.fit, along="z"))
    with pytest.raises(hivi.FamilyError, match=r"'z'.*shape"):
        build(hivi.Hierarchical(start=table.fit, along=Directions({"z": jnp.ones((1, 3, 1))}, jnp.ones(1))))
    rows = curvature(documents, key=jax.random.key(0), samples=64, rows=[1])
    with pytest.raises(hivi.FamilyError, match="row by row"):
        build(hivi.Hierarchical(start=table.fit, along=rows))
