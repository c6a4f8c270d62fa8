"""The progress bar of a fit: bound with its standard error, and the rate, on standard error."""

from __future__ import annotations

from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A context manager that shows how a fit goes; silent when `shown` is false or there is no terminal."""

    def __init__(self, steps: int, label: str, shown: bool):
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[bound]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task(label, total=steps, bound="compiling", rate="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, recent: np.ndarray, per_second: float) -> None:
        """Show the mean bound of the recent steps, its standard error, and steps per second."""
        values = recent[np.isfinite(recent)]
        text = "bound -"
        if len(values) > 1:
            text = f"bound {np.mean(values):.4f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.4f}"
        self._progress.update(self._task, completed=done, bound=text, rate=f"{per_second:.0f} steps/s")
