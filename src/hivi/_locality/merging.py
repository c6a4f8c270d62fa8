"""Sets of axis maps: kept pairwise disjoint, so that no coordinate is counted twice at one element."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from hivi._locality.base import (
    ALL,
    CAP,
    LIMIT,
    NOWHERE,
    Along,
    AxisMap,
    Const,
    Entry,
    Maps,
    Scope,
    Shape,
    Table,
    reindex,
    table,
    used,
    values,
)

Place = tuple[int, Const | Along]


def _disjoint(a: AxisMap, b: AxisMap, extent: Shape) -> bool:
    """Whether no coordinate can reach the same element through both maps."""
    pairs = list(zip(a, b, strict=True))
    if any(_apart(x, y) for x, y in pairs):
        return True
    if not any(isinstance(e, Table) for e in (*a, *b)) and not any(_mixed(x, y) for x, y in pairs):
        return False
    # Equal tables tell, too, where both reach nothing.
    pairs = [(x, y) for x, y in pairs if (x != y or isinstance(x, Table)) and ALL not in (x, y)]
    axes = sorted({axis for pair in pairs for e in pair for axis in used(e)})
    if not pairs or math.prod(extent[axis] for axis in axes) > LIMIT:
        return False
    found = [(values(x, axes, extent), values(y, axes, extent)) for x, y in pairs]
    return bool(np.all(functools.reduce(np.logical_or, [(x != y) | (x < 0) | (y < 0) for x, y in found])))


def _apart(x: Entry, y: Entry) -> bool:
    if isinstance(x, Const) and isinstance(y, Const):
        return x.index != y.index
    if isinstance(x, Along) and isinstance(y, Along):
        return (x.axis, x.stride) == (y.axis, y.stride) and x.offset != y.offset
    return False


def _mixed(x: Entry, y: Entry) -> bool:
    """Whether their indices have to be looked at: equal at some elements, maybe, and different at others."""
    return x != y and {type(x), type(y)} <= {Const, Along} and not _apart(x, y)


def _without(m: AxisMap, other: AxisMap, extent: Shape) -> AxisMap | None:
    """What a map reaches less what another one reaches at the same element; None where that is not to be told.

    Such as the middle of `z * z[::-1]`, which reaches the same coordinate twice.
    """
    axes = sorted({axis for e in (*m, *other) for axis in used(e)})
    apart = [k for k, (x, y) in enumerate(zip(m, other, strict=True)) if x != y]
    # One fixed coordinate beside all others is mostly the first step of a loop, of which `_placed` knows more.
    fixed = any({type(m[k]), type(other[k])} == {Const, Along} for k in apart)
    if ALL in (*m, *other) or not apart or fixed or math.prod(extent[axis] for axis in axes) > LIMIT:
        return None
    found = [(values(x, axes, extent), values(y, axes, extent)) for x, y in zip(m, other, strict=True)]
    same = functools.reduce(np.logical_and, [(x == y) & (x >= 0) for x, y in found])
    where = apart[-1]
    cut = table(axes, np.where(same, NOWHERE, found[where][0]))
    return (*m[:where], cut, *m[where + 1 :]) if np.any(same) and cut != ALL else None


def join(maps: Iterable[AxisMap]) -> AxisMap:
    """One map that covers all: entries that agree stay."""
    return tuple(column[0] if all(e == column[0] for e in column) else ALL for column in zip(*maps, strict=True))


def _hits(entry: Entry, shape: Shape, size: int) -> bool:
    """Whether the entry reaches any index of a latent axis of this size."""
    if isinstance(entry, Const):
        return 0 <= entry.index < size
    if isinstance(entry, Table):
        found = entry.array()
        return bool(np.any((found >= 0) & (found < size)))
    if isinstance(entry, Along) and entry.axis >= 0:
        ends = entry.offset, entry.offset + entry.stride * (shape[entry.axis] - 1)
        return max(ends) >= 0 and min(ends) < size
    return True


def reachable(scope: Scope, shape: Shape, sizes: dict[str, Shape]) -> Scope:
    """Scope without the maps that fall outside the latent for every element."""
    kept: Scope = {}
    if 0 in shape:
        return kept
    for site, maps in scope.items():
        inside = frozenset(m for m in maps if all(_hits(e, shape, n) for e, n in zip(m, sizes[site], strict=True)))
        if inside:
            kept[site] = inside
    return kept


def merge(maps: set[AxisMap], extent: Shape, size: Shape) -> tuple[Maps, str]:
    """Maps of a set made pairwise disjoint by joining, and what was lost by it (or "")."""
    if len(maps) == 1:
        return frozenset(maps), ""
    plain = {tuple(_plain(e, extent) for e in m) for m in maps}
    result: list[AxisMap] = []
    reason = ""
    for m in sorted(plain, key=_order):
        if not all(_hits(e, extent, n) for e, n in zip(m, size, strict=True)):
            continue
        whole = m
        while clash := next((r for r in result if not _disjoint(r, m, extent)), None):
            if (rest := _without(m, clash, extent)) is not None:
                m = rest
                continue
            result.remove(clash)
            joined = join((clash, whole))
            reason = reason if joined in (clash, whole) else "one coordinate is used at several places"
            m = whole = joined
        if not all(_hits(e, extent, n) for e, n in zip(m, size, strict=True)):
            continue
        result.append(m)
        if len(result) > CAP:
            return frozenset({join(plain)}), f"more than {CAP} places"
    return frozenset(result), reason


def _plain(e: Entry, extent: Shape) -> Entry:
    """One way to write size-1 axes."""
    return Const(e.offset) if isinstance(e, Along) and e.axis >= 0 and extent[e.axis] == 1 else e


def _order(m: AxisMap) -> list[tuple[str, Entry]]:
    return [(type(e).__name__, e) for e in m]


def _placed(m: AxisMap, place: Place, fixed: Sequence[bool], extent: Shape) -> AxisMap:
    """The same dependence of elements that lie at one index of an output axis, said by their index."""
    axis, where = place
    entries: list[Entry] = []
    for e, stay in zip(m, fixed, strict=True):
        if isinstance(where, Const) and not stay and isinstance(e, Const):
            e = Along(axis, e.index - where.index)
        elif isinstance(where, Const) and not stay and isinstance(e, Along) and e.axis == axis:
            e = Along(axis, e.offset + (e.stride - 1) * where.index)
        elif isinstance(where, Along):
            # index = offset + stride*step with stride +-1, solved for the step of the loop
            e = reindex(e, {where.axis: Along(axis, -where.stride * where.offset, where.stride)}, extent)
        entries.append(e)
    return tuple(entries)


def merge_reads(found: list[tuple[AxisMap, Place | None]], extent: Shape, size: Shape) -> tuple[Maps, str]:
    """Merge the maps of all reads, in the better of two spellings for those that are placed."""
    raw = {m for m, _ in found}
    looped = any(place and isinstance(place[1], Along) for _, place in found)
    plain = merge(raw, extent, size)
    if not any(place for _, place in found) or (len(raw) == 1 and not looped):
        return plain
    fixed = [all(e == column[0] for e in column) for column in zip(*raw, strict=True)]
    placed = merge({_placed(m, place, fixed, extent) if place else m for m, place in found}, extent, size)
    choices = [placed, plain] if looped else [plain, placed]  # a loop's array is written step by step
    return min(choices, key=lambda choice: _size(choice[0]))


def _size(maps: Maps) -> tuple[int, int, int]:
    """How much a set says at most: entries that may be anything, tables, maps."""
    tables = sum(isinstance(e, Table) for m in maps for e in m)
    return max((m.count(ALL) for m in maps), default=0), tables, len(maps)
