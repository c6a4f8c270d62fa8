"""The experiments, and the exact tables that they rest on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints
from typer.testing import CliRunner

import hivi
from hivi import diagnostics, plots
from hivi._bounds import Elbo
from hivi._families.product import build_proposal
from hivi.cli.main import app
from hivi.diagnostics import exact_table, kl, marginal_table, sample_lambda, total_variation
from hivi.reproduce import ard, bernoulli, mixture_poisson
from hivi.reproduce.report import Column

KEY = jax.random.key(0)
TWO = np.asarray(bernoulli.TWO)


def short(target: hivi.Target, family: Any, steps: int = 100, **options: Any) -> hivi.Fit:
    return hivi.fit(target, family, key=KEY, steps=steps, tolerance=None, progress=False, **options)


def unfitted(target: hivi.Target, family: Any) -> hivi.Fit:
    """A fit of no steps, which compiles nothing."""
    history = {"step": np.zeros(0, int), "elbo": np.zeros(0), "stderr": np.zeros(0)}
    proposal = build_proposal(family, target.sites, KEY)
    return hivi.Fit(proposal, target.sites, Elbo(), family, False, history, 0.0, "not fitted", target)


@pytest.fixture(scope="module")
def flow_fit() -> hivi.Fit:
    return short(bernoulli.table_target(TWO), hivi.Hierarchical(prior=hivi.Flow(layers=1)), steps=500)


@pytest.mark.parametrize("table", [bernoulli.TWO, bernoulli.THREE])
def test_exact_table_is_the_table(table: Any) -> None:
    assert np.sum(table) == pytest.approx(1.0)
    np.testing.assert_allclose(exact_table(bernoulli.table_target(np.asarray(table))), table, rtol=1e-5)


def test_exact_table_of_counts_and_intervals() -> None:
    def log_joint(z: dict[str, Any]) -> Any:
        return (
            z["n"] * math.log(2.0)
            - jax.scipy.special.gammaln(z["n"] + 1.0)
            + jnp.where(z["i"] == 2, math.log(3.0), 0.0)
        )

    latents = {
        "n": hivi.Latent(support=constraints.nonnegative_integer),
        "i": hivi.Latent(support=constraints.integer_interval(1, 3)),
    }
    found = exact_table(hivi.from_log_joint(log_joint, latents), upper=30)
    poisson = np.array([math.exp(-2) * 2**n / math.factorial(n) for n in range(31)])
    np.testing.assert_allclose(found, np.outer(poisson, [0.2, 0.6, 0.2]), atol=1e-6)


def test_kl_and_total_variation_by_hand() -> None:
    uniform = np.full((2, 2), 0.25)
    assert kl(uniform, TWO) == pytest.approx(0.22314, abs=5e-6)
    assert kl(TWO, TWO) == 0.0
    assert kl(uniform, np.array([[0.0, 0.5], [0.25, 0.25]])) == np.inf
    assert total_variation(uniform, TWO) == pytest.approx(0.3)
    assert total_variation(np.array([0.5, 0.3]), np.array([0.5, 0.5])) == pytest.approx(0.2)  # the tail counts


def test_mean_field_table_is_exact() -> None:
    """KL by the table equals the negative exact bound, and 0.22314 at the uniform table, its optimum."""
    fit = short(bernoulli.table_target(TWO), hivi.MeanField(), steps=1000)
    found = marginal_table(fit)
    assert found.method == "exact"
    p = np.asarray(jax.nn.sigmoid(fit.proposal.parameters()["z"][:, 0]), float)
    np.testing.assert_allclose(found.probability, np.outer([1 - p[0], p[0]], [1 - p[1], p[1]]), rtol=1e-6)
    assert kl(found.probability, TWO) == pytest.approx(0.22314, abs=1e-3)


def test_mixture_table_is_exact() -> None:
    fit = unfitted(bernoulli.table_target(TWO), hivi.Mixture(components=2))
    found = marginal_table(fit)
    assert found.method == "exact"
    values = jnp.stack(jnp.meshgrid(jnp.arange(2), jnp.arange(2), indexing="ij"), -1)
    log_q = fit.log_prob({"z": values}, key=KEY)
    np.testing.assert_allclose(found.probability, np.exp(log_q), rtol=1e-5)


@pytest.mark.slow
def test_quadrature_agrees_with_importance_sampling_and_monte_carlo(flow_fit: hivi.Fit) -> None:
    found = marginal_table(flow_fit)
    assert found.method == "quadrature"
    assert found.error < 1e-6
    assert found.probability.sum() == pytest.approx(1.0, abs=1e-9)
    values = jnp.stack(jnp.meshgrid(jnp.arange(2), jnp.arange(2), indexing="ij"), -1)
    log_q = flow_fit.log_prob({"z": values}, key=KEY, samples=20_000)
    np.testing.assert_allclose(found.probability, np.exp(log_q), rtol=0.03)
    drawn = diagnostics._monte_carlo(flow_fit.proposal, (2, 2), KEY, 65_536)
    assert drawn.error < 2e-3
    np.testing.assert_allclose(drawn.probability, found.probability, atol=5 * drawn.error)


def test_a_mixture_prior_and_more_dimensions() -> None:
    """Three dimensions by quadrature, four by Monte Carlo; both sum to one."""
    for size, method in ((3, "quadrature"), (4, "Monte Carlo")):
        table = np.full((2,) * size, 0.5**size)
        fit = unfitted(bernoulli.table_target(table), hivi.Hierarchical(prior=hivi.Mixture(2)))
        found = marginal_table(fit, draws=4096)
        assert found.method == method
        assert found.probability.shape == (2,) * size
        assert found.probability.sum() == pytest.approx(1.0, abs=1e-5)


def test_refusals() -> None:
    real = hivi.from_log_joint(lambda z: -(z["x"] ** 2), {"x": hivi.Latent()})
    with pytest.raises(hivi.TargetError, match=r"'x'.*continuous"):
        exact_table(real)
    with pytest.raises(hivi.TargetError, match="upper"):
        exact_table(mixture_poisson.target())
    with pytest.raises(hivi.TargetError, match="at most"):
        exact_table(mixture_poisson.target(), upper=5000)
    with pytest.raises(hivi.FitError, match="hierarchical"):
        sample_lambda(unfitted(bernoulli.table_target(TWO), hivi.MeanField()), KEY)


def test_mixture_poisson_target_and_modes() -> None:
    table = exact_table(mixture_poisson.target(), mixture_poisson.UPPER)
    masses = mixture_poisson.mode_masses(table)
    assert sum(masses) == pytest.approx(1.0)
    weights = mixture_poisson.WEIGHTS / mixture_poisson.WEIGHTS.sum()
    np.testing.assert_allclose(masses, weights, atol=0.01)  # regions are nearly the components
    z = jnp.array([3, 7])
    assert float(mixture_poisson.target().log_joint({"z": z})) == pytest.approx(math.log(table[3, 7]), abs=1e-4)


def test_ard_measures() -> None:
    x, y = ard.data()
    assert x.shape == (442, 10)
    np.testing.assert_allclose(np.var(np.asarray(y)), 1.0, rtol=1e-4)
    target = ard.from_numpyro(ard.model, x, y)
    assert {s.name: s.shape for s in target.sites} == {"sigma": (), "alpha": (10,), "w": (10,)}
    rng = np.random.default_rng(0)
    alpha = rng.lognormal(size=(4000, 2))
    draws = ard.coordinates({"w": alpha, "alpha": alpha, "sigma": np.ones(4000)})
    assert draws.shape == (4000, 5)
    assert ard.dependence(draws) == pytest.approx(1.0)


def test_columns_format_cells() -> None:
    row = {"a": 1.23456, "b": hivi.Estimate(-1.0, 0.25), "c": [0.5, 0.25], "d": "x"}
    texts = [Column(k, k, ".2f").text(row) for k in "abcde"]
    assert texts == ["1.23", "-1.00 ± 0.25", "0.50 0.25", "x", "-"]


def test_plots_take_and_return_axes(flow_fit: hivi.Fit) -> None:
    figure, axes = plots.panels(5, rows=2)
    lam = sample_lambda(flow_fit, KEY, 500)
    assert lam.shape == (500, 2)
    drawn = [
        plots.squares(axes[0], TWO, "table"),
        plots.heatmap(axes[1], TWO),
        plots.scatter(axes[2], lam),
        plots.density(axes[3], lam[:, 0], "λ"),
        plots.trace(axes[4], flow_fit.history),
    ]
    assert drawn == axes
    plots.density(axes[3], np.array([0, 1, 1, 2]))
    figure.canvas.draw()
    with pytest.raises(hivi.FitError, match="empty"):
        plots.trace(axes[4], {"step": np.zeros(0), "elbo": np.zeros(0)})


def test_reproduce_bernoulli_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"HVM": (hivi.Hierarchical(prior=hivi.MeanField(), auxiliary=hivi.Linearised()), Elbo())}
    monkeypatch.setattr(bernoulli, "methods", lambda: few)
    words = ["reproduce", "bernoulli", "--steps", "20", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert [t["title"] for t in found["tables"]] == ["two Bernoullis", "three Bernoullis"]
    assert [r["method"] for r in found["tables"][0]["rows"]] == ["exact", "HVM"]
    for row in found["tables"][0]["rows"][1:]:
        q = np.array(row["table"]).reshape(2, 2)
        assert row["kl"] == pytest.approx(kl(q, TWO), abs=1e-4)
        assert -row["bound"]["mean"] > row["kl"] - 5 * row["bound"]["stderr"]
    assert "HVM" in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figure1.png", "figure1.svg", "lambda.png", "lambda.svg"]


def rows_of(report: Any, table: int = 0) -> dict[str, Any]:
    return {row["method"]: row for row in report.tables[table].rows}


@pytest.mark.slow
def test_bernoulli_at_full_length(tmp_path: Path) -> None:
    """Mean-field loses 0.223 nats; the hierarchical family at most a twentieth of that, with valid bounds."""
    report = bernoulli.run(tmp_path)
    for number, p in enumerate((TWO, np.asarray(bernoulli.THREE))):
        rows = rows_of(report, number)
        for name, row in rows.items():
            assert np.sum(row["table"]) == pytest.approx(1.0, abs=1e-5)
            assert -row["bound"].mean >= row["kl"] - 5 * row["bound"].stderr, name
        assert rows["HVM, mixture of 2"]["kl"] < 0.002
        assert rows["HVM, flow L=2, K=8"]["kl"] < 0.25 * rows["mean-field"]["kl"]
        assert kl(np.asarray(rows["exact"]["table"]).reshape(p.shape), p) == 0.0
    two = rows_of(report)
    assert two["mean-field"]["kl"] == pytest.approx(0.22314, abs=1e-3)
    for name in ("HVM, flow L=1", "HVM, flow L=2", "HVM, flow L=4", "HVM, flow L=8", "HVM, flow L=2, K=8"):
        assert two[name]["kl"] < 0.01
    assert two["HVM, flow L=2, K=8"]["bound"].mean > two["HVM, flow L=2"]["bound"].mean + 0.01


@pytest.mark.slow
def test_mixture_poisson_at_full_length(tmp_path: Path) -> None:
    """The hierarchical family with a mixture prior finds every mode; mean-field one."""
    rows = rows_of(mixture_poisson.run(tmp_path))
    best = rows["HVM, mixture of 8"]
    assert best["total_variation"] <= 0.05
    assert best["worst"] >= 0.5
    assert rows["mean-field"]["total_variation"] > 0.2
    assert rows["mean-field"]["worst"] < 0.1
    assert rows["HVM, flow, M=8"]["worst"] > rows["HVM, flow"]["worst"]


@pytest.mark.slow
def test_ard_at_full_length(tmp_path: Path) -> None:
    """The bound above mean-field's by five standard errors; at most half of its error in standard deviations."""
    rows = rows_of(ard.run(tmp_path))
    plain = rows["mean-field"]
    for name in ("HVM, flow", "HVM, full-rank"):
        row = rows[name]
        noise = math.hypot(row["bound"].stderr, plain["bound"].stderr)
        assert row["bound"].mean - plain["bound"].mean > 5 * noise
        assert row["log_sd_ratio"] <= 0.5 * plain["log_sd_ratio"]
        assert row["mean_error"] < plain["mean_error"]
    assert rows["NUTS"]["dependence"] > 0.03
    assert abs(plain["dependence"]) < 0.02
