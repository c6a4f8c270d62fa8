"""Colour the coordinates of a site: coordinates of one colour share no factor element, so they move together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hivi._locality.base import All, Along, Const, Factor


def colours(factors: Sequence[Factor], site: str, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Assign a colour to every index of every axis of a site.

    Two different coordinates whose colours agree on every axis touch no common element of any factor, so a
    single evaluation can change all of them at once. The number of evaluations is the product over axes of
    the number of colours.

    Args:
        factors: the factors whose differences are wanted.
        site: name of the latent site.
        shape: its shape.

    Returns:
        One integer array per axis, of the axis' length, with values 0..(number of colours - 1).
    """
    return [_axis_colours([f.maps(site) for f in factors], axis, size) for axis, size in enumerate(shape)]


def _axis_colours(maps: Sequence[frozenset], axis: int, size: int) -> np.ndarray:
    distances: set[int] = set()
    cliques: set[tuple[int, ...]] = set()
    for factor in maps:
        entries = {m[axis] for m in factor}
        if not entries:
            continue
        along = [e for e in entries if isinstance(e, Along)]
        const = [e.index for e in entries if isinstance(e, Const)]
        if (
            any(isinstance(e, All) for e in entries)
            or (along and const)
            or len({(e.axis, e.stride) for e in along}) > 1
        ):
            return np.arange(size)
        offsets = [e.offset for e in along]
        distances |= {abs(a - b) for a in offsets for b in offsets if a != b}
        if len(const) > 1:
            cliques.add(tuple(sorted(const)))
    if not cliques:
        period = 1 + max(distances, default=0)
        return np.arange(size) % period
    return _greedy(size, distances, cliques)


def _greedy(size: int, distances: set[int], cliques: set[tuple[int, ...]]) -> np.ndarray:
    neighbours: list[set[int]] = [set() for _ in range(size)]
    for clique in cliques:
        for i in clique:
            neighbours[i].update(clique)
    result = np.zeros(size, int)
    for i in range(size):
        taken = {result[j] for j in neighbours[i] if j < i} | {result[i - d] for d in distances if i >= d}
        result[i] = next(c for c in range(size) if c not in taken)
    return result
