"""`hivi fit` and `hivi explain`: a NumPyro model from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import typer

from hivi._errors import TargetError
from hivi._estimators.auto import Auto
from hivi._families.base import AbstractFamily
from hivi._fit.loop import default_family
from hivi._fit.loop import fit as run_fit
from hivi._fit.progress import plain_lines
from hivi._fit.result import Fit
from hivi._target.base import Target
from hivi._target.base import explain as explain_target
from hivi._trust import Trust, trust
from hivi.cli import inputs, outputs
from hivi.cli.common import NOT_CONVERGED, Json, Seed, console, failures, make_folder, print_json, show_table
from hivi.cli.strategies import Estimator, read_strategies
from hivi.compare import NAMED
from hivi.interop.numpyro import from_numpyro

SHOWN = 40
"""Latents in the printed summary; all are in summary.csv."""


Model = Annotated[str, typer.Argument(metavar="FILE.py:MODEL", help="A Python file, and the NumPyro model in it.")]
DataFile = Annotated[
    Path | None,
    typer.Option(
        "--data", exists=True, dir_okay=False, metavar="FILE",
        help="The model's arguments by name: .npz (arrays), .csv (columns with a header) or .json (numbers and lists).",
    ),
]  # fmt: skip
Subsample = Annotated[
    list[str] | None,
    typer.Option("--subsample", metavar="PLATE=B", help="Minibatches of B rows of a plate. Repeatable."),
]


def _family(name: str) -> str:
    """The name, if it is one; Typer's own message for a choice begins with "Value error"."""
    if name not in NAMED:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(NAMED)}", param_hint="'--family'")
    return name


FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family", parser=_family, metavar=f"[{'|'.join(NAMED)}]", autocompletion=lambda: list(NAMED),
        help="The variational family; by default hivi chooses.",
    ),
]  # fmt: skip
Steps = Annotated[int, typer.Option("--steps", min=1, help="The most gradient steps; a fit may end earlier.")]
Rate = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Of Adam, before its decay; by default the family's usual one."),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Monte Carlo samples per step.")]
Out = Annotated[Path, typer.Option("--out", file_okay=False, metavar="RUN", help="Folder to write to.")]
Draws = Annotated[int, typer.Option("--draws", min=2, help="Draws from the fitted posterior.")]
Checkpoint = Annotated[
    bool, typer.Option("--checkpoint", help="Save the state in RUN meanwhile, and resume the interrupted run it holds.")
]


def fit(
    model: Model,
    data: DataFile = None,
    family: FamilyName = None,
    steps: Steps = 10_000,
    samples: Samples = 16,
    estimator: Estimator = None,
    learning_rate: Rate = None,
    out: Out = Path("runs/fit"),
    draws: Draws = 1000,
    subsample: Subsample = None,
    checkpoint: Checkpoint = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit a variational family to a NumPyro model, and print a summary of the posterior.

    Writes to RUN: the fit (`hivi.load("RUN")` reads it), `history.csv` (the bound by step), `summary.csv` (mean,
    standard deviation, 5, 50 and 95 % of every scalar latent), `draws.npz`, and `posterior.nc` (for
    `arviz.from_netcdf`). Files of an earlier run there are overwritten. Progress goes to standard error: a bar on a
    terminal, elsewhere a line every ten seconds.

    Example: `hivi fit model.py:model --data data.csv --family hierarchical --subsample data=256 --out runs/first`
    """
    strategies = read_strategies(estimator)
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise typer.BadParameter(f"{learning_rate:g} is not a positive number", param_hint="'--learning-rate'")
    with failures():
        target = read_target(model, data, subsample)
        make_folder(out)
        chosen = default_family(target) if family is None else NAMED[family]
        for line in (*target.notes, _choice(chosen, family)):
            console(to_stderr=json).print(line, markup=False, soft_wrap=True)
        k1, k2, k3 = jax.random.split(jax.random.key(seed), 3)
        with plain_lines():
            done = run_fit(
                target, None if family is None else chosen, key=k1, steps=steps, samples=samples, estimator=strategies,
                learning_rate=learning_rate, checkpoint=out if checkpoint else None,
            )  # fmt: skip
        rows = outputs.write_run(out, done, k3, draws)
        _show_posterior(rows, out, json)
        _show(done, trust(done, key=k2), rows, out, json)
    if not done.converged:
        raise typer.Exit(NOT_CONVERGED)


def explain(
    model: Model,
    data: DataFile = None,
    family: FamilyName = None,
    subsample: Subsample = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Say how hivi reads a model: its sites, its factors, and the gradient estimator of each site, with reasons.

    Nothing is fitted. `--seed` has no effect here.

    Example: `hivi explain model.py:model --data data.json`
    """
    del seed
    with failures():
        target = read_target(model, data, subsample)
        chosen = default_family(target) if family is None else NAMED[family]
        sites, strategies = explain_target(target), Auto().explain(target, chosen)
        say = console(to_stderr=json)
        for text in (sites, "", _choice(chosen, family), "", "gradients", strategies):
            say.print(text, markup=False, soft_wrap=True)
        if json:
            print_json({"target": sites, "family": str(chosen), "gradients": strategies})


def read_target(model: str, data: Path | None, subsample: list[str] | None) -> Target:
    """The target that a command names: a model in a file, its data, and minibatches of plates."""
    plates = _plates(subsample or [])
    function = inputs.load_model(model)
    bound = inputs.bind(function, {} if data is None else inputs.read_data(data))
    try:
        return from_numpyro(function, *bound.args, subsample=plates, **bound.kwargs)
    except TargetError as error:
        if str(error).startswith("subsample:"):  # what was typed: an unknown plate, or a batch larger than it
            raise typer.BadParameter(str(error).removeprefix("subsample: "), param_hint="'--subsample'") from None
        raise


def _plates(options: list[str]) -> dict[str, int]:
    plates = {}
    for option in options:
        name, equals, size = option.rpartition("=")
        if not equals or not size.isdecimal() or int(size) < 1:
            raise typer.BadParameter(f"{option!r} is not PLATE=B, such as data=256", param_hint="'--subsample'")
        plates[name] = int(size)
    return plates


def _choice(chosen: AbstractFamily | dict[str, AbstractFamily], family: str | None) -> str:
    return f"family: {chosen}" + (" (chosen by hivi for these sites)" if family is None else "")


def _show_posterior(rows: list[outputs.Summary], out: Path, as_json: bool) -> None:
    say = console(to_stderr=as_json)
    cells = [[r.name, *(f"{x:.4g}" for x in r[1:])] for r in rows[:SHOWN]]
    show_table(say, "posterior", ["latent", *outputs.FIELDS], cells)
    if len(rows) > SHOWN:
        say.print(f"... and {len(rows) - SHOWN} more in {out / 'summary.csv'}", markup=False)


def _show(done: Fit, found: Trust, rows: list[outputs.Summary], out: Path, as_json: bool) -> None:
    say, steps = console(to_stderr=as_json), len(done.history["step"])
    say.print(f"bound {found.bound} nats after {steps} steps in {done.seconds:.1f} s: {done.message}", markup=False)
    figures = [] if found.tighter is None else [f"bound with 64 draws {found.tighter} nats"]
    figures += [] if found.khat is None else [str(found.khat)]
    for line in (*(["; ".join(figures)] if figures else []), *(f"trust: {word}" for word in found.words())):
        say.print(line, markup=False, soft_wrap=True)
    say.print(f"written to {out}", markup=False)
    if as_json:
        print_json({
            "run": str(out),
            "family": str(done.family),
            "trust": found.as_dict(),
            "bound": found.as_dict()["bound"],
            "converged": done.converged,
            "message": done.message,
            "steps": steps,
            "seconds": round(done.seconds, 2),
            "gradients": done.strategies,
            "summary": [dict(zip(("latent", *outputs.FIELDS), r, strict=True)) for r in rows],
        })  # fmt: skip
