"""`hivi.compare`: the table's numbers, failures that stay apart, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import Poisson, constraints
from typer.testing import CliRunner, Result

import hivi
from hivi import plots
from hivi._comparison import WIDTH, Row, judged
from hivi._marginal import KHat
from hivi.cli.main import app
from hivi.compare import default_families

KEY = jax.random.key(0)
CENTRE = np.array([1.0, -2.0])
COVARIANCE = np.array([[1.0, 0.8], [0.8, 4.0]])

MODEL = """
import jax.numpy as jnp, numpyro, numpyro.distributions as dist

def line(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

def impossible(x, y=None):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    numpyro.factor("never", -jnp.inf + slope)
"""


def table() -> hivi.Target:
    logs = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
    return hivi.from_log_joint(lambda z: logs[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)})


def gaussian() -> hivi.Target:
    """Normalised, so that log p(x) = 0."""
    precision = jnp.asarray(np.linalg.inv(COVARIANCE))
    constant = -0.5 * np.linalg.slogdet(2 * np.pi * COVARIANCE)[1]

    def log_joint(z: dict[str, Any]) -> Any:
        x = z["x"] - CENTRE
        return constant - 0.5 * x @ precision @ x

    return hivi.from_log_joint(log_joint, {"x": hivi.Latent((2,))})


@pytest.fixture(scope="module")
def discrete() -> hivi.Comparison:
    families = {
        "mean-field": hivi.MeanField(),
        "gaussian": hivi.FullRank(),
        "hvm": hivi.Hierarchical(prior=hivi.Flow(2)),
        "mixture": hivi.Mixture(2),
    }
    return hivi.compare(table(), families, key=KEY, steps=2000, progress=False)


@pytest.fixture(scope="module")
def continuous() -> hivi.Comparison:
    families = {"mean-field": hivi.MeanField(), "full-rank": hivi.FullRank()}
    return hivi.compare(gaussian(), families, key=KEY, steps=3000, progress=False, nuts=True, warmup=500)


def test_numbers_on_the_papers_table(discrete: hivi.Comparison) -> None:
    """Mean-field's exact bound is -KL = -0.2231; the table is normalised, so the best tighter bound is 0."""
    flat, hvm = discrete["mean-field"], discrete["hvm"]
    assert flat.bound is not None
    assert flat.gap is not None
    assert hvm.bound is not None
    assert flat.bound.stderr < 0.015
    assert flat.bound.mean == pytest.approx(-0.2231, abs=4 * flat.bound.stderr)
    assert flat.gap.mean == pytest.approx(0.2231, abs=4 * flat.gap.stderr)
    assert hvm.bound.mean > flat.bound.mean + 0.1
    assert hvm.khat is not None
    assert not hvm.khat.exact
    assert hvm.khat.trusted
    assert any("nats" in f for f in flat.faults)
    assert discrete.best == "mixture"
    assert set(discrete.fits) == {"mean-field", "hvm", "mixture"}
    assert discrete.fits["hvm"].sample(KEY, 5)["z"].shape == (5, 2)


def test_a_family_that_fails_keeps_a_row_and_loses_nothing(discrete: hivi.Comparison) -> None:
    row = discrete["gaussian"]
    assert row.bound is None
    assert row.faults[0].startswith("refused the target: FullRank at site 'z': found a discrete site")
    assert "failed" in str(discrete)


def test_sharing(discrete: hivi.Comparison) -> None:
    """The hierarchy grows from the one mean-field fit, and every row is what its own fit gives, whatever the others are."""
    start = discrete.fits["hvm"].family.start
    assert start is discrete.fits["mean-field"]
    assert "grown from the mean-field fit" in discrete["hvm"].remarks
    alone = hivi.compare(table(), {"m": hivi.Mixture(2)}, key=KEY, steps=2000, progress=False)
    assert alone["m"].bound == discrete["mixture"].bound
    assert alone["m"].khat == discrete["mixture"].khat


def test_the_table_fits_and_says_it_in_words(discrete: hivi.Comparison, continuous: hivi.Comparison) -> None:
    for found in (discrete, continuous):
        lines = str(found).splitlines()
        assert max(map(len, lines)) <= WIDTH
        for row in found.rows:
            assert sum(line.startswith(f"{row.name}") for line in lines) == 2
        page = found._repr_html_()
        assert page.count("<tr>") == len(found.rows) + 1
    assert "k-hat with log q(z) estimated" in str(discrete)
    assert repr(discrete) == "Comparison(3 of 4 families fitted)"
    with pytest.raises(KeyError, match="not one of"):
        discrete["nobody"]


def test_nuts_against_exact_moments(continuous: hivi.Comparison) -> None:
    nuts = continuous.reference
    assert nuts is not None
    assert nuts.problem == ""
    assert nuts.r_hat < 1.01
    noise = 1 / np.sqrt(nuts.ess)
    assert noise < 0.06
    sd = np.sqrt(np.diag(COVARIANCE))
    np.testing.assert_allclose(nuts.mean["x"] / sd, CENTRE / sd, atol=4 * noise)
    np.testing.assert_allclose(np.log(nuts.sd["x"] / sd), 0.0, atol=4 * noise)
    full, flat = continuous["full-rank"].against, continuous["mean-field"].against
    assert full is not None
    assert flat is not None
    assert full.mean_error < 0.2
    assert abs(full.log_sd_ratio) < 0.15
    # Mean-field has the conditional variance: sqrt(1 - rho^2) of the sd, rho = 0.4.
    assert flat.log_sd_ratio == pytest.approx(0.5 * np.log(1 - 0.16), abs=0.1)
    assert continuous.best == "full-rank"
    assert "mean err" in str(continuous)


def test_nuts_says_why_it_cannot_run() -> None:
    found = hivi.compare(table(), {"m": hivi.MeanField()}, key=KEY, steps=100, progress=False, nuts=True)
    assert "needs continuous latents only, and 'z' is discrete" in str(found)
    assert any("did not converge in 100 steps, too few" in f for f in found["m"].faults)
    assert found["m"].step_seconds is None  # all steps were in the chunk that compiles


def test_words_on_rows() -> None:
    """Each fault by itself, from made-up numbers."""
    bad = KHat(0.9, True, 0.0, 1000, 0)
    rows = [
        Row("mean-field", "", bound=hivi.Estimate(-1.0, 0.01), converged=True),
        Row("flow", "", bound=hivi.Estimate(-1.5, 0.01), khat=bad, converged=False, steps=7000),
        Row("good", "", bound=hivi.Estimate(0.0, 0.001), tighter=hivi.Estimate(0.001, 0.001), converged=True),
        Row("broken", "", error="refused"),
    ]
    flat, flow, good, broken = judged(rows, None, "mean-field")
    assert flat.faults == ("its bound misses at least 1 nats",)
    assert [f.split(",")[0].split(":")[0] for f in flow.faults] == [
        "did not converge in 7000 steps", "k-hat 0.90 > 0.7", "bound 0.5 nats below mean-field's",
        "its bound misses at least 1.5 nats",
    ]  # fmt: skip
    assert good.faults == ()
    assert broken.faults == ("refused",)


def test_further_columns() -> None:
    row = Row("a", "", bound=hivi.Estimate(-1.0, 0.01), converged=True, notes={"hierarchy?": "+0.2 nats"})
    other = Row("b" * 200, "", bound=hivi.Estimate(-1.0, 0.01), converged=True)
    lines = str(hivi.Comparison((row, other), {}, notes={"curvature": "no direction"})).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "hierarchy?" in lines[2]
    assert lines[4].endswith("+0.2 nats")
    assert lines[-1] == "curvature: no direction"


def test_minibatches_have_a_bound_and_say_what_they_lack() -> None:
    def model(x: Any, y: Any) -> None:
        slope = numpyro.sample("slope", dist.Normal(0, 3))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)

    x = jnp.linspace(-1, 1, 20)
    target = hivi.from_numpyro(model, x, 2 * x, subsample={"data": 5})
    found = hivi.compare(target, {"m": hivi.MeanField()}, key=KEY, steps=200, progress=False, nuts=True)
    row = found["m"]
    assert row.bound is not None
    assert row.tighter is None
    assert row.khat is None
    assert any("no tighter bound" in r for r in row.remarks)
    assert any("no k-hat (minibatches" in r for r in row.remarks)
    assert "NUTS: needs whole data" in str(found)


def test_what_cannot_be_measured_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(sys.modules["hivi.compare"], "measure", broken)
    found = hivi.compare(table(), {"m": hivi.MeanField()}, key=KEY, steps=100, progress=False)
    assert "could not be measured: ZeroDivisionError: by accident" in found["m"].faults[0]
    assert set(found.fits) == {"m"}
    assert json.loads(found.to_json())["best"] is None


def test_json(discrete: hivi.Comparison, continuous: hivi.Comparison) -> None:
    read = json.loads(discrete.to_json())
    assert set(read) == {"target", "best", "families", "nuts", "notes"}
    assert read["best"] == "mixture"
    row = {r["name"]: r for r in read["families"]}["hvm"]
    assert set(row) == set(Row.__dataclass_fields__)
    assert set(row["bound"]) == {"mean", "stderr"}
    assert set(row["khat"]) == {"value", "exact", "noise", "samples", "inner"}
    nuts = json.loads(continuous.to_json())["nuts"]
    assert len(nuts["mean"]["x"]) == 2
    assert nuts["draws"] == 4000


def test_plots(discrete: hivi.Comparison, tmp_path: Path) -> None:
    discrete.figure().savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    _, (axes,) = plots.panels(1)
    assert plots.bounds(axes, {"a": [(0.0, 0.1)], "b": [(1.0, 0.1), (2.0, 0.1)]}) is axes


def counts() -> hivi.Target:
    latents = {"z": hivi.Latent((), constraints.nonnegative_integer)}
    return hivi.from_log_joint(lambda z: Poisson(3.0).log_prob(z["z"]), latents)


@pytest.mark.slow
def test_a_hierarchy_of_free_spread_grows_from_mean_field_of_free_spread() -> None:
    free = {n: f for n, f in default_families(counts()).items() if "dispersed" in n and "mixture" not in n}
    grown = hivi.compare(counts(), free, key=jax.random.key(0), steps=20, progress=False)
    assert "grown from the mean-field fit of free spread" in grown["hierarchical-dispersed"].remarks
    assert grown.fits["hierarchical-dispersed"].family.start is grown.fits["mean-field-dispersed"]


def test_defaults_suit_the_supports() -> None:
    assert list(default_families(table())) == ["mean-field", "mixture", "hierarchical", "hierarchical-full-rank"]
    names = [
        "mean-field",
        "mean-field-dispersed",
        "mixture",
        "mixture-dispersed",
        "hierarchical",
        "hierarchical-full-rank",
        "hierarchical-dispersed",
    ]
    assert list(default_families(counts())) == names
    assert list(default_families(gaussian())) == [
        "mean-field",
        "full-rank",
        "standardised",
        "flow",
        "mixture",
        "hierarchical",
    ]


@pytest.mark.parametrize(
    ("families", "found"),
    [({}, "an empty dict"), ({"a": 3}, "3"), ({"a": hivi.MeanField}, "a class: call it")],
)
def test_refusals(families: Any, found: str) -> None:
    with pytest.raises(hivi.FamilyError, match=found):
        hivi.compare(table(), families, key=KEY, steps=10)
    with pytest.raises(hivi.FitError, match="at least 100"):
        hivi.compare(table(), key=KEY, draws=3)


def test_everything_fails() -> None:
    found = hivi.compare(table(), {"a": hivi.FullRank(), "b": hivi.Flow()}, key=KEY, steps=10, progress=False)
    assert [r.error.startswith("refused") for r in found.rows] == [True, True]
    assert json.loads(found.to_json())["best"] is None
    with pytest.raises(hivi.FitError, match="no family that could be fitted"):
        _ = found.best


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    (path / "model.py").write_text(MODEL)
    x = np.linspace(-1, 1, 20)
    (path / "data.json").write_text(json.dumps({"x": x.tolist(), "y": (2 * x + 0.1 * np.cos(20 * x)).tolist()}))
    return path


def command(folder: Path, *words: Any, model: str = "line") -> Result:
    data = ("--data", folder / "data.json")
    return CliRunner().invoke(app, [str(w) for w in ("compare", f"{folder}/model.py:{model}", *data, *words)])


def test_command(folder: Path) -> None:
    plot = folder / "figures" / "plot.png"
    words = ("--families", "mean-field,full-rank", "--steps", 2000, "--plot", plot, "--json")
    result = command(folder, *words)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert [r["name"] for r in found["families"]] == ["mean-field", "full-rank"]
    assert found["families"][0]["bound"]["mean"] == pytest.approx(found["families"][1]["bound"]["mean"], abs=0.1)
    assert found["plot"] == str(plot)
    assert plot.exists()
    assert "k-hat" in result.stderr


def test_command_ends_with_the_right_code(folder: Path) -> None:
    few = command(folder, "--families", "mean-field", "--steps", 100)
    assert few.exit_code == 3
    assert "did not converge" in few.stdout
    unknown = command(folder, "--families", "mean-field,nonsense")
    assert unknown.exit_code == 2
    assert "nonsense" in unknown.stderr
    assert command(folder, "--families", ",").exit_code == 2
    failed = command(folder, "--families", "mean-field", "--steps", 100, model="impossible")
    assert failed.exit_code == 1
    assert "no family that could be fitted" in failed.stderr
    assert "'never'" in failed.stdout.replace("\n", " ")
