"""Joint values of what each factor touches: few evaluations that show every element all of its own."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from hivi._locality.base import ALL, LIMIT, AxisMap, Factor, Shape, values

LARGEST = 1 << 22
"""Most joint values of all scopes together: numbers that each draw holds."""
SEARCHED = 50_000
"""Most groups of colours, times colours, for which a covering is sought."""


class Covering(NamedTuple):
    """Values of a site's coordinates at which, between them, every narrow element of every factor sees all of its own.

    Attributes:
        rows: (evaluations, coordinates): the number of the value of every coordinate, from 0.
        scopes: (scopes, width): different sets of coordinates that elements touch, ascending; -1 fills up.
        times: (evaluations, scopes): how many evaluations show a scope the same values as this one.
        owners: for each factor, the scope of each of its elements, flat; None where it touches none or too many coordinates.
    """

    rows: np.ndarray
    scopes: np.ndarray
    times: np.ndarray
    owners: tuple[np.ndarray | None, ...]


def touched(factor: Factor, site: str, shape: Shape, most: int) -> np.ndarray | None:
    """Flat coordinates of a site that each element of a factor touches, (elements, width), ascending after -1 for none.

    None where an element touches more than `most`, or where there are too many to list.
    """
    found, size = [], math.prod(factor.shape)
    for entries in sorted(factor.maps(site), key=repr):
        wide = [n for e, n in zip(entries, shape, strict=True) if e == ALL]
        if math.prod(wide) > most or size * math.prod(wide) > LIMIT:
            return None
        found.append(_flat(entries, factor.shape, shape).reshape(size, math.prod(wide)))
    if not found or size * sum(f.shape[1] for f in found) > LIMIT:
        return None
    places = np.sort(np.concatenate(found, 1), 1)
    places[:, 1:][places[:, 1:] == places[:, :-1]] = -1
    width = max(1, int((places >= 0).sum(1).max(initial=0)))
    return np.sort(places, 1)[:, places.shape[1] - width :] if width <= most else None


def _flat(entries: AxisMap, extent: Shape, shape: Shape) -> np.ndarray:
    """(*extent, *sizes of the axes that are touched whole)."""
    wide = [k for k, e in enumerate(entries) if e == ALL]
    total = (*extent, *(shape[k] for k in wide))
    flat, inside = np.zeros(total, np.int64), np.ones(total, bool)
    for k, (entry, n) in enumerate(zip(entries, shape, strict=True)):
        if k in wide:
            own = np.arange(n).reshape([n if j == wide.index(k) else 1 for j in range(len(wide))])
        else:
            line = values(entry, range(len(extent)), extent)
            own = line.reshape((*line.shape, *(1 for _ in wide)))
        inside &= (own >= 0) & (own < n)
        flat = flat * n + own
    return np.where(inside, flat, -1)


Group = tuple[Sequence[Factor], Collection[str]]
"""Factors, and names of terms among them that are left out in any case."""


def covering(groups: Sequence[Group], site: str, shape: Shape, count: int, most: int) -> Covering | None:
    """The evaluations that show every narrow element all joint values of the coordinates that it touches.

    Elements that touch too many coordinates for `most` evaluations are left out, and all of their factor with them.

    Args:
        groups: the factors.
        site: name of the site.
        shape: its shape.
        count: how many values each of its coordinates has.
        most: the most evaluations.

    Returns:
        None where there are factors of two coordinates or more, and none of these can be covered.
    """
    factors = [f._replace(weight=1.0) for some, _ in groups for f in some]
    apart = [f.name in names for some, names in groups for f in some]
    return _covering(tuple(factors), tuple(apart), site, shape, count, most)


@functools.lru_cache(maxsize=16)
def _covering(
    factors: tuple[Factor, ...], apart: tuple[bool, ...], site: str, shape: Shape, count: int, most: int
) -> Covering | None:
    widest = int(math.log(most) / math.log(count) + 1e-9) if count > 1 else 0
    found = [None if a else touched(f, site, shape, widest) for f, a in zip(factors, apart, strict=True)]
    joint = any(f.maps(site) and (p is None or p.shape[1] > 1) for f, p in zip(factors, found, strict=True))
    for width in range(widest, int(joint), -1):
        kept = [p if p is not None and p.shape[1] <= width else None for p in found]
        if width > max((p.shape[1] for p in kept if p is not None), default=0):
            continue
        scopes, owners = _unique(kept)
        colour = _colours(scopes, math.prod(shape))
        tuples, which = np.unique(_named(scopes, colour), axis=0, return_inverse=True)
        rows = _cover([tuple(t[t >= 0].tolist()) for t in tuples], int(colour.max(initial=0)) + 1, count, most)
        if rows is None or len(rows) * len(scopes) > LARGEST:
            continue
        return Covering(
            rows.astype(np.int16)[:, colour], scopes, _times(rows, tuples, count)[:, which.reshape(-1)], owners
        )
    return None


def narrowest(groups: Sequence[Group], site: str, shape: Shape) -> int:
    """The least number of coordinates, of two or more, that all elements of a factor keep to; 0 where none is known."""
    found = [touched(f, site, shape, 64) for some, names in groups for f in some if f.name not in names]
    return min((p.shape[1] for p in found if p is not None and p.shape[1] > 1), default=0)


def _unique(places: Sequence[np.ndarray | None]) -> tuple[np.ndarray, tuple[np.ndarray | None, ...]]:
    """The different scopes, and which one each element of each factor has."""
    width = max(p.shape[1] for p in places if p is not None)
    filled = [np.pad(p, ((0, 0), (width - p.shape[1], 0)), constant_values=-1) for p in places if p is not None]
    scopes, which = np.unique(np.concatenate(filled), axis=0, return_inverse=True)
    parts = iter(np.split(which.reshape(-1), np.cumsum([len(p) for p in filled])[:-1]))
    return scopes, tuple(None if p is None else next(parts) for p in places)


def _colours(scopes: np.ndarray, size: int) -> np.ndarray:
    """A colour for each coordinate, such that those of one scope differ: the least that its neighbours do not have."""
    neighbours: list[set[int]] = [set() for _ in range(size)]
    for a in range(scopes.shape[1]):
        for b in range(a + 1, scopes.shape[1]):
            both = scopes[:, [a, b]]
            for i, j in np.unique(both[(both >= 0).all(1)], axis=0).tolist():
                neighbours[j].add(i)
                neighbours[i].add(j)
    colour = np.full(size, -1)
    for i in range(size):
        taken = {int(colour[j]) for j in neighbours[i]}
        colour[i] = next(c for c in range(size) if c not in taken)
    return colour


def _named(scopes: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Colours of the coordinates of each scope, ascending after -1."""
    return np.sort(np.where(scopes >= 0, colour[scopes], -1), 1)


def _cover(groups: list[tuple[int, ...]], colours: int, count: int, most: int) -> np.ndarray | None:
    """Rows of values of all colours among which each group sees all its joint values; None if more than `most` are needed.

    Greedy, a row at a time, a colour at a time (Cohen, Dalal, Fredman & Patton 1997, "The AETG system").
    """
    inside = {part for g in groups for size in range(1, len(g)) for part in itertools.combinations(g, size)}
    kept = [g for g in groups if g and g not in inside]
    if len(kept) * colours > SEARCHED:
        return None
    missing = {g: np.ones((count,) * len(g), bool) for g in kept}
    rows: list[list[int]] = []
    while missing:
        if len(rows) == most:
            return None
        row = _row(missing, colours, count)
        rows.append(row)
        for g in list(missing):
            missing[g][tuple(row[c] for c in g)] = False
            if not missing[g].any():
                del missing[g]
    return np.asarray(rows, int).reshape(-1, colours)


def _row(missing: dict[tuple[int, ...], np.ndarray], colours: int, count: int) -> list[int]:
    """A row that shows as many of the missing values as a greedy choice finds."""
    row = [-1] * colours
    first = max(missing, key=lambda g: int(missing[g].sum()))
    for c, v in zip(first, np.argwhere(missing[first])[0].tolist(), strict=True):
        row[c] = v
    by_colour: dict[int, list[tuple[int, ...]]] = {}
    for g in missing:
        for c in g:
            by_colour.setdefault(c, []).append(g)
    # Next always the colour that most is known about: whose groups have most of their values.
    while left := [c for c in by_colour if row[c] < 0]:
        known = {c: sum(sum(row[d] >= 0 for d in g) / len(g) for g in by_colour[c]) for c in left}
        own = max(left, key=lambda c: (known[c], -c))
        gains = np.zeros(count)
        for g in by_colour[own]:
            index = tuple(row[d] if row[d] >= 0 else slice(None) for d in g)
            here = missing[g][index]  # axes of the colours that are not set yet
            axis = [d for d in g if row[d] < 0].index(own)
            shown = np.moveaxis(here, axis, 0).reshape(count, -1)
            gains += shown.mean(1)
        row[own] = int(np.argmax(gains))
    return [max(v, 0) for v in row]


def _times(rows: np.ndarray, tuples: np.ndarray, count: int) -> np.ndarray:
    """(rows, tuples): the number of rows in which a tuple of colours has the same values."""
    out = np.empty((len(rows), len(tuples)), np.int16)
    for k, t in enumerate(tuples):
        seen = rows[:, t[t >= 0]]
        code = seen @ (count ** np.arange(seen.shape[1]))
        _, which, times = np.unique(code, return_inverse=True, return_counts=True)
        out[:, k] = times[which.reshape(-1)]
    return out
