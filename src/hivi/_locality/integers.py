"""Integers known from their indices, so that indexing by them stays exact.

An integer array whose value is `stride*index + offset` along one axis (an `arange`, a loop counter,
a constant) is described by the same kind of entry as a latent axis, and any other by a table. Such arrays are
the indices of `z[3]`, `z[idx + 1]`, `z[group]`, or `z[t]` in a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from hivi._locality.base import (
    ALL,
    CAP,
    LIMIT,
    All,
    Along,
    Arr,
    AxisMap,
    Const,
    Entry,
    Known,
    Params,
    Shape,
    Table,
    constant,
    table,
    used,
    values,
)

_FIT_LIMIT = 1 << 22  # constants with more elements are not looked at

_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "rem": lambda a, b: np.fmod(a, np.where(b == 0, 1, b)),
    "div": lambda a, b: np.sign(a) * np.sign(b) * (abs(a) // np.maximum(abs(b), 1)),
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "select_n": lambda which, *cases: np.choose(which, cases),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}

Maybe = Known | None


def concrete(value: Any, kinds: str = "iub", most: int = _FIT_LIMIT) -> np.ndarray | None:
    """The numbers of a constant of these kinds, or None where there are none to read, or too many."""
    plain = np.dtype(type(value)) if isinstance(value, int | float) else None
    dtype = getattr(value, "dtype", plain)
    if isinstance(value, Tracer) or not isinstance(dtype, np.dtype) or dtype.kind not in kinds:
        return None  # random keys have a dtype of their own, bfloat16 and the like a kind
    if not 0 < np.size(value) <= most or dtype == np.uint64:
        return None
    return np.asarray(value)


def fit_columns(value: Any) -> tuple[Maybe, ...] | None:
    """Describe a concrete array at each index of its last axis."""
    array = concrete(value)
    return None if array is None else tuple(fit(array[..., j]) for j in range(array.shape[-1]))


def fit(value: Any) -> Maybe:
    """Describe a concrete array of integers; None where there are none, or too many."""
    array = concrete(value)
    if array is None:
        return None
    if array.size == 1:
        return constant(int(array.flat[0]))
    entry = table(range(array.ndim), array)
    return None if isinstance(entry, All) else Known(entry, int(array.min()), int(array.max()))


def along(axis: int, offset: int, stride: int, size: int) -> Known:
    """The array `offset + stride*index` for the `size` indices of an axis (or steps of a loop)."""
    last = offset + stride * (size - 1)
    return Known(Along(axis, offset, stride) if stride else Const(offset), min(offset, last), max(offset, last))


def _plus(x: Entry, y: Entry) -> Entry:
    """Sum of two known arrays."""
    if isinstance(x, Const) and isinstance(y, Const):
        return Const(x.index + y.index)
    if isinstance(x, Along) and isinstance(y, Const):
        return Along(x.axis, x.offset + y.index, x.stride)
    if isinstance(x, Const) and isinstance(y, Along):
        return _plus(y, x)
    if isinstance(x, Along) and isinstance(y, Along) and x.axis == y.axis:
        stride, offset = x.stride + y.stride, x.offset + y.offset
        return Along(x.axis, offset, stride) if stride else Const(offset)
    return ALL


def _add(a: Known, b: Known) -> Maybe:
    entry = _plus(a.entry, b.entry)
    if isinstance(entry, Along):
        return Known(entry, a.low + b.low, a.high + b.high)
    return constant(entry.index) if isinstance(entry, Const) else None


def _mul(a: Known, b: Known) -> Maybe:
    if isinstance(a.entry, Const):
        a, b = b, a
    if not isinstance(b.entry, Const):
        return None
    factor, entry = b.entry.index, a.entry
    if isinstance(entry, Const) or not factor:
        return constant(factor * a.low)
    if isinstance(entry, Table):
        return None
    low, high = sorted((factor * a.low, factor * a.high))
    return Known(Along(entry.axis, factor * entry.offset, factor * entry.stride), low, high)


def _max(a: Known, b: Known) -> Maybe:
    return a if a.low >= b.high else b if b.low >= a.high else None


def _min(a: Known, b: Known) -> Maybe:
    return a if a.high <= b.low else b if b.high <= a.low else None


def _rem(a: Known, b: Known) -> Maybe:
    if isinstance(a.entry, Const) and isinstance(b.entry, Const) and b.low:
        size = abs(a.low) % abs(b.low)
        return constant(size if a.low >= 0 else -size)  # the sign of the dividend, as in C
    return a if a.low >= 0 and a.high < b.low else None


def _truth(yes: bool, no: bool) -> Maybe:
    return constant(1) if yes else constant(0) if no else None


def _eq(a: Known, b: Known) -> Maybe:
    return _truth(a.entry == b.entry, a.high < b.low or b.high < a.low)


_BINARY: dict[str, Callable[[Known, Known], Maybe]] = {
    "add": _add,
    "sub": lambda a, b: (minus := _mul(b, constant(-1))) and _add(a, minus),
    "mul": _mul,
    "max": _max,
    "min": _min,
    "rem": _rem,
    "eq": _eq,
    "ne": lambda a, b: (same := _eq(a, b)) and constant(1 - same.low),
    "lt": lambda a, b: _truth(a.high < b.low, a.low >= b.high),
    "le": lambda a, b: _truth(a.high <= b.low, a.low > b.high),
    "gt": lambda a, b: _truth(a.low > b.high, a.high <= b.low),
    "ge": lambda a, b: _truth(a.low >= b.high, a.high < b.low),
}


def _logical(name: str, args: Sequence[Maybe]) -> Maybe:
    """Boolean and, or, not. One operand may decide the result alone."""
    values = [a.low if a and isinstance(a.entry, Const) else None for a in args]
    if name == "not":
        return None if values[0] is None else constant(1 - values[0])
    decisive = 0 if name == "and" else 1
    if decisive in values:
        return constant(decisive)
    return None if None in values else constant(1 - decisive)


def _evaluate(name: str, args: Sequence[Maybe], extent: Shape) -> Maybe:
    """Value of an elementwise primitive on tables."""
    known = [a for a in args if a is not None]
    axes = sorted({axis for a in known for axis in used(a.entry)})
    if len(known) < len(args) or name not in _NUMPY or math.prod(extent[axis] for axis in axes) > LIMIT:
        return None
    if name == "select_n" and not known[0].within(0, len(args) - 2):
        return None
    found = np.asarray(_NUMPY[name](*(values(a.entry, axes, extent) for a in known)), np.int64)
    entry = table(axes, found)
    return None if isinstance(entry, All) else Known(entry, int(found.min()), int(found.max()))


def _choose(name: str, args: Sequence[Maybe]) -> Maybe:
    """select_n and clamp."""
    first, *rest = args
    if name == "select_n":
        if first and isinstance(first.entry, Const):
            return rest[first.entry.index] if 0 <= first.entry.index < len(rest) else None
        return rest[0] if all(r == rest[0] for r in rest) else None
    value, top = rest
    if first is None or value is None or top is None:
        return None
    raised = _max(value, first)
    return raised and _min(raised, top)


FOLDED = frozenset(_BINARY) | frozenset(_NUMPY) | {"convert_element_type"}
"""Elementwise primitives through which known integers are followed."""


def fold(name: str, args: Sequence[Maybe], dtype: np.dtype, extent: Shape) -> Maybe:
    """Value of an elementwise primitive of `FOLDED`; its operands are already seen along the output."""
    result: Maybe = None
    if name in ("and", "or", "not"):
        result = _logical(name, args) if dtype == np.bool_ else None
    elif name in ("select_n", "clamp"):
        result = _choose(name, args)
    elif (a := args[0]) is None:
        return None
    elif name == "neg":
        result = _mul(a, constant(-1))
    elif name == "convert_element_type":
        result = a
    elif name in _BINARY and (b := args[1]) is not None:
        result = _BINARY[name](a, b)
    bitwise = name in ("and", "or", "not") and dtype != np.bool_
    result = result or (None if bitwise else _evaluate(name, args, extent))
    if result is None:
        return None
    info = (0, 1) if dtype == np.bool_ else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    return result if result.within(*info) else None  # beyond these bounds the machine integer wraps round


def side_by_side(name: str, params: Params, args: Sequence[Arr], shape: Shape) -> tuple[Maybe, ...] | None:
    """Known integers at each index of the last axis, of index arrays put side by side."""
    if name == "convert_element_type":
        return args[0].columns
    if name not in ("concatenate", "stack") or not shape or shape[-1] > CAP:
        return None
    if params["dimension" if name == "concatenate" else "axis"] != len(shape) - 1:
        return None
    if name == "stack":
        return tuple(a.known for a in args)
    found: list[Maybe] = []
    for a in args:
        rest: list[Entry] = [Along(d) for d in range(len(shape) - 1)]
        views: list[AxisMap] = [(*rest, Const(j)) for j in range(a.shape[-1])]
        found += a.columns or [a.known and a.known.seen(view, shape) for view in views]
    return tuple(found)
