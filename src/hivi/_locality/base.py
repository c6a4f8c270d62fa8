"""Vocabulary of the locality engine: how the axes of a latent run along the axes of a factor.

A *factor* is one additive term of a log-density, kept as an array before its final sum. For every
latent site that it depends on, a set of `AxisMap` says which coordinates of the site each element
of the factor can touch. Locality is read from the arithmetic (a jaxpr), never from plates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias


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


Entry: TypeAlias = All | Const | Along
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


# What the parts of the axis-map interpreter (axes.py) share.

CAP = 8
"""Most maps kept for one array and site; above it they are joined."""

Shape: TypeAlias = tuple[int, ...]


def compose(entry: Entry, view: AxisMap) -> Entry:
    """Entry of an array read through `view`, which gives the index read on each of its axes.

    An axis below 0 is the step of an enclosing loop (-1 for the outermost, -2 for the next); no view moves it.
    """
    if not isinstance(entry, Along) or entry.axis < 0:
        return entry
    index = view[entry.axis]
    if isinstance(index, Along):
        return Along(index.axis, entry.offset + entry.stride * index.offset, entry.stride * index.stride)
    if isinstance(index, Const):
        return Const(entry.offset + entry.stride * index.index)
    return ALL


class Known(NamedTuple):
    """An integer (or boolean) array whose value at each element is `entry` of its index, within bounds."""

    entry: Const | Along
    low: int
    high: int

    def seen(self, view: AxisMap | None) -> Known | None:
        """The same values seen through `view`, or None where they are no longer known."""
        entry = self.entry if view is None else compose(self.entry, view)
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


Params: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Params, Sequence[Arr], Sequence[Shape]], list[list[Read]]]
"""What a primitive reads: from its parameters, operands and output shapes, the reads of every output."""
