"""Move masks and weights inside sums, so that the sums can be peeled: `where(mask, sum(x), 0)` is `sum(where(mask, x, 0))`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hivi import _jaxprs
from hivi._locality.base import Term

_GROWTH = 1 << 24  # most elements of a weighted array


_COPIES = ("broadcast_in_dim", "convert_element_type")


class _Outside(NamedTuple):
    """A mask or weight outside of a sum: which operand is the sum, and the sum's equation."""

    operand: int
    inner: jex.JaxprEqn


def push(jaxpr: jex.Jaxpr, terms: Sequence[Term], latents: Sequence[Any]) -> tuple[jex.Jaxpr, list[Any]] | None:
    """Move the masks and weights of the terms inside their sums.

    Args:
        jaxpr: an inlined open jaxpr.
        terms: its terms.
        latents: the inputs that are latents; what depends on them is no weight.

    Returns:
        A program of the same outputs with new constants as its first inputs, and these constants; None where there is
        nothing to move.
    """
    producer = {v: e for e in jaxpr.eqns for v in e.outvars}
    outside = {}
    touched = set(latents)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jex.Literal) and v in touched for v in eqn.invars):
            touched.update(eqn.outvars)
    for t in terms:
        source = None if isinstance(t.var, jex.Literal) else producer.get(t.var)
        found = None if source is None else _outside(source, producer, touched)
        if found is not None:
            outside[t.var] = found
    if not outside:
        return None
    inputs: list[Any] = list(jaxpr.invars)
    pushed, consts, _ = _jaxprs.trace(lambda *args: _run(jaxpr, outside, args), *(v.aval for v in inputs))
    return _jaxprs.inline(pushed), consts


def _outside(eqn: jex.JaxprEqn, producer: Mapping[Any, jex.JaxprEqn], touched: set[Any]) -> _Outside | None:
    operands: Any = eqn.invars
    name = eqn.primitive.name
    sums: list[int] = []
    if name == "select_n" and len(operands) == 3 and operands[0].aval.dtype == bool:
        sums = [k for k in (1, 2) if _zero(operands[3 - k], producer)]
    elif name == "mul":
        sums = [k for k in (0, 1) if isinstance(operands[1 - k], jex.Literal) or operands[1 - k] not in touched]
    for k in sums:
        inner: Any = None if isinstance(operands[k], jex.Literal) else producer.get(operands[k])
        summed = inner is not None and inner.primitive.name == "reduce_sum" and inner.invars[0].aval.size <= _GROWTH
        if summed and all(v.aval.shape in ((), operands[k].aval.shape) for v in operands):
            return _Outside(k, inner)
    return None


def _zero(v: Any, producer: Mapping[Any, jex.JaxprEqn]) -> bool:
    while not isinstance(v, jex.Literal) and v in producer and producer[v].primitive.name in _COPIES:
        v = producer[v].invars[0]
    return isinstance(v, jex.Literal) and np.ndim(v.val) == 0 and bool(v.val == 0)


def _run(jaxpr: jex.Jaxpr, outside: Mapping[Any, _Outside], args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        how = outside.get(eqn.outvars[0])
        operands = [read(v) for v in eqn.invars]
        if how is None:
            env.update(zip(eqn.outvars, _jaxprs.evaluate_equation(eqn, operands), strict=True))
            continue
        axes = how.inner.params["axes"]
        spread = [jnp.expand_dims(x, axes) if np.ndim(x) else jnp.asarray(x) for x in operands]
        spread[how.operand] = read(how.inner.invars[0])
        weighted = spread[0] * spread[1] if eqn.primitive.name == "mul" else jnp.where(spread[0], spread[2], spread[1])
        env[eqn.outvars[0]] = jnp.sum(weighted, axes)
    return [jnp.asarray(read(v)) for v in jaxpr.outvars]
