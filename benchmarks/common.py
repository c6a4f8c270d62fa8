"""What the benchmarks share: medians over seeds, and the committed tables."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import hivi

SEEDS = 5
RESULTS = Path(__file__).parent / "results"


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Key -> median over runs."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def write(
    name: str, title: str, command: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    """Write `results/NAME.md`, and print it."""
    lines = [
        f"# {title}",
        "",
        f"Command: `{command}`. hivi {hivi.__version__}, JAX {jax.__version__} on CPU, Python {platform.python_version()}.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *notes,
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


def spread(values: Sequence[Any], form: str) -> str:
    """All values, sorted, for a note."""
    return ", ".join(format(v, form) for v in sorted(values))
