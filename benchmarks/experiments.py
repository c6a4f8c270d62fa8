"""`hivi reproduce mixture-poisson` and `hivi reproduce ard` over 5 seeds: medians of every column.

Run `python benchmarks/experiments.py mixture-poisson` or `... ard`; it writes `benchmarks/results/NAME.md`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from typing import Any

from common import SEEDS, write

from hivi._fit.result import Estimate
from hivi.reproduce import ard, mixture_poisson

EXPERIMENTS = {"mixture-poisson": mixture_poisson.run, "ard": ard.run}


def middle(values: list[Any]) -> Any:
    """Median of numbers, of estimates, or of lists element by element; text as it is."""
    first = values[0]
    if isinstance(first, Estimate):
        return Estimate(statistics.median(v.mean for v in values), statistics.median(v.stderr for v in values))
    if isinstance(first, list | tuple):
        return [middle(list(v)) for v in zip(*values, strict=True)]
    if isinstance(first, str) or first is None:
        return first
    return statistics.median(values)


def main() -> None:
    """Run the experiment named on the command line once per seed."""
    name = sys.argv[1]
    reports = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory() as folder:
            reports.append(EXPERIMENTS[name](folder, seed=seed))
        print(reports[-1].to_json(), file=sys.stderr, flush=True)
    table = reports[0].tables[0]
    rows = []
    for number, row in enumerate(table.rows):
        merged = {key: middle([r.tables[0].rows[number][key] for r in reports]) for key in row}
        rows.append([column.text(merged) for column in table.columns])
    write(
        name.replace("-", "_"),
        f"{name}: medians of {SEEDS} seeds",
        f"python benchmarks/experiments.py {name}",
        [c.heading for c in table.columns],
        rows,
        [f"- {note}" for note in reports[0].notes],
    )


if __name__ == "__main__":
    main()
