"""Colour the coordinates of a site: coordinates of one colour share no factor element, so they move together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from hivi._locality.base import ALL, LIMIT, Along, Factor, used, values


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
    return [_axis_colours(factors, site, axis, size) for axis, size in enumerate(shape)]


def _axis_colours(factors: Sequence[Factor], site: str, axis: int, size: int) -> np.ndarray:
    distances: set[int] = set()
    pairs: list[np.ndarray] = []
    for factor in factors:
        entries = {m[axis] for m in factor.maps(site)}
        if ALL in entries:
            return np.arange(size)
        for x, y in itertools.combinations(entries, 2):
            if isinstance(x, Along) and isinstance(y, Along) and (x.axis, x.stride) == (y.axis, y.stride):
                distances.add(abs(x.offset - y.offset))
                continue
            axes = sorted({*used(x), *used(y)})
            if math.prod(factor.shape[a] for a in axes) > LIMIT:
                return np.arange(size)
            both = np.broadcast_arrays(values(x, axes, factor.shape), values(y, axes, factor.shape))
            pairs.append(np.stack([both[0].ravel(), both[1].ravel()], 1))
    distances = {d for d in distances if d < size}
    if not pairs:
        # Indices of one colour are multiples of the period apart, and no factor element reaches two of them.
        period = next(p for p in range(1, size + 1) if all(d % p for d in distances)) if size else 1
        return np.arange(size) % period
    return _greedy(size, distances, np.concatenate(pairs))


def _greedy(size: int, distances: set[int], pairs: np.ndarray) -> np.ndarray:
    pairs = pairs[((pairs >= 0) & (pairs < size)).all(1) & (pairs[:, 0] != pairs[:, 1])]
    neighbours: list[set[int]] = [set() for _ in range(size)]
    for i, j in np.unique(np.sort(pairs, 1), axis=0).tolist():
        neighbours[j].add(i)
    result = [0] * size
    for i in range(size):
        taken = {result[j] for j in neighbours[i]} | {result[i - d] for d in distances if i >= d}
        result[i] = next(c for c in itertools.count() if c not in taken)
    return np.asarray(result, int)
