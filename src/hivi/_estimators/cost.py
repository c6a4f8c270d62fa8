"""What a function costs: its elementary operations, counted in its jaxpr; the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.extend import core as jex

from hivi import _jaxprs

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
        return _count(closed.jaxpr)
    return _count(_jaxprs.trimmed(_jaxprs.lift(_jaxprs.inline(closed.jaxpr))))


def _count(jaxpr: Any) -> float:
    return sum((_one(eqn) for eqn in jaxpr.eqns), 0.0)


def _one(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name in FREE:
        return 0.0
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(b.jaxpr) for b in params["branches"])
    inner = [_open(v) for v in params.values() if isinstance(v, jex.Jaxpr | jex.ClosedJaxpr)]
    if inner:
        return sum(_count(j) for j in inner)
    out = sum(math.prod(v.aval.shape) for v in eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out * math.prod(eqn.invars[0].aval.shape[k] for k in contracted)
    if name.startswith("reduce") or name in ("argmax", "argmin", "cumsum", "sort"):
        return float(sum(math.prod(v.aval.shape) for v in eqn.invars))
    return float(out)


def _open(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr
