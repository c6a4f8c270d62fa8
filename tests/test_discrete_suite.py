"""The problems of `benchmarks/discrete`: both forms are one density, and exact answers agree with independent methods."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer.util import log_density
from scipy import integrate, stats
from scipy.special import logsumexp

import hivi
from cases import perturbed, quick
from hivi._families.product import build_proposal
from hivi.diagnostics import exact_table

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "discrete"


def _module(name: str) -> Any:
    """A module of the suite: `benchmarks/` is no package, its scripts import one another by name."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before


suite = _module("suite")
ising, poisson, gaussian_mixture, change_point = (
    _module(name) for name in ("ising", "poisson", "gaussian_mixture", "change_point")
)
NAMES = tuple(suite.PROBLEMS)


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    return {name: make() for name, make in suite.PROBLEMS.items()}


def _draws(problem: Any, number: int = 8) -> dict[str, jnp.ndarray]:
    """Values of all latents, in the order of the model's supports."""
    rng, out = np.random.default_rng(0), {}
    for name, latent in problem.latents.items():
        shape = (number, *latent.shape)
        if latent.support.is_discrete:
            out[name] = jnp.asarray(rng.integers(0, problem.marginals[name].shape[-1], shape))
        else:
            out[name] = jnp.asarray(rng.gamma(2.0, 1.0, shape))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_plain_and_plated_forms_are_one_density(problems, name: str, x64) -> None:
    """As densities of the model's own space, so that transforms of continuous sites cancel."""
    problem = problems[name]
    assert list(problem.latents) == sorted(problem.latents)

    @jax.jit
    def both(z):
        return total(problem.log_joint(z)), log_density(problem.model, (), {}, z)[0]

    for k in range(4):
        plain, plated = both({site: values[k] for site, values in _draws(problem).items()})
        np.testing.assert_allclose(plain, plated, rtol=1e-6, atol=1e-4)


def total(terms: Any) -> jnp.ndarray:
    """A log-joint's number, or the sum of its terms."""
    return sum(jnp.sum(t) for t in jax.tree.leaves(terms))


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_targets_with_the_same_sites(problems, name: str) -> None:
    plain, plated = (problems[name].target(plated=p) for p in (False, True))
    assert {(s.name, s.shape) for s in plain.sites} == {(s.name, s.shape) for s in plated.sites}
    assert [s.name for s in plain.sites] == list(problems[name].latents)


@pytest.mark.parametrize("name", NAMES)
def test_marginals_are_distributions(problems, name: str) -> None:
    problem = problems[name]
    for site, found in problem.marginals.items():
        if problem.latents[site].support.is_discrete:
            np.testing.assert_allclose(found.sum(-1), 1.0, atol=1e-9 + 1.01 * problem.tail)
            assert found.shape[:-1] == problem.latents[site].shape
    if problem.table is not None:
        assert problem.table.sum() == pytest.approx(1.0, abs=1e-12)
        assert problem.tail < 1e-6


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("sk-20", "poisson-mixture-3", "poisson-sources")])
def test_log_joint_and_table_agree(problems, name: str, x64) -> None:
    """The JAX log-joint against the NumPy table, at random cells, with log Z between them."""
    problem = problems[name]
    if problem.table is None:
        pytest.skip("no table")
    z, joint = _draws(problem), jax.jit(lambda one: total(problem.log_joint(one)))
    for k in range(8):
        one = {site: values[k] for site, values in z.items()}
        cell = tuple(int(v) for site in problem.latents for v in np.ravel(one[site]))
        found = float(joint(one))
        assert found - problem.log_z == pytest.approx(np.log(problem.table[cell]), abs=1e-4)


@pytest.mark.parametrize("name", ["bernoulli-8", "sbn-layers", "poisson-mixture-2", "change-points-2"])
def test_diagnostics_make_the_same_table(problems, name: str) -> None:
    problem = problems[name]
    found = exact_table(problem.target(), problem.upper)
    np.testing.assert_allclose(found, problem.table, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.4, 0.5 * np.log1p(np.sqrt(2.0)), 0.6, 1.0])
def test_kaufman_is_brute_force(beta: float) -> None:
    """On both sides of the critical point, and at it; 2^16 configurations."""
    exact = float(logsumexp(beta * ising.energies(4)))
    assert ising.kaufman(4, beta) == pytest.approx(exact, abs=1e-10)


@pytest.mark.parametrize(("rows", "size", "beta"), [(8, 8, 0.4), (8, 8, 1.0), (9, 6, 0.45), (5, 7, 0.3), (5, 7, 0.7)])
def test_kaufman_is_a_transfer_matrix(rows: int, size: int, beta: float) -> None:
    """Tr T^rows over the 2^size configurations of a row."""
    s = np.array(list(itertools.product([-1.0, 1.0], repeat=size)))
    own = np.sum(s * np.roll(s, 1, 1), 1)
    matrix = np.exp(beta * (s @ s.T + 0.5 * (own[:, None] + own)))
    values = np.linalg.eigvalsh(matrix)
    assert ising.kaufman(size, beta, rows) == pytest.approx(float(np.log(np.sum(values**rows))), rel=1e-10)


def test_kaufman_at_sixteen() -> None:
    """Figures of the literature for log Z per spin over beta; dropping the sign of g_0 would show at beta = 0.4."""
    assert ising.kaufman(16, 0.4) / 256 / 0.4 == pytest.approx(2.1995, abs=5e-5)
    assert ising.kaufman(16, 1.0) / 256 == pytest.approx(2.0031, abs=5e-5)
    assert ising.kaufman(16, 1.0) - np.log(2.0) == pytest.approx(256 * 2.0004, abs=0.03)


def test_correlation_of_neighbours_is_brute_force() -> None:
    energy = ising.energies(4)
    weights = np.exp(0.4 * energy - logsumexp(0.4 * energy))
    assert ising.neighbour_correlation(4, 0.4) == pytest.approx(float(weights @ energy) / 32, abs=1e-8)


def test_transfer_matrices_are_enumeration(problems) -> None:
    problem = problems["ising-chain-12"]
    found = _module("base").site_marginals(problem.table, problem.latents)["z"]
    np.testing.assert_allclose(found, problem.marginals["z"], atol=1e-12)
    s = _module("base").spins(12)
    exact = problem.table.reshape(-1) @ np.mean(s[:, 1:] * s[:, :-1], 1)
    assert problem.statistics["neighbours"][1] == pytest.approx(exact, abs=1e-12)


def test_spin_glass_by_the_plain_sum() -> None:
    """Matrix products over halves against the double sum, pair by pair."""
    module = _module("sherrington_kirkpatrick")
    upper = module.couplings(7, seed=3)
    s = _module("base").spins(7)
    direct = 0.7 * sum(upper[i, j] * s[:, i] * s[:, j] for i in range(7) for j in range(i + 1, 7))
    np.testing.assert_allclose(module.log_table(upper, 0.7).reshape(-1), direct, atol=1e-12)


def test_gaussian_mixture_by_quadrature() -> None:
    """Integrating the means on a grid, with every point's assignment summed out, gives the enumerated log Z."""
    problem, x = gaussian_mixture.with_means(), gaussian_mixture.points(8, 2)
    grid = np.linspace(-12, 12, 801)
    own = stats.norm.logpdf(x[:, None], grid, gaussian_mixture.NOISE)
    points = np.logaddexp(own[:, :, None], own[:, None, :]).sum(0) - 8 * np.log(2)
    prior = stats.norm.logpdf(grid, 0, gaussian_mixture.PRIOR)
    density = np.exp(points + prior[:, None] + prior)
    total = integrate.trapezoid(integrate.trapezoid(density, grid), grid)
    assert problem.log_z == pytest.approx(np.log(total), abs=1e-8)
    mean = integrate.trapezoid(integrate.trapezoid(density, grid) * grid, grid) / total
    assert problem.marginals["mean"][0, 0] == pytest.approx(mean, abs=1e-8)


def test_change_point_by_quadrature(problems) -> None:
    """Both rates integrated on a grid, for every index."""
    x = change_point.counts((3.0, 1.5))
    grid = np.linspace(1e-6, 30, 20_001)
    prior = stats.gamma.pdf(grid, change_point.SHAPE, scale=1 / change_point.RATE)
    single = np.array([stats.poisson.pmf(v, grid) for v in x])
    total = 0.0
    for k in range(len(x)):
        parts = [integrate.simpson(prior * np.prod(p, 0), x=grid) for p in (single[: k + 1], single[k + 1 :])]
        total += parts[0] * parts[1] / len(x)
    assert problems["change-point"].log_z == pytest.approx(np.log(total), abs=1e-7)
    assert problems["change-point-rates"].log_z == problems["change-point"].log_z


def test_poisson_sources_by_convolution(problems) -> None:
    """The sum of Poissons is a Poisson: log Z is a sum over one count."""
    total = np.arange(200)
    exact = logsumexp(stats.poisson.logpmf(total, 2.0 + 4.0 + 6.0) + stats.norm.logpdf(12, total, 1.5))
    assert problems["poisson-sources"].log_z == pytest.approx(float(exact), abs=1e-9)


def test_control_a_wrong_table_is_noticed(problems, x64) -> None:
    """One cell out of 2^8 moved by half a nat: the log-joint no longer agrees with it."""
    problem = problems["bernoulli-8"]
    z = jnp.zeros(8, int)
    wrong = problem.table.copy()
    wrong[(0,) * 8] *= np.exp(0.5)
    gap = float(problem.log_joint({"z": z})) - problem.log_z - np.log(wrong[(0,) * 8])
    assert abs(gap) > 0.4


def test_measures_see_an_exact_fit_and_a_wrong_one() -> None:
    """Independent assignments: mean-field is exact, so that bound, KL and marginals must say so; its start must not."""
    measure, problem = _module("measure"), gaussian_mixture.fixed(3)
    options = {"key": jax.random.key(0), "progress": False, "learning_rate": 0.05}
    found = [
        measure.figures(problem, hivi.fit(problem.target(), hivi.MeanField(), steps=n, **options), jax.random.key(1))
        for n in (1, 400)
    ]
    assert found[1]["gap"] < 0.02
    assert found[1]["kl"] < 0.02
    assert found[1]["worst"] < 0.02
    assert found[0]["kl"] > 0.1


def test_stationary_flow_has_its_inverse_and_its_determinant(x64) -> None:
    module, key = _module("stationary"), jax.random.key(2)

    @quick
    def check(x):
        flow = perturbed(module.near_identity((3, 4), 2, key), key, 0.3)
        value, log_det = flow.forward(x)
        jacobian = jax.jacfwd(lambda v: flow.forward(v.reshape(3, 4))[0].reshape(-1))(x.reshape(-1))
        gain = jnp.exp(flow.gains(0))
        return {
            "determinant": log_det - jnp.linalg.slogdet(jacobian)[1],
            "inverse": flow.inverse(value) - x,
            "shifts": flow.forward(jnp.roll(x, (1, 2), (0, 1)))[0] - jnp.roll(value, (1, 2), (0, 1)),
            "matrix": module.circulant(gain) @ x.reshape(-1) - module.convolve(gain, x).reshape(-1),
        }

    for name, gap in check(jax.random.normal(key, (3, 4))).items():
        np.testing.assert_allclose(gap, 0.0, atol=1e-9, err_msg=name)


def test_stationary_auxiliary_weighs_its_own_draws_as_it_weighs_others(x64) -> None:
    """`draw` goes through the inverse flow, `excess` through the flow: log q - log r must be one function of lambda."""
    module = _module("stationary")
    sites = ising.lattice(3, 0.4).target().sites
    family = hivi.Hierarchical(module.Stationary((3, 3)), module.StationaryInverse())

    @quick
    def check(key):
        proposal = perturbed(build_proposal(family, sites, key), key)
        z, _ = proposal.propose(key)
        lam, excess = proposal.auxiliary.draw(z, proposal.prior, key)
        point = proposal.prior.coordinates({"lam": lam}, None)
        terms = proposal.auxiliary.excess(z, lam, (point.base, -point.log_det), proposal.prior, key)
        return total(terms), excess

    terms, excess = check(jax.random.key(3))
    assert float(terms) == pytest.approx(float(excess), abs=1e-5)


@pytest.mark.slow
def test_the_commands_run(monkeypatch, tmp_path):
    """A row of the suite and one of the noise table, in miniature."""
    noise = _module("noise")
    for module, name, value in (
        (suite, "STEPS", 20), (noise, "STEPS", 20), (noise, "GRADIENTS", 40), (noise, "LEARNING", 3),
        (suite, "FAMILIES", {n: suite.FAMILIES[n] for n in ("mean-field", "HVM, full-rank")}),
        (noise, "FAMILIES", {"mean-field": hivi.MeanField()}),
        (noise, "ESTIMATORS", {n: noise.ESTIMATORS[n] for n in ("score, leave-one-out", "score, moving average", "difference")}),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    suite.run("bernoulli-2", "exact differences", [0], tmp_path / "suite.json")
    assert [r["kl"] > 0 for r in suite.known(tmp_path / "suite.json").values()] == [True, True]
    noise.run("bernoulli-2", 0, tmp_path / "noise.json")
    rows = suite.known(tmp_path / "noise.json")
    assert rows["bernoulli-2|mean-field|score, leave-one-out|0"]["entries"] == 2
    assert "not a count" in rows["bernoulli-2|mean-field|difference|0"]["refused"]
