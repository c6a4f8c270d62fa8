"""Errors of hivi: each names the site, what was found, what was expected, and the cure."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable

import jax
import numpy as np


class HiviError(Exception):
    """Base class of every error that hivi raises on purpose."""


class TargetError(HiviError, ValueError):
    """The model or log-joint cannot be used as it is."""


class FamilyError(HiviError, ValueError):
    """The variational family does not fit the target, or was asked for something it lacks."""


class FitError(HiviError, RuntimeError):
    """The optimisation failed, and automatic recovery did not help."""


class LoadError(HiviError, ValueError):
    """A saved run cannot be read."""


class CorpusError(HiviError, ValueError):
    """A corpus cannot be read, or its counts are not counts."""


def message(where: str, found: str, expected: str, cure: str) -> str:
    """Format the four parts of an error: where, found, expected, cure."""
    return f"{where}: found {found}; expected {expected}. Cure: {cure}"


def require_count(
    where: str, value: object, cure: str, least: int = 1, error: Callable[[str], HiviError] = FamilyError
) -> None:
    """Refuse what is no integer, or a smaller one.

    Raises:
        FamilyError: naming the argument; or `error`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise error(message(where, repr(value), f"an integer, at least {least}", cure))


def require_positive(
    where: str, value: object, cure: str = "correct the number", error: Callable[[str], HiviError] = FamilyError
) -> None:
    """Refuse what is no number, zero, negative, infinite or NaN.

    Raises:
        FamilyError: naming the argument; or `error`.
    """
    scalar = isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 and value.dtype.kind in "fiu"
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (scalar or number) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]  # of either
        raise error(message(where, repr(value), "a positive number", cure))


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The cure for a name that is not known: the one that is spelt most like it, where there is one."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else otherwise
