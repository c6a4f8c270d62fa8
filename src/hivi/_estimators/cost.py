"""What a function costs: its elementary operations, counted in its jaxpr; the same on every machine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.extend import core as jex

from hivi import _jaxprs
from hivi._compile import Effort, effort_for, weighs

LOOPS = 100
"""Rounds that a loop of unknown length is taken for, roughly."""
FREE = {"broadcast_in_dim", "reshape", "squeeze", "stop_gradient", "convert_element_type", "iota", "copy", "slice"}
"""Primitives that move or name values, and compute none."""


def operations(fn: Callable[..., Any], *args: Any, roughly: bool = False) -> float:
    """Number of elementary operations of one call: an element of an array computed, a product added.

    Args:
        fn: returns arrays.
        *args: PyTrees; what is not an array in them is fixed.
        roughly: count what no result needs, too: the compiler drops it, but to find it takes time.
    """
    arrays, static = eqx.partition(args, eqx.is_array)
    closed = jax.make_jaxpr(lambda a: fn(*eqx.combine(a, static)))(arrays)
    if roughly:
        return _count(closed.jaxpr, LOOPS)
    return _count(_jaxprs.trimmed(_jaxprs.lift(_jaxprs.inline(closed.jaxpr))))


def effort_of(fn: Callable[..., Any], *args: Any, steps: int) -> Effort:
    """How well to compile `steps` calls of a function: counted once for arguments of the same kind, where it matters at all."""
    if not weighs():
        return "medium"
    arrays, static = eqx.partition(args, eqx.is_array)
    leaves, shape = jax.tree.flatten(arrays)
    fixed, form = jax.tree.flatten(static)
    key = (fn, shape, form, tuple(fixed), tuple((x.shape, str(x.dtype)) for x in leaves))
    with _lock:
        if key not in _known:
            if len(_known) >= REMEMBERED:
                _known.pop(next(iter(_known)))
            _known[key] = operations(fn, *args, roughly=True)
        return effort_for(_known[key], steps)


REMEMBERED = 256
_known: dict[Any, float] = {}
_lock = threading.Lock()


def _count(jaxpr: Any, loops: int = 1) -> float:
    return sum((_one(eqn, loops) for eqn in jaxpr.eqns), 0.0)


def _one(eqn: Any, loops: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name in FREE:
        return 0.0
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr, loops)
    if name == "cond":
        return max(_count(b.jaxpr, loops) for b in params["branches"])
    inner = [_open(v) for v in params.values() if isinstance(v, jex.Jaxpr | jex.ClosedJaxpr)]
    if inner:
        return (loops if name == "while" else 1) * sum(_count(j, loops) for j in inner)
    out = sum(math.prod(v.aval.shape) for v in eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    if name.startswith("reduce") or name in ("argmax", "argmin", "cumsum", "sort"):
        return float(sum(math.prod(v.aval.shape) for v in eqn.invars))
    return float(out)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
