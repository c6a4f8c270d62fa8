"""The progress of a fit on standard error: a bar on a terminal; where there is none, lines if they are asked for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_EVERY: ContextVar[float | None] = ContextVar("seconds between two lines", default=None)


@contextlib.contextmanager
def plain_lines(every: float = 10.0) -> Iterator[None]:
    """Within this, fits that show their progress print a line every so many seconds where there is no terminal.

    Commands ask for it, since a log file should tell a long run from a stuck one; a library stays silent there.
    """
    token = _EVERY.set(every)
    try:
        yield
    finally:
        _EVERY.reset(token)


def announce(text: str, shown: bool) -> None:
    """Say what begins or ended, on standard error: on a terminal, and wherever `plain_lines` are asked for."""
    if shown and (_EVERY.get() is not None or sys.stderr.isatty()):
        print(text, file=sys.stderr, flush=True)


class Bar:
    """A context manager that shows how a fit goes; silent when `shown` is false, or without terminal and `plain_lines`."""

    def __init__(self, steps: int, label: str, shown: bool):
        console = Console(stderr=True)
        self._steps, self._label = steps, label
        self._every = _EVERY.get() if shown and not console.is_terminal else None
        self._printed = time.monotonic()
        if self._every is not None:
            announce(f"{label}: compiling", shown)
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
        self.show("step", done, text, f"{per_second:.0f} steps/s", of="of at most")

    def show(self, unit: str, done: float | int, bound: str, rate: str, of: str = "of") -> None:
        """Show how many units are done, the bound and the speed, as text."""
        self._progress.update(self._task, completed=done, bound=bound, rate=rate)
        if self._every is not None and time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            share = f"{unit} {done:.0f} {of} {self._steps} ({done / self._steps:.0%})"
            print(f"{self._label}: " + ", ".join(filter(None, (share, bound, rate))), file=sys.stderr, flush=True)
