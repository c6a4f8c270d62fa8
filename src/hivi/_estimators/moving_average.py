"""The moving-average baseline: the mean signal of earlier steps."""

from __future__ import annotations

import numbers
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from hivi._errors import FitError, message
from hivi._estimators.base import AbstractBaseline, nothing
from hivi._families.base import Conditional
from hivi._tree import Key, PyTree


class MovingAverage(AbstractBaseline):
    """An exponential moving average of each coordinate's signal over earlier steps: a baseline also for a single draw.

    Args:
        decay: share of the old average that a step keeps, in [0, 1).

    Example:
        >>> import hivi
        >>> hivi.Score(baseline=hivi.MovingAverage(decay=0.95)).remembers
        True
    """

    decay: float = 0.9
    remembers: ClassVar[bool] = True

    def __check_init__(self) -> None:
        if not isinstance(self.decay, numbers.Real) or not 0 <= self.decay < 1:
            expected = "a number from 0 and below 1"
            raise FitError(message("MovingAverage(decay=...)", repr(self.decay), expected, "0.9 is usual"))

    def start(self, conditional: Conditional, key: Key) -> PyTree:
        return nothing(conditional.lam.shape[:-1])

    def predict(self, memory: PyTree, conditional: Conditional) -> PyTree:
        return memory.mean()

    def value(self, signal: Array, predicted: PyTree) -> Array:
        return jnp.broadcast_to(predicted, signal.shape)

    def learn(self, memory: PyTree, signal: Array, predicted: PyTree) -> PyTree:
        return memory.after(jnp.mean(signal, (0, 1, 2)), self.decay)
