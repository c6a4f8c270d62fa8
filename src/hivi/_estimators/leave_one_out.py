"""The leave-one-out baseline: the mean signal of the other draws (Salimans & Knowles 2014; Kool et al. 2019)."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Array

from hivi._estimators.base import AbstractBaseline, others
from hivi._families.base import Conditional
from hivi._tree import Key, PyTree


class LeaveOneOut(AbstractBaseline):
    """The mean of the signal over the other draws of the same step; with one draw there is none, and the baseline is 0.

    Example:
        >>> import hivi
        >>> hivi.Score(baseline=hivi.LeaveOneOut()).remembers
        False
    """

    remembers: ClassVar[bool] = False

    def start(self, conditional: Conditional, key: Key) -> PyTree:
        return ()

    def predict(self, memory: PyTree, conditional: Conditional) -> PyTree:
        return ()

    def value(self, signal: Array, predicted: PyTree) -> Array:
        return others(signal)

    def learn(self, memory: PyTree, signal: Array, predicted: PyTree) -> PyTree:
        return ()
