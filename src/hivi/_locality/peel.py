"""Peel the final sums of a log-density, so that every additive term is its own factor array."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.extend import core as jex

from hivi._locality.base import Term

_LOOP = 8  # an array of at least so many pieces is taken to be a Python loop's

_SAME_TOTAL = {"reshape", "squeeze", "expand_dims", "transpose", "copy", "rev", "reduce_sum"}


def peel(jaxpr: jex.Jaxpr) -> list[Term]:
    """Split the total of every output into terms.

    The total `sum(out)` is walked back through sums, additions, subtractions, sign changes, products with
    literals, and reshapings, all of which commute with the sum. Terms that depend on a single literal are
    kept, so that the totals are exact.

    Every variable is visited once, users before operands, when its weight is complete: the time is linear in the
    size of the program, however often a subexpression is used.

    Args:
        jaxpr: an inlined open jaxpr whose outputs are floating-point arrays.

    Returns:
        The terms in the order in which they are reached, those of one literal last; a variable that several paths
        reach appears once for every output, its weights added.
    """
    producer = {v: (position, e) for position, e in enumerate(jaxpr.eqns) for v in e.outvars}
    terms: list[Term] = []
    literals: list[Term] = []
    for number, out in enumerate(jaxpr.outvars):
        if isinstance(out, jex.Literal):
            literals.append(Term(out, 1.0, number))
            continue
        leaves, inner = _reach(out, producer)
        weights = dict.fromkeys([*leaves, *inner], 0.0) | {out: 1.0}
        for var in inner:
            for operand, weight in _parts(producer[var][1], weights[var]) or ():
                if isinstance(operand, jex.Literal):
                    literals.append(Term(operand, weight, number))
                else:
                    weights[operand] += weight
        terms += [Term(var, weights[var], number) for var in leaves]
    return terms + literals


def _reach(out: Any, producer: dict[Any, tuple[int, jex.JaxprEqn]]) -> tuple[list[Any], list[Any]]:
    """The variables below `out` that are terms, as a depth-first walk meets them, and those that split, users first."""
    leaves: list[Any] = []
    inner: list[Any] = []
    seen: set[Any] = set()
    stack = [out]
    while stack:
        var = stack.pop()
        if isinstance(var, jex.Literal) or var in seen:
            continue
        seen.add(var)
        parts = _parts(producer[var][1], 1.0) if var in producer else None
        if parts is None:
            leaves.append(var)
        else:
            inner.append(var)
            stack.extend(operand for operand, _ in reversed(parts))
    return leaves, sorted(inner, key=lambda var: producer[var][0], reverse=True)


def _parts(eqn: jex.JaxprEqn, weight: float) -> list[tuple[Any, float]] | None:
    """The operands whose weighted totals add up to the total of this equation's output, or None."""
    name = eqn.primitive.name
    operands: Any = eqn.invars
    out: Any = eqn.outvars[0]
    if name in _SAME_TOTAL:
        return [(operands[0], weight)]
    if name == "convert_element_type" and np.issubdtype(operands[0].aval.dtype, np.floating):
        return [(operands[0], weight)]
    if name == "broadcast_in_dim" and operands[0].aval.size == out.aval.size:
        return [(operands[0], weight)]
    if name == "neg":
        return [(operands[0], -weight)]
    if name in ("add", "add_any", "sub"):
        # lax broadcasts size-1 axes silently: a broadcast operand counts once per copy.
        copies = [out.aval.size // max(v.aval.size, 1) for v in operands]
        sign = -1.0 if name == "sub" else 1.0
        return [(operands[0], weight * copies[0]), (operands[1], sign * weight * copies[1])]
    if name in ("concatenate", "stack") and len(operands) >= _LOOP:
        return [(v, weight) for v in operands]
    if name in ("mul", "div"):
        return _scaled(name, operands, out, weight)
    return None


def _scaled(name: str, operands: Any, out: Any, weight: float) -> list[tuple[Any, float]] | None:
    """Products and quotients with one literal."""
    left, right = operands
    if isinstance(right, jex.Literal) and np.ndim(right.val) == 0 and left.aval.size == out.aval.size:
        factor = float(right.val)
        return [(left, weight * factor if name == "mul" else weight / factor)]
    if name == "mul" and isinstance(left, jex.Literal) and np.ndim(left.val) == 0 and right.aval.size == out.aval.size:
        return [(right, weight * float(left.val))]
    return None
