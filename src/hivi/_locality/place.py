"""Bring values of a factor's elements to the coordinates of a site that they touch."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hivi._locality.base import ALL, All, Along, AxisMap, Const, Entry, Factor, Table, used, values


def place(array: Array, factor: Factor, site: str, shape: tuple[int, ...]) -> Array:
    """For every coordinate of a site, the sum of the factor's elements that can touch it.

    Args:
        array: values of the factor's elements, shape `factor.shape` (log-probabilities, or changes of them).
        factor: the factor, with its maps.
        site: name of the site.
        shape: shape of the site.

    Returns:
        Array of the site's shape: for each coordinate the (unweighted) sum over the elements it touches.
    """
    out = jnp.zeros(shape, array.dtype)
    for axis_map in factor.maps(site):
        out = out + _place_map(array, axis_map, shape)
    return out


def along_axis(factor: Factor, site: str, axis: int, size: int) -> Entry | None:
    """How the elements of a factor run along one axis of a site, each touching one index there; `ALL` where some touch more.

    None where the factor does not touch the site.
    """
    found = {entries[axis] for entries in factor.maps(site)}
    if not found:
        return None
    entry = found.pop()
    if found or isinstance(entry, All):
        return ALL
    if isinstance(entry, Const):
        return entry
    index = (
        entry.array() if isinstance(entry, Table) else entry.offset + entry.stride * np.arange(factor.shape[entry.axis])
    )
    return entry if index.size and index.min() >= 0 and index.max() < size else ALL


def sums_along(array: Array, entry: Entry, size: int) -> Array:
    """Sums of a factor's elements by the index that they touch on an axis of this size, as `along_axis` says; (size,)."""
    return _place_map(array, (entry,), (size,))


def _place_map(array: Array, axis_map: AxisMap, shape: tuple[int, ...]) -> Array:
    if any(isinstance(e, Table) for e in axis_map):
        return _place_table(array, axis_map, shape)
    axes = {e.axis for e in axis_map if isinstance(e, Along)}
    reduced = jnp.sum(array, axis=tuple(k for k in range(array.ndim) if k not in axes))
    order = sorted(axes)
    if len(axes) < sum(isinstance(e, Along) for e in axis_map):
        return _place_diagonal(array, axis_map, shape)
    # Axes of `reduced` in the order of the latent's axes, the others inserted with length 1.
    reduced = jnp.transpose(reduced, [order.index(e.axis) for e in axis_map if isinstance(e, Along)])
    for axis, entry in enumerate(axis_map):
        if not isinstance(entry, Along):
            reduced = jnp.expand_dims(reduced, axis)
    for axis, entry in enumerate(axis_map):
        reduced = _spread(reduced, axis, entry, shape[axis])
    return jnp.broadcast_to(reduced, shape)


def _spread(found: Array, axis: int, entry: Entry, size: int) -> Array:
    """Move found along one axis to the latent's own indices; indices that nothing reaches get zero."""
    if isinstance(entry, All | Table):
        return found
    if isinstance(entry, Const):
        index = [slice(None)] * found.ndim
        index[axis] = slice(entry.index, entry.index + 1)
        target = list(found.shape)
        target[axis] = size
        return jnp.zeros(target, found.dtype).at[tuple(index)].set(found)
    if (entry.offset, entry.stride, found.shape[axis]) == (0, 1, size):
        return found
    if entry.stride < 0:
        found = jnp.flip(found, axis)
    length, stride = found.shape[axis], abs(entry.stride)
    first = entry.offset if entry.stride > 0 else entry.offset + entry.stride * (length - 1)
    if entry.stride == 0:
        return _spread(jnp.sum(found, axis, keepdims=True), axis, Const(entry.offset), size)
    low = max(0, -(first // stride)) if first < 0 else 0
    high = min(length, (size - 1 - first) // stride + 1)
    index = [slice(None)] * found.ndim
    index[axis] = slice(low, high)
    kept = found[tuple(index)]
    target = list(found.shape)
    target[axis] = size
    where = [slice(None)] * found.ndim
    where[axis] = slice(first + low * stride, first + (high - 1) * stride + 1, stride)
    return jnp.zeros(target, found.dtype).at[tuple(where)].set(kept)


def _place_diagonal(array: Array, axis_map: AxisMap, shape: tuple[int, ...]) -> Array:
    """Two latent axes that run along one axis of the factor: scatter element by element."""
    grids = jnp.indices(array.shape)
    index, valid = [], jnp.ones(array.shape, bool)
    for entry, size in zip(axis_map, shape, strict=True):
        if isinstance(entry, Along):
            where = entry.stride * grids[entry.axis] + entry.offset
            valid &= (where >= 0) & (where < size)
            index.append(jnp.clip(where, 0, size - 1))
        else:
            index.append(jnp.full(array.shape, entry.index if isinstance(entry, Const) else 0))
    out = jnp.zeros(shape, array.dtype).at[tuple(index)].add(jnp.where(valid, array, 0))
    for axis, entry in enumerate(axis_map):
        if isinstance(entry, All):
            out = jnp.broadcast_to(jnp.take(out, jnp.array([0]), axis=axis), out.shape)
    return out


def _place_table(array: Array, axis_map: AxisMap, shape: tuple[int, ...]) -> Array:
    """Latent indices from tables: sum over the axes that no entry needs, then scatter by constant indices."""
    axes = sorted({a for e in axis_map for a in used(e)})
    reduced = jnp.sum(array, axis=tuple(k for k in range(array.ndim) if k not in axes))
    pairs = [(e, n) for e, n in zip(axis_map, shape, strict=True) if not isinstance(e, All)]
    index = [values(e, axes, array.shape) for e, _ in pairs]
    valid = functools.reduce(np.logical_and, [(i >= 0) & (i < n) for i, (_, n) in zip(index, pairs, strict=True)])
    clipped = [np.clip(i, 0, n - 1).astype(np.int32) for i, (_, n) in zip(index, pairs, strict=True)]
    out = jnp.zeros([n for _, n in pairs], array.dtype)
    out = out.at[tuple(np.broadcast_to(i, reduced.shape) for i in clipped)].add(jnp.where(valid, reduced, 0))
    return jnp.broadcast_to(jnp.expand_dims(out, [k for k, e in enumerate(axis_map) if isinstance(e, All)]), shape)
