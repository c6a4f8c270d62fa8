"""When to stop: the bound no longer rises by more than its own noise (whether it has collapsed, history.py knows)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EARLIEST = 2000
"""Steps before which a fit does not stop by itself: over shorter windows, noise hides a slow rise."""
MIN_STEPS = 1000
WORTH = 1e-3
"""Rise of the bound, in nats, for which no fit that has ended is called unfinished: those without noise rise for ever."""
MAX_LOST = 0.05
"""Share of steps without a finite bound or gradient beyond which a fit is in trouble."""


class Trend(NamedTuple):
    """Change of the smoothed bound between two neighbouring windows, and its standard error, in nats."""

    change: float
    stderr: float


def trend(elbo: np.ndarray) -> Trend:
    """Compare the third quarter of the steps so far with the fourth.

    The windows grow with the run, so that slow progress is not mistaken for none. Standard errors come from the means
    of 16 batches per window, which allows for steps that are correlated.
    """
    values = elbo[np.isfinite(elbo)]
    quarter = len(values) // 4
    if quarter < 32:
        return Trend(np.inf, 0.0)
    before, after = values[-2 * quarter : -quarter], values[-quarter:]
    return Trend(float(np.mean(after) - np.mean(before)), float(np.hypot(_batch_error(before), _batch_error(after))))


def _batch_error(values: np.ndarray) -> float:
    batches = np.array([np.mean(b) for b in np.array_split(values, 16)])
    return float(np.std(batches, ddof=1) / 4)


def levelled(elbo: np.ndarray, tolerance: float, worth: float = 0.0) -> bool:
    """Whether the bound rises by less than `tolerance` standard errors, or by less than what it is worth, in nats."""
    values = elbo[np.isfinite(elbo)]
    if len(values) < max(MIN_STEPS, (1 - MAX_LOST) * len(elbo)):
        return False
    found = trend(values)
    return bool(found.change < max(tolerance * found.stderr + 1e-7 * abs(float(np.mean(values[-32:]))), worth))
