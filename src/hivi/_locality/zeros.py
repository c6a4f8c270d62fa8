"""Where arrays are zero, so that sums and products skip these places.

A matrix of constants that is mostly zeros (an adjacency, blocks, a band, indicators of groups) says which coordinates meet: an
element of `z @ W` depends on those z_i alone for which W_ij is not zero. What is known is a boolean array, true where a number
may be other than zero; None: anywhere. Zero times what depends on latents is zero where that is finite, as `Arr.finite` says: not
for `W @ log(z)`, of which zero times infinity is a part. Signs of zeros (`arctan2`, `signbit`) are not followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from hivi._locality.base import (
    CAP,
    FINITE,
    LIMIT,
    LOOPS,
    NOWHERE,
    All,
    Along,
    Arr,
    AxisMap,
    Const,
    Entry,
    Known,
    Maps,
    Params,
    Read,
    Shape,
    Table,
    table,
    used,
    values,
)
from hivi._locality.integers import concrete, fold
from hivi._locality.rules import spread

_KEEPING = """
abs asin asinh atan ceil convert_element_type copy copy_p erf expm1 floor log1p neg real reduce_precision round sign sin sinh
sqrt square stop_gradient tan tanh
"""


def pattern(value: Any) -> Known | None:
    """`nonzero`, as the engine writes it."""
    mask = nonzero(value)
    return None if mask is None else _known(table(range(mask.ndim), mask))


def nonzero(value: Any) -> np.ndarray | None:
    """Where a concrete array is not zero; None if it is zero in less than half of its places, or cannot be read."""
    array = concrete(value, "fiub", LIMIT)
    if array is None:
        return None
    mask = np.asarray(array != 0)
    return mask if 2 * np.count_nonzero(mask) <= mask.size else None


def _known(entry: Entry) -> Known | None:
    return None if isinstance(entry, All) else Known(entry, 0, 1)


def support(arg: Arr) -> Known | None:
    """Where an operand may be other than zero."""
    if arg.support is not None or arg.known is None:
        return arg.support
    if isinstance(arg.known.entry, Table):
        entry = arg.known.entry
        return _known(table(entry.axes, entry.array() != 0))
    return Known(Const(0), 0, 0) if arg.known.entry == Const(0) else None


Seen: TypeAlias = Sequence[Known | None]


def _same(params: Params, seen: Seen, extent: Shape) -> Known | None:
    return seen[0]


def _power(params: Params, seen: Seen, extent: Shape) -> Known | None:
    return seen[0] if params["y"] > 0 else None


def _product(params: Params, seen: Seen, extent: Shape) -> Known | None:
    known = [s for s in seen if s is not None]
    return _folded("and", known, extent)


def _sum(params: Params, seen: Seen, extent: Shape) -> Known | None:
    return _folded("or", seen, extent)


def _choice(params: Params, seen: Seen, extent: Shape) -> Known | None:
    which, *cases = seen
    if which is None or len(cases) != 2:
        return _folded("or", cases, extent)
    return _folded("select_n", [which, *(c or Known(Const(1), 1, 1) for c in cases)], extent)


def _folded(name: str, known: Seen, extent: Shape) -> Known | None:
    if not known or None in known:
        return None
    return known[0] if all(k == known[0] for k in known) else fold(name, known, np.dtype(bool), extent)


_CARRIED: dict[str, Callable[[Params, Seen, Shape], Known | None]] = {
    **dict.fromkeys((*_KEEPING.split(), "div"), _same),
    **dict.fromkeys(("mul", "and"), _product),
    **dict.fromkeys(("add", "add_any", "sub", "or"), _sum),
    "integer_pow": _power,
    "select_n": _choice,
}
"""Elementwise primitives -> where the result may be other than zero, from where the operands may be (the values, of a choice)."""


def carried(name: str, params: Params, args: Sequence[Arr], shape: Shape, real: bool) -> Known | None:
    """Where the result of a primitive may be other than zero.

    Args:
        name: the primitive.
        params: its parameters, `LOOPS` among them.
        args: its operands.
        shape: shape of the result.
        real: whether the result is a real number: the integer quotient 0 / 0 is another number.
    """
    if name not in _CARRIED or (name == "div" and (args[1].scope or not real)):
        return None
    if name == "mul" and not all(map(finite, args)):
        return None
    found = [a.known if name == "select_n" and k == 0 else support(a) for k, a in enumerate(args)]
    if not any(found):
        return None
    extent = shape + params[LOOPS]
    return _CARRIED[name](
        params, [f and f.seen(spread(a.shape, shape), extent) for f, a in zip(found, args, strict=True)], extent
    )


def finite(arg: Arr) -> bool:
    """Whether an operand is finite wherever the latents are; of what depends on none it does not matter."""
    return arg.finite or not arg.scope


def stays_finite(name: str, params: Params, args: Sequence[Arr]) -> bool:
    """Whether the result of a primitive is finite wherever the latents are."""
    fine = name in FINITE or (name == "div" and not args[1].scope) or (name == "integer_pow" and params["y"] > 0)
    return fine and all(map(finite, args))


def places(known: Known | None, shape: Shape, over: Sequence[int], loops: Shape) -> list[dict[int, Entry]] | None:
    """The places that a sum over some axes of an array reads, one after the other, or None where they are all or many.

    Args:
        known: where the array may be other than zero.
        shape: its shape.
        over: its axes that are summed.
        loops: lengths of the loops around, innermost first.

    Returns:
        For each number k, summed axis -> index of the k-th place as an entry over the array's other axes.
    """
    if known is None or not over:
        return None
    extent = shape + loops
    kept = [*(a for a in used(known.entry) if a < 0), *(d for d in range(len(shape)) if d not in over)]
    axes = sorted([*kept, *over])
    sizes = [extent[d] for d in axes]
    if math.prod(sizes) > LIMIT:
        return None
    mask = np.broadcast_to(values(known.entry, axes, extent) != 0, sizes).transpose(
        [axes.index(d) for d in (*kept, *over)]
    )
    cells = mask.reshape(math.prod(extent[d] for d in kept), -1)
    most = int(cells.sum(1).max(initial=0))
    if most > CAP or most**2 > cells.shape[1]:  # all would meet all, and one map of the whole axis costs less
        return None
    order = np.argsort(~cells, axis=1, kind="stable")[:, :most]
    found = []
    for k in range(most):
        some = cells[np.arange(len(cells)), order[:, k]]
        index = np.unravel_index(order[:, k], [shape[d] for d in over])
        tables = [np.where(some, i, NOWHERE).reshape([extent[d] for d in kept]) for i in index]
        found.append({d: table(kept, t) for d, t in zip(over, tables, strict=True)})
    return found


def summed(reads: Sequence[Read], name: str, params: Params, args: Sequence[Arr]) -> list[Read]:
    """The reads of a sum or of a product of matrices, without those of places where the numbers are zero."""
    if name == "reduce_sum":
        found = places(support(args[0]), args[0].shape, [int(a) for a in params["axes"]], params[LOOPS])
        kept = [d for d in range(len(args[0].shape)) if d not in params["axes"]]
        return _placed(reads[0], found, {d: k for k, d in enumerate(kept)}, {})
    contract, _ = params["dimension_numbers"]
    out: list[Read] = []
    for read in reads:
        other = 1 - read.operand
        weights, view = args[other], reads[other].view or ()
        if not finite(args[read.operand]):
            out.append(read)
            continue
        found = places(support(weights), weights.shape, [int(d) for d in contract[other]], params[LOOPS])
        names = {d: e.axis for d, e in enumerate(view) if isinstance(e, Along)}
        same = dict(zip(map(int, contract[other]), map(int, contract[read.operand]), strict=True))
        out += _placed(read, found, names, same)
    return out


def _placed(
    read: Read, found: list[dict[int, Entry]] | None, names: dict[int, int], same: dict[int, int]
) -> list[Read]:
    """One read for each place.

    Args:
        read: how the whole axes are read.
        found: the places, over axes of the weights.
        names: axis of the weights -> axis of the result that runs along it.
        same: summed axis of the weights -> that of the operand; empty where they are one array.
    """
    if found is None or read.view is None:
        return [read]
    out = []
    for place in found:
        view = list(read.view)
        for d, entry in place.items():
            view[same.get(d, d)] = _renamed(entry, names)
        out.append(read._replace(view=tuple(view)))
    return out


def _renamed(entry: Entry, names: dict[int, int]) -> Entry:
    """An entry whose axes have other names."""
    if isinstance(entry, Along):
        return entry._replace(axis=names.get(entry.axis, entry.axis))
    return table([names.get(a, a) for a in entry.axes], entry.array()) if isinstance(entry, Table) else entry


def masked(maps: Maps, known: Known | None, extent: Shape) -> Maps:
    """Maps without the elements that are zero, where coordinates along different axes meet, as in J_ij z_i z_j."""
    if known is None or len({frozenset(a for e in m for a in used(e)) for m in maps}) < 2:
        return maps
    return frozenset(_masked(m, known.entry, extent) for m in maps)


def _masked(m: AxisMap, mask: Entry, extent: Shape) -> AxisMap:
    """Where the mask is false, the first axis that can say so reads nothing."""
    for k, entry in enumerate(m):
        axes = sorted({*used(entry), *used(mask)})
        if isinstance(entry, All) or math.prod(extent[a] for a in axes) > LIMIT:
            continue
        index = np.where(values(mask, axes, extent) != 0, values(entry, axes, extent), NOWHERE)
        return (*m[:k], table(axes, index), *m[k + 1 :])
    return m
