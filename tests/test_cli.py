"""The command line: what it writes, what it prints, and how it ends."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import hivi
from hivi._arviz import load_arviz
from hivi._fit.progress import Bar, plain_lines
from hivi._target import statements
from hivi.cli import fit as fit_command
from hivi.cli.common import failures
from hivi.cli.inputs import read_data
from hivi.cli.main import app
from hivi.cli.outputs import summarise

arviz = load_arviz()
MODEL = """
import jax.numpy as jnp, numpyro, numpyro.distributions as dist

def line(x, y=None, noise=0.5):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)

def counts(total):
    with numpyro.plate("groups", 2):
        k = numpyro.sample("k", dist.Poisson(3.0))
    numpyro.sample("total", dist.Normal(k.sum(), 1.0), obs=total)

number = 3
"""


def hivi_command(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def last_json(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the same data in three formats."""
    path = tmp_path_factory.mktemp("cli")
    (path / "model.py").write_text(MODEL)
    x = np.linspace(-1, 1, 20)
    y = 2 * x + 0.1 * np.cos(20 * x)
    np.savez(path / "data.npz", x=x, y=y)
    (path / "data.csv").write_text("x,y\n" + "".join(f"{a},{b}\n" for a, b in zip(x, y, strict=True)))
    (path / "data.json").write_text(json.dumps({"x": x.tolist(), "y": y.tolist(), "noise": 0.5}))
    return path


class Run(NamedTuple):
    result: Result
    out: Path


@pytest.fixture(scope="module")
def finished(folder: Path) -> Run:
    """One fit that converges, with JSON."""
    out = folder / "run"
    words = ("--family", "mean-field", "--steps", 2000, "--draws", 500, "--out", out, "--json")
    return Run(hivi_command("fit", f"{folder}/model.py:line", "--data", folder / "data.csv", *words), out)


def test_version_and_help() -> None:
    assert hivi_command("--version").stdout == f"hivi {hivi.__version__}\n"
    for words in (
        [],
        ["fit"],
        ["compare"],
        ["explain"],
        ["reproduce"],
        *(["reproduce", e] for e in ("bernoulli", "mixture-poisson", "ard")),
    ):
        result = hivi_command(*words, "--help")
        assert result.exit_code == 0
        assert "Exit codes" in result.stdout
        if words and words != ["reproduce"]:
            assert "Example" in result.stdout
            assert "--seed" in result.stdout
            assert "--json" in result.stdout


def test_fit_prints_one_json_object_and_tables_apart(finished: Run) -> None:
    result = finished.result
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    found = last_json(result)
    assert found["converged"] is True
    assert found["family"] == "MeanField()"
    assert found["summary"][0]["latent"] == "slope"
    assert found["summary"][0]["mean"] == pytest.approx(2.0, abs=0.2)
    assert found["bound"]["stderr"] < 0.1
    assert "posterior" in result.stderr
    assert "Traceback" not in result.stderr


def test_fit_writes_a_run(finished: Run) -> None:
    out = finished.out
    fit = hivi.load(out)
    assert fit.sample(jax.random.key(0), 5)["slope"].shape == (5,)
    with (out / "history.csv").open() as stream:
        history = list(csv.DictReader(stream))
    assert len(history) == len(fit.history["step"])
    assert set(history[0]) == set(fit.history)
    with (out / "summary.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert set(row) == {"latent", "mean", "sd", "5%", "50%", "95%"}
    assert float(row["5%"]) < float(row["50%"]) < float(row["95%"])
    draws = np.load(out / "draws.npz")["slope"]
    assert draws.shape == (500,)
    assert float(row["mean"]) == pytest.approx(draws.mean(), rel=1e-5)
    posterior = arviz.from_netcdf(str(out / "posterior.nc")).posterior
    np.testing.assert_array_equal(posterior["slope"].values[0], draws)


def test_the_three_formats_are_the_same_data(folder: Path) -> None:
    """And the same seed gives the same numbers."""
    numbers = []
    for data in ("data.npz", "data.csv", "data.json"):
        words = ("--family", "mean-field", "--steps", 100, "--draws", 10, "--out", folder / data.replace(".", "_"))
        result = hivi_command("fit", f"{folder}/model.py:line", "--data", folder / data, *words, "--json")
        assert result.exit_code == 3, result.output  # 100 steps are too few to converge
        assert "take at least 2000" in result.stderr
        numbers.append(last_json(result)["summary"])
    assert numbers[0] == numbers[1] == numbers[2]


def test_hivi_chooses_and_says_which(folder: Path) -> None:
    words = ("--steps", 20, "--draws", 10, "--out", folder / "chosen")
    result = hivi_command("fit", f"{folder}/model.py:line", "--data", folder / "data.csv", *words)
    assert result.exit_code == 3, result.output
    assert "family: Standardised() (chosen by hivi" in result.stdout


def test_a_fit_without_terminal_prints_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line; a fit of the library stays silent there."""
    monkeypatch.setattr(fit_command, "plain_lines", lambda: plain_lines(every=0.0))
    words = ("--family", "mean-field", "--steps", 200, "--draws", 10, "--out", folder / "lines", "--json")
    result = hivi_command("fit", f"{folder}/model.py:line", "--data", folder / "data.csv", *words)
    lines = [line for line in result.stderr.splitlines() if line.startswith("MeanField: step ")]
    assert len(lines) == 2
    assert re.fullmatch(r"MeanField: step 100 of at most 200 \(50%\), bound -?\d+\.\d+ ± .*, \d+ steps/s", lines[0])
    assert len(result.stdout.splitlines()) == 1


def test_a_bar_prints_where_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    def show(shown: bool) -> str:
        with Bar(10, "fit", shown) as bar:
            bar.update(5, np.arange(5.0), 3.0)
        return capsys.readouterr().err

    assert show(True) == ""
    with plain_lines(every=0.0):
        assert show(True) == "fit: compiling\nfit: step 5 of at most 10 (50%), bound 2.0000 ± 0.7071, 3 steps/s\n"
        assert show(False) == ""
    with plain_lines(every=1000.0):
        assert show(True) == "fit: compiling\n"
    assert show(True) == ""


def test_every_scalar_is_summarised() -> None:
    rows = summarise({"a": np.arange(101.0), "k": np.ones((101, 2, 1), int)})
    assert [r.name for r in rows] == ["a", "k[0,0]", "k[1,0]"]
    assert rows[0][1:] == pytest.approx((50, np.std(np.arange(101), ddof=1), 5, 50, 95))


OUTER = """
import numpyro, numpyro.distributions as dist

def line(x, y):
    slope = numpyro.sample("slope", dist.Normal(0, 3))
    numpyro.sample("y", dist.Normal(slope * x[:, None], 0.5), obs=y)
"""


def test_observations_that_count_more_than_once_are_noted(folder: Path) -> None:
    (folder / "outer.py").write_text(OUTER)
    words = ("--steps", 100, "--family", "mean-field", "--draws", 10, "--out", folder / "outer")
    result = hivi_command("fit", f"{folder}/outer.py:line", "--data", folder / "data.csv", *words)
    assert "are broadcast to (20, 20), as NumPyro does: each counts 20 times" in result.stdout, result.stderr


def test_subsample_and_checkpoint(folder: Path) -> None:
    out = folder / "checkpointed"
    words = [
        "fit", f"{folder}/model.py:line", "--data", folder / "data.npz", "--subsample", "data=5", "--checkpoint",
        "--family", "mean-field", "--steps", 100, "--draws", 10, "--out", out, "--json",
    ]  # fmt: skip
    first, second = last_json(hivi_command(*words)), last_json(hivi_command(*words))
    assert (out / "checkpoint.safetensors").exists()
    assert first["summary"] == second["summary"]
    other = hivi_command(*words, "--seed", 1)
    assert other.exit_code == 1
    assert "another configuration" in other.stderr


def test_explain(folder: Path) -> None:
    data = folder / "one.json"
    data.write_text('{"total": 5}')
    result = hivi_command("explain", f"{folder}/model.py:counts", "--data", data)
    assert result.exit_code == 0, result.output
    assert "factors" in result.stdout
    assert "Difference" in result.stdout
    found = last_json(hivi_command("explain", f"{folder}/model.py:counts", "--data", data, "--json"))
    assert "Difference" in found["gradients"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "x,y\n1,2\n3\n", ["line 3", "1 values", "expected 2"]),
        ("b.csv", "x,y\n1,2\n3,four\n", ["line 3", "column 'y'", "'four'", "a number"]),
        ("c.csv", "x,x\n1,2\n", ["line 1", "twice"]),
        ("d.csv", "x,\n1,2\n", ["line 1", "a header"]),
        ("e.csv", "x,y\n", ["line 2", "no rows"]),
        ("f.csv", "", ["line 1", "a header"]),
        ("g.csv", b"x,y\n1,\xff\n", ["UTF-8"]),
        ("h.csv", "x,y\n1,2\n\n3,4\n", ["line 3", "an empty line", "expected 2 numbers"]),
        ("i.csv", "x\n1\n\n\n3\n", ["line 3", "an empty line", "nan"]),
        (
            "a.json",
            '{"x": [1, 2],\n "y": [1, 2}',
            ["line 2, column 12", "found malformed JSON (expecting ',' delimiter)"],
        ),
        ("b.json", "[1, 2]", ["a JSON list", "an object"]),
        ("c.json", '{"x": [[1, 2], [3]], "y": 1}', ["'x'", "ragged"]),
        ("d.json", '{"x": "one", "y": 1}', ["'x'", "'one'"]),
        ("a.npz", "not an archive", ["a.npz", "NPZ"]),
        ("unknown.csv", "x,z\n1,2\n", ["'z'", "does not take", "['x', 'y', 'noise']"]),
        ("missing.csv", "y\n1\n", ["no data for ['x']"]),
    ],
)
def test_malformed_data_are_refused(folder: Path, name: str, content: str | bytes, expected: list[str]) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = hivi_command("fit", f"{folder}/model.py:line", "--data", folder / name, "--out", folder / "none")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "Cure:" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for piece in expected:
        assert piece in result.stderr
    assert not (folder / "none").exists()


GROUPS = """
import numpyro, numpyro.distributions as dist
from beside_groups import chosen

def model(group, y):
    effect = numpyro.sample("effect", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(effect[group], 1).to_event(1), obs=y)

def indirect(group, y):
    effect = numpyro.sample("effect", dist.Normal(0, 1).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(chosen(effect, group), 1).to_event(1), obs=y)

def silent(group, y):
    numpyro.sample("effect", dist.Normal(0, 1))
    raise ValueError("\\n  a[:m:2] is [red]not\\n what it seems")
"""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("model", ["groups.py, line 7: found TypeError (", "integer"]),
        ("indirect", ["beside_groups.py, line 2, called from groups.py, line 11: found TypeError"]),
        ("silent", ["line 15: found ValueError (a[:m:2] is [red]not what it seems)"]),
    ],
)
def test_an_error_in_the_model_names_its_line(folder: Path, model: str, expected: list[str]) -> None:
    """Not a traceback through hivi's inside."""
    (folder / "groups.py").write_text(GROUPS)
    (folder / "beside_groups.py").write_text("def chosen(effect, group):\n    return effect[group]\n")
    (folder / "groups.csv").write_text("group,y\n0.0,1.5\n2.0,0.5\n")
    words = ("--data", folder / "groups.csv", "--out", folder / "none")
    result = hivi_command("fit", f"{folder}/groups.py:{model}", *words)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    for piece in [*expected, "Cure:"]:
        assert piece in result.stderr


def test_a_fault_of_hivi_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that happens below a frame of the model; and so does every error, if that is asked for."""
    with pytest.raises(RuntimeError, match="ours"), failures():
        raise RuntimeError("ours")
    command = ("explain", f"{folder}/model.py:line", "--data", folder / "data.csv")

    def broken(self: Any, msg: Any) -> None:
        names = {"__name__": "hivi._target.statements"}
        exec("def fault():\n    raise ZeroDivisionError('ours')", names)
        names["fault"]()

    with monkeypatch.context() as patch:
        patch.setattr(statements.Reader, "process_message", broken)
        assert isinstance(hivi_command(*command).exception, ZeroDivisionError)
    (folder / "wrong.py").write_text("def line(x, y):\n    raise KeyError('slope')\n")
    command = ("explain", f"{folder}/wrong.py:line", "--data", folder / "data.csv")
    assert "wrong.py, line 2: found KeyError ('slope')" in hivi_command(*command).stderr
    monkeypatch.setenv("HIVI_TRACEBACK", "1")
    assert isinstance(hivi_command(*command).exception, KeyError)


def test_empty_lines_at_the_end_of_a_csv_file_are_nothing(folder: Path) -> None:
    (folder / "end.csv").write_text("a,b\n1,2\n3,4\n\n\n")
    assert read_data(folder / "end.csv")["b"].tolist() == [2, 4]


def test_integers_stay_integers(folder: Path) -> None:
    (folder / "types.csv").write_text("a,b\n1,1\n-2,nan\n")
    found = read_data(folder / "types.csv")
    assert found["a"].dtype.kind == "i"
    assert found["b"].dtype.kind == "f"
    np.savez(folder / "types.npz", n=3, x=np.zeros((2, 2)))
    assert read_data(folder / "types.npz")["n"] == 3


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["fit", "model.py"], 2, "FILE.py:MODEL"),
        (["fit", "nowhere.py:model"], 2, "no file"),
        (["fit", "MODEL:line", "--data", "nowhere.csv"], 2, "nowhere.csv"),
        (["fit", "MODEL:line", "--data", "DATA", "--subsample", "data"], 2, "PLATE=B"),
        (["fit", "MODEL:line", "--data", "DATA", "--subsample", "rows=5"], 2, "expected one of ['data']"),
        (["fit", "MODEL:line", "--data", "DATA", "--subsample", "data=500"], 2, "from 1 to 20"),
        (["fit", "MODEL:line", "--data", "MODEL"], 2, "none of .npz, .csv and .json"),
        (
            ["fit", "MODEL:line", "--family", "round"],
            2,
            "'--family': 'round' is not one of mean-field, mean-field-dispersed",
        ),
        (["fit", "MODEL:line", "--steps", "0"], 2, "steps"),
        (["fit", "MODEL:lines"], 2, "['line', 'counts']"),
        (["fit", "MODEL:number"], 2, "'number' is a value, not a function"),
        (["fit", "BROKEN:model"], 1, "SyntaxError"),
        (["explain", "MODEL:line"], 1, "no data for ['x']"),
        (["reproduce", "everything"], 2, "everything"),
    ],
)
def test_wrong_usage_and_wrong_models(folder: Path, words: list[str], code: int, expected: str) -> None:
    (folder / "broken.py").write_text("def model(:\n")
    places = {"MODEL": folder / "model.py", "BROKEN": folder / "broken.py", "DATA": folder / "data.csv"}
    for name, place in places.items():
        words = [w.replace(name, str(place)) if w.isupper() or w.startswith(f"{name}:") else w for w in words]
    result = hivi_command(*words)
    assert result.exit_code == code, result.output
    assert "Value error" not in result.stderr
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_interrupt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_command, "run_fit", interrupted)
    result = hivi_command("fit", f"{folder}/model.py:line", "--data", folder / "data.csv", "--out", folder / "none")
    assert result.exit_code == 130


def test_a_strategy_and_a_learning_rate_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "total.json").write_text('{"total": 4.0}')
    result = hivi_command(
        "fit", f"{folder / 'model.py'}:counts", "--data", tmp_path / "total.json", "--family", "mean-field", "--steps", 100,
        "--estimator", "k=score", "--learning-rate", 0.02, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    assert result.exit_code in (0, 3), result.output
    assert last_json(result)["gradients"] == {"k": "Score"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--estimator", "x=auto"], "leave x out"),
        (["--estimator", "scor"], "'scor' is not [SITE=]NAME with NAME one of auto, score,"),
        (["--estimator", "=score"], "'=score' is not [SITE=]NAME"),
        (["--estimator", "k=score", "--estimator", "k=disarm"], "two for 'k'"),
        (["--estimator", "k=score", "--estimator", "disarm"], "either NAME alone, or SITE=NAME"),
        (["--learning-rate", "0"], "0 is not a positive number"),
    ],
)
def test_what_is_no_strategy_or_rate_is_wrong_usage(folder: Path, options: list[str], expected: str) -> None:
    result = hivi_command("fit", f"{folder / 'model.py'}:counts", *options)
    assert result.exit_code == 2
    assert expected in " ".join(re.sub(r"[│\n]", " ", result.stderr).split())
