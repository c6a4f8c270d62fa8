"""What an experiment hands back: tables of numbers, figures on disk, and remarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hivi._fit.result import Estimate

Row = Mapping[str, Any]
"""Column key -> value: a number, a string, an `Estimate`, a list of numbers, or None."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a printed table: the key in its rows, the heading, and how numbers are formatted."""

    key: str
    heading: str
    form: str = ""

    def text(self, row: Row) -> str:
        """The cell of one row, as text."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, Estimate):
            return f"{value.mean:{self.form}} ± {value.stderr:{self.form}}"
        if isinstance(value, list | tuple):
            return " ".join(format(v, self.form) for v in value)
        return format(value, "" if isinstance(value, str) else self.form)


@dataclasses.dataclass(frozen=True)
class Table:
    """One printed table."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an experiment.

    Attributes:
        name: of the experiment.
        tables: what it measured.
        notes: how to read them, and what was reached.
        figures: the files it drew.
        seconds: wall time of all of it.
    """

    name: str
    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    figures: tuple[Path, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values, at full precision."""
        return {
            "experiment": self.name,
            "tables": [{"title": t.title, "rows": [_plain(r) for r in t.rows]} for t in self.tables],
            "notes": list(self.notes),
            "figures": [str(f) for f in self.figures],
            "seconds": round(self.seconds, 2),
        }


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; return the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=110)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts that JSON can hold; a number that is not finite becomes null."""
    if isinstance(value, Estimate):
        return {"mean": _plain(value.mean), "stderr": _plain(value.stderr)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
