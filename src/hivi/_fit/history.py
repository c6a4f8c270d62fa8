"""What every step of a fit has found, and whether a chunk of steps has fallen far below the best one."""

from __future__ import annotations

import numpy as np

FEWEST = 2
"""Chunks that must lie behind before a fall is called one."""


class History:
    """The bound and its standard error, step by step, in room that doubles, and the best chunk among them.

    To add a chunk, or to judge one, takes as long late in a fit as early.

    Attributes:
        chunk: steps of a chunk.
        best: the highest median of a chunk, in nats.
    """

    def __init__(self, chunk: int):
        self.chunk = chunk
        self._room = np.zeros((2, 0))
        self._steps = self._chunks = 0
        self.best, self._noise = -np.inf, 0.0

    def __len__(self) -> int:
        return self._steps

    @property
    def elbo(self) -> np.ndarray:
        return self._room[0, : self._steps]

    @property
    def stderr(self) -> np.ndarray:
        return self._room[1, : self._steps]

    def add(self, elbo: np.ndarray, stderr: np.ndarray) -> None:
        """Take up what a chunk of steps has found, or several whole ones; the last of a fit may be short."""
        end = self._steps + len(elbo)
        if end > self._room.shape[1]:
            self._room = np.pad(self._room, ((0, 0), (0, end)))
        self._room[:, self._steps : end] = elbo, stderr
        self._steps = end
        for start in range(0, len(elbo) - self.chunk + 1, self.chunk):
            self._chunks += 1
            middle, noise = _middle(elbo[start : start + self.chunk])
            if middle > self.best:
                self.best, self._noise = middle, noise

    def collapsed(self, elbo: np.ndarray) -> bool:
        """Whether this chunk, not yet added, falls far below the best one so far, beyond any noise."""
        if self._chunks < FEWEST or len(elbo) < self.chunk:
            return False
        fall = self.best - _middle(elbo)[0]
        return bool(fall > 100 * max(self._noise, 1e-3) and fall > 10 + abs(self.best))


def _middle(elbo: np.ndarray) -> tuple[float, float]:
    """Median, and median deviation from it, of the finite entries; NaN where there is none."""
    finite = elbo[np.isfinite(elbo)]
    middle = float(np.median(finite)) if len(finite) else np.nan
    return middle, float(np.median(np.abs(finite - middle))) if len(finite) else np.nan
