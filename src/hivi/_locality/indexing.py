"""Rules for reading and writing at indices: slices at run-time positions, gather and scatter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hivi._locality.base import (
    ALL,
    CAP,
    LIMIT,
    LOOPS,
    NOWHERE,
    Along,
    Arr,
    AxisMap,
    Const,
    Entry,
    Known,
    Params,
    Read,
    Rule,
    Shape,
    Table,
    Unsupported,
    constant,
    table,
    used,
    values,
)

_SHARED = 8  # updates of one element that are told apart


def _window(axis: int | None, start: Known | None, size: int, length: int, mode: str, out: Shape) -> Entry:
    """Index read on an operand axis of `length` by a window of `size` that runs along `axis` of the output, of extent `out`.

    `axis` is None where the output has no such axis (size 1). `mode` tells what happens to windows
    that are not inside: CLIP moves them, FILL_OR_DROP does not read, otherwise it is not known.
    """
    if size == length:
        start = constant(0)  # there is only one place for it
    if start is None:
        return ALL
    entry: Entry = start.entry
    if not start.within(0, length - size) and "DROP" not in mode:
        found = _clipped(entry, length - size) if "CLIP" in mode else None
        if found is None:
            return ALL
        entry = found
    if isinstance(entry, Const):
        return entry if axis is None else Along(axis, entry.index)
    if size == 1:
        return entry
    axes = sorted({*used(entry), axis} if axis is not None else used(entry))
    if axis is None or math.prod(out[a] for a in axes) > LIMIT:
        return ALL
    starts = values(entry, axes, out)
    return table(axes, np.where(starts < 0, NOWHERE, starts + values(Along(axis), axes, out)))


def _clipped(entry: Entry, high: int) -> Entry | None:
    """An index moved inside; None where that is not known."""
    if isinstance(entry, Const):
        return Const(min(max(entry.index, 0), int(high)))
    return table(entry.axes, np.clip(entry.array(), 0, high)) if isinstance(entry, Table) else None


def _dynamic_slice(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    operand, *starts = args
    sizes = params["slice_sizes"]
    if len(starts) != len(operand.shape):
        raise Unsupported
    extent = outs[0] + params[LOOPS]
    view = tuple(
        _window(d, starts[d].known, sizes[d], length, "CLIP", extent) for d, length in enumerate(operand.shape)
    )
    return [[Read(0, view, "slice at an unknown index"), *(Read(i + 1, ()) for i in range(len(starts)))]]


def _columns(indices: Arr, batch: Sequence[int], count: int, extent: Shape) -> tuple[list[AxisMap], list[Known | None]]:
    """Views and known values of the `count` columns of an index array, along the axes `batch` of an array."""
    views: list[AxisMap] = [(*map(Along, batch), Const(j)) for j in range(count)]
    if indices.columns is not None:
        return views, [c and c.seen(view, extent) for c, view in zip(indices.columns, views, strict=True)]
    return views, [indices.known and indices.known.seen(view, extent) for view in views]


def _gather(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    numbers, mode = params["dimension_numbers"], str(params["mode"])
    operand, indices = args
    batch = [d for d in range(len(outs[0])) if d not in numbers.offset_dims]
    extent = outs[0] + params[LOOPS]
    views, columns = _columns(indices, batch, indices.shape[-1], extent)
    offsets = map(int, numbers.offset_dims)
    paired = list(numbers.operand_batching_dims)
    indexed = list(numbers.start_index_map)
    view: list[Entry] = []
    for d, (length, size) in enumerate(zip(operand.shape, params["slice_sizes"], strict=True)):
        if d in paired:
            view.append(Along(batch[numbers.start_indices_batching_dims[paired.index(d)]]))
            continue
        axis = None if d in numbers.collapsed_slice_dims else next(offsets)
        start = columns[indexed.index(d)] if d in indexed else constant(0)
        view.append(_window(axis, start, size, length, mode, extent))
    if len(views) > CAP:
        views = [(*map(Along, batch), ALL)]
    return [[Read(0, tuple(view), "index is not known"), *(Read(1, v) for v in views)]]


def copies(params: Params, args: Sequence[Arr]) -> bool:
    """Whether a gather gives elements of its operand alone: never what fills places outside."""
    if "FILL" not in str(params["mode"]):
        return True
    operand, indices = args
    axes = params["dimension_numbers"].start_index_map
    found = indices.columns or [indices.known] * len(axes)
    room = [operand.shape[d] - params["slice_sizes"][d] for d in axes]
    return all(k is not None and k.within(0, most) for k, most in zip(found, room, strict=True))


class _Target:
    """Builds the view of an update written into an operand: where each output element reads it."""

    def __init__(self, rank: int) -> None:
        self.view: list[Entry] = [ALL] * rank
        self.place: tuple[int, Const | Along] | None = None

    def write(self, d: int, length: int, axis: int | None, size: int, start: Known | None, mode: str) -> None:
        """Write along axis `d` of the operand a window of `size` that runs along `axis` of the update."""
        if size == length and axis is not None:
            self.view[axis] = Along(d)
            return
        if start is None:
            return
        entry: Entry = start.entry
        if not start.within(0, length - size) and "DROP" not in mode:
            if "CLIP" not in mode or not isinstance(entry, Const):
                return
            entry = Const(min(max(entry.index, 0), int(length - size)))
        if isinstance(entry, Const):
            if axis is not None:
                self.view[axis] = Along(d, -entry.index)
            if size == 1 and self.place is None:
                self.place = (d, entry)
        elif isinstance(entry, Along) and size == 1 and entry.stride in (1, -1):
            if entry.axis < 0:
                self.place = (d, entry)
            else:  # solve out = offset + stride*index for the index of the update
                self.view[entry.axis] = Along(d, -entry.stride * entry.offset, entry.stride)


def _dynamic_update_slice(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    operand, update, *starts = args
    if len(starts) != len(operand.shape):
        raise Unsupported
    target = _Target(len(update.shape))
    for d, length in enumerate(operand.shape):
        target.write(d, length, d, update.shape[d], starts[d].known, "CLIP")
    written = Read(1, tuple(target.view), "update at an unknown index", target.place)
    return [[Read(0), written, *(Read(i + 2, ()) for i in range(len(starts)))]]


def _scatter(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    numbers, mode = params["dimension_numbers"], str(params["mode"])
    operand, indices, updates = args
    target = _Target(len(updates.shape))
    batch = [u for u in range(len(updates.shape)) if u not in numbers.update_window_dims]
    _, columns = _columns(indices, batch, indices.shape[-1], updates.shape)
    windows = map(int, numbers.update_window_dims)
    paired = list(numbers.operand_batching_dims)
    indexed = list(numbers.scatter_dims_to_operand_dims)
    index: list[Entry] = [ALL] * len(indices.shape)
    scattered: dict[int, Entry] = {}
    for d, length in enumerate(operand.shape):
        if d in paired:
            b = numbers.scatter_indices_batching_dims[paired.index(d)]
            target.view[batch[b]] = index[b] = Along(d)
            continue
        axis = None if d in numbers.inserted_window_dims else next(windows)
        size = 1 if axis is None else updates.shape[axis]
        start = columns[indexed.index(d)] if d in indexed else constant(0)
        target.write(d, length, axis, size, start, mode)
        if axis is None and start and (start.within(0, length - 1) or "DROP" in mode):
            scattered[d] = start.entry
    views = _inverses(scattered, updates.shape, operand.shape) or [{}]
    reads = [tuple(found.get(u, e) for u, e in enumerate(target.view)) for found in views]
    written = [Read(2, view, "scatter at an unknown index", target.place) for view in reads]
    return [[Read(0), Read(1, tuple(index), "scatter index"), *written]]


def _inverses(written: dict[int, Entry], updates: Shape, operand: Shape) -> list[dict[int, Entry]]:
    """Where the elements of an operand read the updates that are written at tables of indices.

    Args:
        written: axis of the operand -> index at which each update is written.
        updates: shape of the updates.
        operand: shape of the operand.

    Returns:
        One view (axis of the updates -> entry) for each of the updates that a single element gets; nothing where there
        are no tables, or too much to tell.
    """
    written = {d: e for d, e in written.items() if not isinstance(e, Const)}
    axes = sorted({a for e in written.values() for a in used(e)})
    shape, cells = tuple(updates[a] for a in axes if a >= 0), tuple(operand[d] for d in written)
    small = math.prod(shape) <= LIMIT and math.prod(cells) <= LIMIT
    if not any(isinstance(e, Table) for e in written.values()) or axes[0] < 0 or not small:
        return []
    found = np.broadcast_arrays(*(values(e, axes, updates) for e in written.values()))
    inside = np.all([(i >= 0) & (i < n) for i, n in zip(found, cells, strict=True)], axis=0).ravel()
    cell = np.ravel_multi_index([np.clip(i, 0, n - 1).ravel() for i, n in zip(found, cells, strict=True)], cells)
    update = np.flatnonzero(inside)[np.argsort(cell[inside], kind="stable")]
    cell = np.sort(cell[inside])
    rank = np.arange(len(cell)) - np.searchsorted(cell, cell)
    if not len(cell) or rank.max() >= _SHARED:
        return []
    result = []
    for r in range(rank.max() + 1):
        reads = np.full((len(axes), math.prod(cells)), NOWHERE)
        reads[:, cell[rank == r]] = np.unravel_index(update[rank == r], shape)
        result.append({a: table(list(written), row.reshape(cells)) for a, row in zip(axes, reads, strict=True)})
    return result


INDEXING: dict[str, Rule] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter,
    **{f"scatter-{op}": _scatter for op in ("add", "sub", "mul", "min", "max")},
}
