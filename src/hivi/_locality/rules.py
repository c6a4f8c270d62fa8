"""What the primitives of JAX read: one rule per family, stated as index arithmetic.

A rule answers, for every output, which operands its elements read and at which indices: a `Read`
holds one entry per operand axis, as an axis map does for a latent. `ALL` on an axis is always a
sound answer. A rule that meets something it does not cover raises `Unsupported`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from hivi._locality.base import (
    ALL,
    CAP,
    LIMIT,
    Along,
    Arr,
    AxisMap,
    Const,
    Entry,
    Params,
    Read,
    Rule,
    Shape,
    Unsupported,
    table,
)


def spread(shape: Shape, out: Shape) -> AxisMap | None:
    """View of an elementwise operand.

    Primitives stretch an axis of size 1 along a longer output axis, with no broadcast_in_dim in
    between: every element of the output then reads index 0.
    """
    if shape == out:
        return None
    if not shape:
        return ()
    if len(shape) != len(out) or any(n not in (1, m) for n, m in zip(shape, out, strict=True)):
        raise Unsupported
    return tuple(Along(d) if n == out[d] else Const(0) for d, n in enumerate(shape))


def _straight(rank: int) -> list[Entry]:
    return [Along(d) for d in range(rank)]


def _elementwise(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    return [[Read(i, spread(a.shape, out)) for i, a in enumerate(args)] for out in outs]


def _one_to_one(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    if [a.shape for a in args] != list(outs):
        raise Unsupported
    return [[Read(i)] for i in range(len(args))]


def _view(find: Callable[[Params, Shape, Shape], Sequence[Entry]], reason: str = "") -> Rule:
    """Rule of a primitive whose output is a view of its one operand."""

    def rule(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
        if len(args) != 1:
            raise Unsupported
        return [[Read(0, tuple(find(params, args[0].shape, out)), reason)] for out in outs]

    return rule


def _broadcast_in_dim(params: Params, shape: Shape, out: Shape) -> list[Entry]:
    places = [int(d) for d in params["broadcast_dimensions"]]
    return [Along(places[d]) if n == out[places[d]] else Const(0) for d, n in enumerate(shape)]


def _transpose(params: Params, shape: Shape, out: Shape) -> list[Entry]:
    order = list(params["permutation"])
    return [Along(order.index(d)) for d in range(len(shape))]


def _squeeze(params: Params, shape: Shape, out: Shape) -> list[Entry]:
    return _without(params["dimensions"], len(shape), Const(0))


def _without(axes: Sequence[int], rank: int, entry: Entry) -> list[Entry]:
    """View whose output lacks some axes; on these, `entry`."""
    kept = itertools.count()
    return [entry if d in axes else Along(next(kept)) for d in range(rank)]


def _slice(params: Params, shape: Shape, out: Shape) -> list[Entry]:
    strides = params["strides"] or (1,) * len(shape)
    return [
        Along(d, int(start), int(stride))
        for d, (start, stride) in enumerate(zip(params["start_indices"], strides, strict=True))
    ]


def _rev(params: Params, shape: Shape, out: Shape) -> list[Entry]:
    return [Along(d, n - 1, -1) if d in params["dimensions"] else Along(d) for d, n in enumerate(shape)]


def _reshape(params: Params, shape: Shape, out: Shape) -> list[Entry]:
    """Axes that keep their size and their place among the others stay; merged and split ones are tables."""
    if params.get("dimensions") is not None:
        raise Unsupported
    view: list[Entry] = [Const(0) if n == 1 else ALL for n in shape]
    old = [d for d, n in enumerate(shape) if n != 1]
    new = [d for d, n in enumerate(out) if n != 1]
    while old and new and 0 not in shape:
        a, b = [old.pop(0)], [new.pop(0)]
        left, right = shape[a[0]], out[b[0]]
        while left != right:  # the smallest group of axes with equal products
            if left < right:
                a.append(old.pop(0))
                left *= shape[a[-1]]
            else:
                b.append(new.pop(0))
                right *= out[b[-1]]
        if len(a) == len(b) == 1:
            view[a[0]] = Along(b[0])
        elif left <= LIMIT:
            cells = np.unravel_index(np.arange(left), [shape[d] for d in a])
            for d, cell in zip(a, cells, strict=True):
                view[d] = table(b, cell.reshape([out[d] for d in b]))
    return view


def _reduce(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    axes = [int(a) for a in (params["axes"] if "axes" in params else params["dimensions"])]
    rank = len(outs[0]) + len(axes)
    view = tuple(_without(axes, rank, ALL))
    return [[Read(i, view if len(a.shape) == rank else ()) for i, a in enumerate(args)]] * len(outs)


def _mixed(axes_of: Callable[[Params, int], Sequence[int]], reason: str) -> Rule:
    """Rule of a primitive that mixes some axes and treats the others as a batch (cumsum, sort, fft)."""

    def rule(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
        rank = len(args[0].shape)
        axes = [d % rank for d in axes_of(params, rank)]
        for array in [*(a.shape for a in args), *outs]:
            if len(array) != rank or any(array[d] != args[0].shape[d] for d in range(rank) if d not in axes):
                raise Unsupported
        view = tuple(ALL if d in axes else Along(d) for d in range(rank))
        return [[Read(i, view, reason) for i in range(len(args))]] * len(outs)

    return rule


def _linalg(core: int) -> Rule:
    """Rule of matrix routines: leading axes are a batch; `core` axes of the first operand are not."""

    def rule(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
        batch = len(args[0].shape) - core
        if any(s[:batch] != args[0].shape[:batch] for s in [*(a.shape for a in args), *outs]):
            raise Unsupported
        views = [tuple(_straight(batch)) + (ALL,) * (len(a.shape) - batch) for a in args]
        return [[Read(i, view, "matrix routine") for i, view in enumerate(views)]] * len(outs)

    return rule


def _triangular_solve(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    """Each right-hand side is solved alone: columns of b, or its rows where the matrix is on the right."""
    if args[0].shape[:-2] != outs[0][:-2] or args[1].shape != outs[0]:
        raise Unsupported
    rank = len(outs[0])
    matrix, sides = _straight(rank), _straight(rank)
    matrix[-2:] = [ALL, ALL]
    sides[-2 if params["left_side"] else -1] = ALL
    return [[Read(0, tuple(matrix), "matrix routine"), Read(1, tuple(sides), "matrix routine")]]


def _dot_general(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    contract, batch = params["dimension_numbers"]
    out = itertools.count(len(batch[0]))
    reads: list[Read] = []
    for i in range(2):
        view: list[Entry] = []
        for d in range(len(args[i].shape)):
            if d in batch[i]:
                view.append(Along(list(batch[i]).index(d)))
            else:
                view.append(ALL if d in contract[i] else Along(next(out)))
        reads.append(Read(i, tuple(view)))
    return [reads]


def _convolution(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    """Every element reads the places of a window, as long as these are few."""
    numbers, image, kernel = params["dimension_numbers"], args[0].shape, args[1].shape
    if params["batch_group_count"] != 1:
        raise Unsupported
    view: list[Entry] = [ALL] * len(image)
    view[numbers.lhs_spec[0]] = Along(numbers.out_spec[0])
    sizes = [kernel[d] for d in numbers.rhs_spec[2:]]
    narrow = math.prod(sizes) <= CAP and all(n == 1 for n in params["lhs_dilation"])
    places = itertools.product(*(range(n) for n in sizes)) if narrow else [()]
    reads = []
    for place in places:
        window = list(view)
        for k, tap in enumerate(place):
            d, low, step = numbers.lhs_spec[2 + k], params["padding"][k][0], params["rhs_dilation"][k]
            window[d] = Along(numbers.out_spec[2 + k], tap * step - low, params["window_strides"][k])
        reads.append(Read(0, tuple(window), "convolution"))
    return [[*reads, Read(1, (ALL,) * len(kernel), "convolution")]]


def _concatenate(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    axis, start, reads = int(params["dimension"]), 0, []
    for i, arg in enumerate(args):
        view = _straight(len(arg.shape))
        view[axis] = Along(axis, -start)
        reads.append(Read(i, tuple(view), place=(axis, Const(start)) if arg.shape[axis] == 1 else None))
        start += arg.shape[axis]
    return [reads]


def _stack(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    axis = int(params["axis"]) % len(outs[0])
    view = tuple(Along(d + (d >= axis)) for d in range(len(outs[0]) - 1))
    return [[Read(i, view, place=(axis, Const(i))) for i in range(len(args))]]


def _unstack(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    rank = len(args[0].shape)
    axis = params["axis"] % rank
    if len(outs) != args[0].shape[axis]:
        raise Unsupported
    return [[Read(0, tuple(_without([axis], rank, Const(k))))] for k in range(len(outs))]


def _split(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    axis, start, reads = int(params["axis"]), 0, []
    for size in params["sizes"]:
        view = _straight(len(args[0].shape))
        view[axis] = Along(axis, start)
        reads.append([Read(0, tuple(view))])
        start += int(size)
    return reads


def _tile(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    shape, reps = args[0].shape, params["reps"]
    if len(reps) != len(shape):
        raise Unsupported
    view = [
        Along(d) if r == 1 else table([d], np.arange(r * n) % n)
        for d, (r, n) in enumerate(zip(reps, shape, strict=True))
    ]
    return [[Read(0, tuple(view), "tile")]]


def _pad(params: Params, args: Sequence[Arr], outs: Sequence[Shape]) -> list[list[Read]]:
    view: list[Entry] = []
    for d, (low, _, interior) in enumerate(params["padding_config"]):
        view.append(ALL if interior else Along(d, -int(low)))
    return [[Read(0, tuple(view), "interior padding"), Read(1, ())]]


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2
expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt
lt_to max min mul mulhi name ne neg nextafter not or polygamma population_count pow random_gamma_grad real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""

BASIC: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(("optimization_barrier", "device_put"), _one_to_one),
    **dict.fromkeys([f"reduce_{op}" for op in ("sum", "prod", "max", "min", "and", "or", "xor")], _reduce),
    **dict.fromkeys(("argmax", "argmin", "reduce"), _reduce),
    **dict.fromkeys(
        [f"cum{op}" for op in ("sum", "prod", "max", "min", "logsumexp")],
        _mixed(lambda params, rank: [params["axis"]], "cumulative axis"),
    ),
    "sort": _mixed(lambda params, rank: [params["dimension"]], "sorted axis"),
    "top_k": _mixed(lambda params, rank: [params["axis"]], "sorted axis"),
    "fft": _mixed(lambda params, rank: range(rank - len(params["fft_lengths"]), rank), "Fourier transform"),
    **dict.fromkeys(("cholesky", "eig", "eigh", "hessenberg", "lu", "qr", "schur", "svd"), _linalg(2)),
    **dict.fromkeys(("tridiagonal", "householder_product"), _linalg(2)),
    **dict.fromkeys(("lu_pivots_to_permutation", "tridiagonal_solve"), _linalg(1)),
    "broadcast_in_dim": _view(_broadcast_in_dim),
    "transpose": _view(_transpose),
    "squeeze": _view(_squeeze),
    "slice": _view(_slice),
    "rev": _view(_rev),
    "reshape": _view(_reshape, "merged or split axes"),
    "triangular_solve": _triangular_solve,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "tile": _tile,
    "pad": _pad,
}
_VIEWS = "broadcast_in_dim transpose squeeze slice rev reshape split unstack dynamic_slice copy copy_p"
VIEWS = frozenset(_VIEWS.split())
"""Primitives whose outputs are plain views of the first operand: they carry known integers along."""
