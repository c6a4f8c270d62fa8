"""The progress of passes over a corpus, on standard error: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import datetime
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

EVERY = 10.0
"""Seconds between two lines."""


class Passes:
    """A context manager whose `watch` is called after every few steps.

    Args:
        label: what is fitted.
        passes: over the corpus.
        tokens: of the corpus.
        every: seconds between two lines, without a terminal.
    """

    def __init__(self, label: str, passes: int, tokens: int, every: float = EVERY):
        console = Console(stderr=True)
        self._label, self._passes, self._tokens, self._every = label, passes, tokens, every
        self._lines = not console.is_terminal
        self._printed = time.monotonic()
        self._timed: list[tuple[float, float]] = []  # (seconds, passes)
        self._last: tuple[float, float] | None = None
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"),
            console=console, disable=self._lines,
        )  # fmt: skip
        self._task = self._progress.add_task(label, total=passes, text="compiling")

    def __enter__(self) -> Passes:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def watch(self, at: float, bound: float) -> None:
        """Passes done, and the bound in nats."""
        now = time.monotonic()
        if self._last is not None and at > self._last[1]:
            self._timed.append((now - self._last[0], at - self._last[1]))
        self._last = now, at
        text = self.text(at, bound)
        self._progress.update(self._task, completed=at, text=text)
        if self._lines and now - self._printed >= self._every:
            self._printed = now
            print(f"{self._label}: {text}", file=sys.stderr, flush=True)

    def text(self, at: float, bound: float) -> str:
        """Where it is, as text."""
        recent = sorted(self._timed[-50:])[:-1] or self._timed  # without a compilation
        seconds, passes = sum(s for s, _ in recent), sum(p for _, p in recent)
        out = f"pass {at:.0f} of {self._passes} ({at / self._passes:.0%}), bound {bound:.6g}"
        if seconds <= 0 or passes <= 0:
            return out
        left = datetime.timedelta(seconds=round((self._passes - at) * seconds / passes))
        return f"{out}, {passes * self._tokens / seconds:,.0f} tokens/s, {left} left"
