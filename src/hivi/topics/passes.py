"""The progress of passes over a corpus: tokens per second, time left, and whether there is any at the end."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float64

from hivi._fit.progress import Bar

Watch = Callable[[float, float], None]
"""Called after every few steps with (passes done, bound in nats)."""
LEAST_PASSES = 16
"""After the warm-up: fewer say nothing about how they end."""
TOLERANCE, NEGLIGIBLE = 3.0, 1e-5
"""A rise counts where it is more than so many standard errors, and more than this share of the bound."""


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


def levelled_off(bounds: Float64[np.ndarray, " passes"]) -> bool:
    """Whether the bound had stopped to rise by more than its noise: a line through the last quarter of the passes.

    Noise is what the bounds scatter around that line. Slow progress thus counts as progress where it is steady.

    Args:
        bounds: in nats, one per pass, without those of the warm-up.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.passes import levelled_off
        >>> noise = np.random.default_rng(0).normal(size=60)
        >>> levelled_off(noise - 500.0), levelled_off(noise - np.linspace(500.0, 480.0, 60)), levelled_off(noise[:10])
        (True, False, False)
    """
    last = bounds[-max(LEAST_PASSES // 2, len(bounds) // 4) :]
    if len(bounds) < LEAST_PASSES or not np.all(np.isfinite(last)):
        return False
    x = np.arange(len(last)) - (len(last) - 1) / 2
    slope = x @ last / (x @ x)
    scatter = last - np.mean(last) - slope * x
    stderr = np.sqrt(scatter @ scatter / (len(last) - 2) / (x @ x))
    rise = slope * len(last)
    return bool(rise < max(TOLERANCE * stderr * len(last), NEGLIGIBLE * abs(float(np.mean(last)))))
