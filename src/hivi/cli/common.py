"""What the commands share: options, exit codes, tables and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from hivi._errors import HiviError, message

FAILED = 1
NOT_CONVERGED = 3
MODULE = "hivi_model_"
"""What the name of a user's model, imported from its file, begins with."""
CODES = """Exit codes: 0 done; 1 hivi refused or failed, and says why on standard error; 2 wrong usage (an option, or a
file, function or plate that is not there); 3 a fit that
ended before its bound had levelled off; 130 interrupted (Ctrl-C)."""

Seed = Annotated[int, typer.Option("--seed", help="Seed of all randomness: the same seed gives the same numbers.")]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object last on standard output; tables then go to standard error."),
]


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Print a `HiviError`, or whatever the user's model raises, as one paragraph on standard error; exit with code 1.

    An error of the model is told with its line; `hivi`'s own faults, and those outside the model, keep their traceback, and
    HIVI_TRACEBACK=1 keeps that of all.
    """
    try:
        yield
    except HiviError as error:
        said = str(error)
    except Exception as error:
        place = None if os.environ.get("HIVI_TRACEBACK") else _place_in_model(error)
        if place is None:
            raise
        text = textwrap.shorten(str(error), 400, placeholder=" ...") or "no message"
        cure = "correct that line, or the data it takes; HIVI_TRACEBACK=1 shows where it came from"
        said = message(place, f"{type(error).__name__} ({text})", "a model that runs on these data", cure)
    else:
        return
    console(to_stderr=True).print(f"hivi: {said}", style="red", markup=False, emoji=False, soft_wrap=True)
    raise typer.Exit(FAILED)


def _place_in_model(error: Exception) -> str | None:
    """Line of the user's model, or of a file beside it that it calls, where an error came from; None for a fault of `hivi`."""
    frames = list(traceback.walk_tb(error.__traceback__))
    names = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    model = max((k for k, name in enumerate(names) if name.startswith(MODULE)), default=None)
    if model is None or names[-1].split(".")[0] == "hivi":
        return None
    files = [Path(frame.f_code.co_filename) for frame, _ in frames]
    beside = max(k for k in range(model, len(files)) if files[k].parent == files[model].parent)
    place = f"{files[beside].name}, line {frames[beside][1]}"
    return place if beside == model else f"{place}, called from {files[model].name}, line {frames[model][1]}"


def make_folder(folder: Path) -> None:
    """Make the folder that results will go to, before the work begins.

    Raises:
        HiviError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror}"
        raise HiviError(message(f"--out {folder}", found, "a folder that can be made", "name another")) from None


def console(to_stderr: bool = False) -> Console:
    """Where tables and remarks go. Standard output that is no terminal gets lines as long as they need."""
    found = Console(stderr=to_stderr, highlight=False)
    return found if found.is_terminal else Console(stderr=to_stderr, highlight=False, width=200)


def show_table(out: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: the first column to the left, all others to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def print_json(value: dict[str, Any]) -> None:
    """One line on standard output."""
    typer.echo(json.dumps(value, allow_nan=False))
