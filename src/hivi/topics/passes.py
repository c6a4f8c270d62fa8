"""The progress of passes over a corpus: tokens per second, and time left."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

from hivi._fit.progress import Bar

Watch = Callable[[float, float], None]
"""Called after every few steps with (passes done, bound in nats)."""


@contextlib.contextmanager
def watching(label: str, passes: int, tokens: int, shown: bool = True) -> Iterator[Watch]:
    """What shows the progress of a fit, as `hivi._fit.progress.Bar` does.

    Args:
        label: what is fitted.
        passes: over the corpus.
        tokens: of the corpus.
        shown: whether to show anything.
    """
    timed: list[tuple[float, float]] = []  # (seconds, passes) between two calls
    last: list[tuple[float, float]] = []

    def watch(at: float, bound: float) -> None:
        now = time.monotonic()
        if last and at > last[0][1]:
            timed.append((now - last[0][0], at - last[0][1]))
        last[:] = [(now, at)]
        bar.show("pass", at, f"bound {bound:.6g}", _speed(timed, passes - at, tokens))

    with Bar(passes, label, shown) as bar:
        yield watch


def _speed(timed: list[tuple[float, float]], left: float, tokens: int) -> str:
    recent = sorted(timed[-50:])[:-1] or timed  # without a compilation
    seconds, done = sum(s for s, _ in recent), sum(p for _, p in recent)
    if seconds <= 0 or done <= 0:
        return ""
    rest = datetime.timedelta(seconds=round(left * seconds / done))
    return f"{done * tokens / seconds:,.0f} tokens/s, {rest} left"
