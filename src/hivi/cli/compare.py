"""`hivi compare`: several families on a NumPyro model from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import jax
import typer

from hivi._comparison import Comparison
from hivi._errors import FitError, message
from hivi._families.base import AbstractFamily
from hivi._fit.progress import plain_lines
from hivi.cli.common import NOT_CONVERGED, Json, Seed, console, failures, print_json
from hivi.cli.fit import DataFile, Model, Samples, Steps, Subsample, read_target
from hivi.compare import NAMED
from hivi.compare import compare as run_compare

Names = Annotated[
    str | None,
    typer.Option(
        "--families", metavar="A,B,...",
        help=f"Which of {', '.join(NAMED)}; by default those that suit the model's latents.",
    ),
]  # fmt: skip
Nuts = Annotated[bool, typer.Option("--nuts", help="Also run NUTS (continuous latents only), and compare with it.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", dir_okay=False, metavar="FILE.png", help="Draw the bounds, and k-hat against time."),
]


def compare(
    model: Model,
    data: DataFile = None,
    families: Names = None,
    steps: Steps = 10_000,
    samples: Samples = 16,
    nuts: Nuts = False,
    plot: Plot = None,
    subsample: Subsample = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit several variational families to a NumPyro model, and say of each how good it is and what it fails at.

    The table has a row per family: its bound (ELBO) and a tighter one of the same fit, the gap to the best of these in
    nats, k-hat (draws are to be trusted up to 0.7), whether it converged, and what it cost. A family that fails keeps
    its row, with the reason; exit code 1 says that all did, and 3 that some fit had not converged.

    Example: `hivi compare model.py:model --data data.csv --families mean-field,hierarchical --plot bounds.png`
    """
    chosen = None if families is None else _families(families)
    with failures():
        target = read_target(model, data, subsample)
        with plain_lines():
            found = run_compare(target, chosen, key=jax.random.key(seed), steps=steps, samples=samples, nuts=nuts)
        _show(found, plot, json)
        if not found.fits:
            cure = "correct the model, or choose other --families"
            raise FitError(message("compare", "no family that could be fitted", "at least one", cure))
    if not all(f.converged for f in found.fits.values()):
        raise typer.Exit(NOT_CONVERGED)


def _families(names: str) -> dict[str, AbstractFamily]:
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    unknown = [n for n in wanted if n not in NAMED]
    if unknown or not wanted:
        found = f"{unknown[0]!r} is not one of" if unknown else f"{names!r} names no family of"
        raise typer.BadParameter(f"{found} {', '.join(NAMED)}", param_hint="'--families'")
    return {n: NAMED[n] for n in wanted}


def _show(found: Comparison, plot: Path | None, as_json: bool) -> None:
    say = console(to_stderr=as_json)
    say.print(str(found), markup=False, soft_wrap=True)
    if plot is not None and found.fits:
        plot.parent.mkdir(parents=True, exist_ok=True)
        try:
            found.figure().savefig(plot, dpi=150)
        except ValueError as error:  # matplotlib's, for an ending that it does not know
            raise typer.BadParameter(str(error), param_hint="'--plot'") from None
        say.print(f"plot: {plot}", markup=False)
    if as_json:
        print_json(found.as_dict() | {"plot": None if plot is None else str(plot)})
