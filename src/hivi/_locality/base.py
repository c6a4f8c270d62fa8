"""Vocabulary of the locality engine: how the axes of a latent run along the axes of a factor.

A *factor* is one additive term of a log-density, kept as an array before its final sum. For every
latent site that it depends on, a set of `AxisMap` says which coordinates of the site each element
of the factor can touch. Locality is read from the arithmetic (a jaxpr), never from plates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np


class All(NamedTuple):
    """An element of the factor may touch every index of this latent axis."""


class Const(NamedTuple):
    """Every element of the factor touches one fixed index of this latent axis."""

    index: int  # type: ignore[assignment]  # not tuple.index


class Along(NamedTuple):
    """Element `out` (its index on `axis` of the factor) touches latent index `stride*out + offset`."""

    axis: int
    offset: int = 0
    stride: int = 1


class Table(NamedTuple):
    """Element `out` touches the latent index that a table holds at the indices of `out` on `axes`; below 0, none.

    For constant gathers, and for merged and split axes. As bytes, so that it can be hashed and compared.
    """

    axes: tuple[int, ...]
    shape: tuple[int, ...]
    data: bytes

    def array(self) -> np.ndarray:
        """The table, one array axis for each of `axes`."""
        return np.frombuffer(self.data, np.int64).reshape(self.shape)


Entry: TypeAlias = All | Const | Along | Table
AxisMap: TypeAlias = tuple[Entry, ...]
"""One entry per axis of the latent; `()` for a scalar latent."""

Maps: TypeAlias = frozenset[AxisMap]
Scope: TypeAlias = dict[str, Maps]
"""Site name -> the maps by which an array depends on that site. A site that is absent is not touched."""

ALL = All()


class Loss(NamedTuple):
    """A place where locality was given up: reported by `hivi.explain`, never an error."""

    site: str
    primitive: str
    reason: str


def total(rank: int) -> Maps:
    """The widest scope of a latent with `rank` axes: everything may be touched."""
    return frozenset({(ALL,) * rank})


def identity(rank: int) -> Maps:
    """The scope of the latent itself: axis k runs along axis k."""
    return frozenset({tuple(Along(k) for k in range(rank))})


class Factor(NamedTuple):
    """One additive term `weight * sum(array)` of a log-density.

    Attributes:
        name: the sample site, `factor` statement or dict key that it comes from.
        shape: shape of the array before the sum.
        weight: number that multiplies the sum (sign and literals met while peeling, times the
            plate scale N/B and any user scale).
        scope: pairs (site, maps), sorted by site.
    """

    name: str
    shape: tuple[int, ...]
    weight: float
    scope: tuple[tuple[str, Maps], ...]

    def maps(self, site: str) -> Maps:
        """Maps of `site`, or an empty set where the factor does not depend on it."""
        return dict(self.scope).get(site, frozenset())


class Term(NamedTuple):
    """`weight * sum(var)` is one additive part of output number `output`."""

    var: Any
    weight: float
    output: int


# What the parts of the axis-map interpreter (axes.py) share.

CAP = 32
"""Most maps kept for one array and site; above it they are joined."""

Shape: TypeAlias = tuple[int, ...]

LIMIT = 1 << 20
"""Most elements of a table of indices."""

NOWHERE = -(1 << 40)
"""In tables: no index at all. Every number below 0 means so; this one stays below 0 under offsets and strides."""


def table(axes: Sequence[int], array: np.ndarray) -> Entry:
    """The shortest spelling of an entry given by a table; `ALL` where that would be too large."""
    array = np.asarray(array, np.int64)
    kept = [k for k, n in enumerate(array.shape) if n > 1 and np.any(array != array.take([0], k))]
    array = np.ascontiguousarray(array[tuple(slice(None) if k in kept else 0 for k in range(array.ndim))], np.int64)
    if not kept:
        return Const(int(array.flat[0]))
    if len(kept) == 1:
        step = int(array[1] - array[0])
        if step and np.array_equal(array, int(array[0]) + step * np.arange(len(array))) and array.min() > NOWHERE // 2:
            return Along(axes[kept[0]], int(array[0]), step)
    if array.size > LIMIT:
        return ALL
    names = [axes[k] for k in kept]
    order = sorted(range(len(kept)), key=names.__getitem__)
    array = np.ascontiguousarray(array.transpose(order))
    return Table(tuple(names[k] for k in order), array.shape, array.tobytes())


def values(entry: Entry, axes: Sequence[int], extent: Shape | Mapping[int, int]) -> np.ndarray:
    """Latent index of every element along `axes` (sorted, with those of the entry among them); below 0, none.

    Args:
        entry: any but `ALL`.
        axes: axes of the array; below 0, steps of enclosing loops.
        extent: sizes of the array's axes, then those of the enclosing loops, innermost first.
    """
    if isinstance(entry, Along):
        line = entry.offset + entry.stride * np.arange(extent[entry.axis], dtype=np.int64)
        return line.reshape([-1 if a == entry.axis else 1 for a in axes])
    if isinstance(entry, Table):
        sizes = dict(zip(entry.axes, entry.shape, strict=True))
        return entry.array().reshape([sizes.get(a, 1) for a in axes])
    return np.full([1] * len(axes), entry.index if isinstance(entry, Const) else NOWHERE, np.int64)


def used(entry: Entry) -> tuple[int, ...]:
    """The axes along which an entry varies."""
    if isinstance(entry, Along):
        return (entry.axis,)
    return entry.axes if isinstance(entry, Table) else ()


def reindex(entry: Entry, moves: Mapping[int, Entry], extent: Shape) -> Entry:
    """Entry of an array whose axes are read at other indices; what is read outside of an array is nothing.

    Args:
        entry: how a latent axis follows the array that is read.
        moves: axis of that array -> the index read there; axes that are not listed stay.
        extent: sizes of the axes of the result, then those of the enclosing loops, innermost first.
    """
    if isinstance(entry, Along) and entry.axis in moves:
        index = moves[entry.axis]
        if isinstance(index, Along):
            return Along(index.axis, entry.offset + entry.stride * index.offset, entry.stride * index.stride)
        if isinstance(index, Const):
            return Const(entry.offset + entry.stride * index.index)
        if isinstance(index, Table):
            places = index.array()
            return table(index.axes, np.where(places < 0, NOWHERE, entry.offset + entry.stride * places))
        return ALL
    if isinstance(entry, Table) and any(a in moves for a in entry.axes):
        return _look_up(entry, moves, extent)
    return entry


def _look_up(entry: Table, moves: Mapping[int, Entry], extent: Shape) -> Entry:
    """A table read at other indices."""
    own = {a: n for a, n in zip(entry.axes, entry.shape, strict=True) if a not in moves}
    index = [moves.get(a, Along(a)) for a in entry.axes]
    axes = sorted({a for e in index for a in used(e)})
    sizes = {a: own[a] if a in own else extent[a] for a in axes}
    if ALL in index or math.prod(sizes.values()) > LIMIT:
        return ALL
    places = [values(e, axes, sizes) for e in index]
    inside = functools.reduce(np.logical_and, [(p >= 0) & (p < n) for p, n in zip(places, entry.shape, strict=True)])
    clipped = tuple(np.clip(p, 0, n - 1) for p, n in zip(places, entry.shape, strict=True))
    return table(axes, np.where(inside, entry.array()[clipped], NOWHERE))


def compose(entry: Entry, view: AxisMap, extent: Shape) -> Entry:
    """Entry of an array read through `view`, which gives the index read on each of its axes.

    An axis below 0 is the step of an enclosing loop (-1 for the outermost, -2 for the next); no view moves it.
    """
    return reindex(entry, dict(enumerate(view)), extent)


class Known(NamedTuple):
    """An integer (or boolean) array whose value at each element is `entry` of its index, within bounds."""

    entry: Const | Along | Table
    low: int
    high: int

    def seen(self, view: AxisMap | None, extent: Shape) -> Known | None:
        """The same values seen through `view` in an array of that extent, or None where they are no longer known."""
        entry = self.entry if view is None else compose(self.entry, view, extent)
        if isinstance(entry, All):
            return None
        return constant(entry.index) if isinstance(entry, Const) else Known(entry, self.low, self.high)

    def within(self, low: int, high: int) -> bool:
        """Whether every value lies in the closed range."""
        return low <= self.low and self.high <= high


def constant(value: int) -> Known:
    """An array filled with one known integer."""
    return Known(Const(value), value, value)


class Arr(NamedTuple):
    """An array of the program as the interpreter sees it."""

    shape: Shape
    scope: Scope
    known: Known | None = None
    columns: tuple[Known | None, ...] | None = None  # known integers at each index of the last axis
    support: Known | None = None  # true where it may be other than zero; None: anywhere
    finite: bool = False  # of an array that depends on latents: whether it is finite wherever they are


class Read(NamedTuple):
    """Elements of an output read `operand` at the indices `view` (None: at their own index).

    `reason` says what was not known where `view` is wider than the truth. `place` says that only
    the elements at this index of one output axis read at all: (axis, index).
    """

    operand: int
    view: AxisMap | None = None
    reason: str = ""
    place: tuple[int, Const | Along] | None = None


class Unsupported(Exception):
    """A rule does not cover this use of its primitive."""


LOOPS = "hivi loops"
"""Among the parameters that a rule gets: lengths of the loops around, innermost first."""

Params: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Params, Sequence[Arr], Sequence[Shape]], list[list[Read]]]
"""What a primitive reads: from its parameters, operands and output shapes, the reads of every output."""

_FINITE = """
abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos cumsum dot_general
dynamic_slice eq floor gather ge gt iota le logistic lt max min mul ne neg not or pad reduce_and reduce_max reduce_min
reduce_or reduce_sum rem reshape rev round select_n sign sin slice split sqrt square squeeze stack stop_gradient sub
tanh tile transpose xor
"""
FINITE = frozenset(_FINITE.split())
"""Primitives that give finite numbers from finite numbers."""
