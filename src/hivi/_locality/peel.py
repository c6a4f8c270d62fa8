"""Peel the final sums of a log-density, so that every additive term is its own factor array."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jax.extend import core as jex

_SAME_TOTAL = {"reshape", "squeeze", "expand_dims", "transpose", "copy", "rev", "reduce_sum"}


class Term(NamedTuple):
    """`weight * sum(var)` is one additive part of output number `output`."""

    var: Any
    weight: float
    output: int


def peel(jaxpr: jex.Jaxpr) -> list[Term]:
    """Split the total of every output into terms.

    The total `sum(out)` is walked back through sums, additions, subtractions, sign changes, products with
    literals, and reshapings, all of which commute with the sum. Terms that depend on a single literal are
    kept, so that the totals are exact.

    Args:
        jaxpr: an inlined open jaxpr whose outputs are floating-point arrays.

    Returns:
        The terms; a variable that several paths reach appears once for every output, its weights added.
    """
    producer = {v: e for e in jaxpr.eqns for v in e.outvars}
    terms: dict[tuple[Any, int], float] = {}
    literals: list[Term] = []
    for number, out in enumerate(jaxpr.outvars):
        stack = [(out, 1.0)]
        while stack:
            var, weight = stack.pop()
            parts = None
            if not isinstance(var, jex.Literal) and var in producer:
                parts = _parts(producer[var], weight)
            if parts is not None:
                stack.extend(reversed(parts))
            elif isinstance(var, jex.Literal):
                literals.append(Term(var, weight, number))
            else:
                terms[var, number] = terms.get((var, number), 0.0) + weight
    return [Term(var, w, number) for (var, number), w in terms.items()] + literals


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
