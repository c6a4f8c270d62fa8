"""Bring values of a factor's elements to the coordinates of a site that they touch."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from hivi._locality.base import All, Along, AxisMap, Const, Factor


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


def _place_map(array: Array, axis_map: AxisMap, shape: tuple[int, ...]) -> Array:
    used = {e.axis for e in axis_map if isinstance(e, Along)}
    reduced = jnp.sum(array, axis=tuple(k for k in range(array.ndim) if k not in used))
    order = sorted(used)
    if len(used) < sum(isinstance(e, Along) for e in axis_map):
        return _place_diagonal(array, axis_map, shape)
    # Axes of `reduced` in the order of the latent's axes, the others inserted with length 1.
    reduced = jnp.transpose(reduced, [order.index(e.axis) for e in axis_map if isinstance(e, Along)])
    for axis, entry in enumerate(axis_map):
        if not isinstance(entry, Along):
            reduced = jnp.expand_dims(reduced, axis)
    for axis, entry in enumerate(axis_map):
        reduced = _spread(reduced, axis, entry, shape[axis])
    return jnp.broadcast_to(reduced, shape)


def _spread(values: Array, axis: int, entry: All | Along | Const, size: int) -> Array:
    """Move values along one axis to the latent's own indices; indices that nothing reaches get zero."""
    if isinstance(entry, All):
        return values
    if isinstance(entry, Const):
        index = [slice(None)] * values.ndim
        index[axis] = slice(entry.index, entry.index + 1)
        target = list(values.shape)
        target[axis] = size
        return jnp.zeros(target, values.dtype).at[tuple(index)].set(values)
    if (entry.offset, entry.stride, values.shape[axis]) == (0, 1, size):
        return values
    if entry.stride < 0:
        values = jnp.flip(values, axis)
    length, stride = values.shape[axis], abs(entry.stride)
    first = entry.offset if entry.stride > 0 else entry.offset + entry.stride * (length - 1)
    if entry.stride == 0:
        return _spread(jnp.sum(values, axis, keepdims=True), axis, Const(entry.offset), size)
    low = max(0, -(first // stride)) if first < 0 else 0
    high = min(length, (size - 1 - first) // stride + 1)
    index = [slice(None)] * values.ndim
    index[axis] = slice(low, high)
    kept = values[tuple(index)]
    target = list(values.shape)
    target[axis] = size
    where = [slice(None)] * values.ndim
    where[axis] = slice(first + low * stride, first + (high - 1) * stride + 1, stride)
    return jnp.zeros(target, values.dtype).at[tuple(where)].set(kept)


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
