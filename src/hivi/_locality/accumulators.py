"""Turn sums that a scan gathers in its carry into stacked outputs, so that every step's term can be told apart.

`carry + term(x_t)`, where nothing else reads that part of the carry, is `init + sum_t term(x_t)`: the final sum can
then be peeled, and the terms are a factor with an axis over the steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from hivi import _jaxprs

_LARGEST = 1 << 22  # most elements of the terms of all steps, which now exist at once


class _Sum(NamedTuple):
    """A part of the carry that only sums: its number, and what each step adds (variable, sign)."""

    carry: int
    parts: tuple[tuple[Any, int], ...]


def unfold(jaxpr: jex.Jaxpr) -> tuple[jex.Jaxpr, list[Any]]:
    """Rewrite the sums of all scans.

    Args:
        jaxpr: an inlined open jaxpr.

    Returns:
        A program with new constants as its first inputs, and these constants.
    """
    if not any(e.primitive.name == "scan" and _changes(e) for e in jaxpr.eqns):
        return jaxpr, []
    inputs: list[Any] = list(jaxpr.invars)
    found, consts, _ = _jaxprs.trace(lambda *args: _run(jaxpr, args), *(v.aval for v in inputs))
    return _jaxprs.inline(found), consts


def _changes(eqn: jex.JaxprEqn) -> bool:
    """Whether it or an inner scan has sums."""
    body = _body(eqn)
    return bool(_sums(body, eqn)) or any(e.primitive.name == "scan" and _changes(e) for e in body.eqns)


def _body(eqn: jex.JaxprEqn) -> jex.Jaxpr:
    """The inlined body of a scan; its constants are its first inputs."""
    return _jaxprs.inline(_jaxprs.lift(eqn.params["jaxpr"].jaxpr))


def _run(jaxpr: jex.Jaxpr, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        again = eqn.primitive.name == "scan" and _changes(eqn)
        env.update(zip(eqn.outvars, (_scan if again else _jaxprs.evaluate_equation)(eqn, operands), strict=True))
    return [jnp.asarray(read(v)) for v in jaxpr.outvars]


def _scan(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    params = eqn.params
    body, more = unfold(_body(eqn))
    captured = [*more, *params["jaxpr"].consts]
    sums = _sums(body, eqn)
    consts, count = params["num_consts"], params["num_carry"]
    init, xs = operands[consts : consts + count], list(operands[consts + count :])
    summed = [s.carry for s in sums]
    kept = [k for k in range(count) if k not in summed]
    extra = [v for s in sums for v, _ in s.parts]
    # What is summed is not read by the terms: without the additions, nothing reads it.
    small = _jaxprs.rebuild(body, outvars=[*(body.outvars[k] for k in kept), *body.outvars[count:], *extra])
    small = _jaxprs.trimmed(small)

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        full = list(init)
        for k, value in zip(kept, carry, strict=True):
            full[k] = value
        outs = _jaxprs.evaluate(small, [*captured, *operands[:consts], *full, *x])
        return outs[: len(kept)], outs[len(kept) :]

    last, stacked = lax.scan(
        step, [init[k] for k in kept], xs, params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    final = dict(zip(kept, last, strict=True))
    terms = iter(stacked[len(stacked) - len(extra) :])
    for s in sums:
        final[s.carry] = init[s.carry]
        for _, sign in s.parts:
            total = jnp.sum(next(terms), 0 if np.ndim(init[s.carry]) else None)
            final[s.carry] = final[s.carry] + total if sign > 0 else final[s.carry] - total
    return [*(final[k] for k in range(count)), *stacked[: len(stacked) - len(extra)]]


def _sums(body: jex.Jaxpr, eqn: jex.JaxprEqn) -> list[_Sum]:
    """Parts of the carry of a scan that only sum."""
    captured = len(body.invars) - len(eqn.invars)
    first = captured + eqn.params["num_consts"]
    producer = {v: e for e in body.eqns for v in e.outvars}
    uses = Counter(v for e in body.eqns for v in e.invars if not isinstance(v, jex.Literal))
    uses.update(v for v in body.outvars if not isinstance(v, jex.Literal))
    found = []
    for k in range(eqn.params["num_carry"]):
        start: Any = body.invars[first + k]
        if start.aval.size * eqn.params["length"] > _LARGEST:
            continue
        parts = _parts(body.outvars[k], start, producer, uses, _LARGEST / max(eqn.params["length"], 1))
        if parts:
            found.append(_Sum(k, tuple(parts)))
    return found


def _parts(
    out: Any, start: Any, producer: dict[Any, jex.JaxprEqn], uses: Counter[Any], largest: float
) -> list[tuple[Any, int]] | None:
    """What is added to `start` to get `out`; None where that is not all that happens to it."""
    if not jnp.issubdtype(start.aval.dtype, jnp.floating):
        return None  # counters
    path = _path(out, start, producer)
    if path is None or any(uses[v] != 1 for v in path):
        return None
    parts: list[tuple[Any, int]] = []
    for below, above in zip(path[1:], path[:-1], strict=True):
        eqn = producer[above]
        if _same(eqn):
            continue
        left, right = eqn.invars
        other: Any = right if left is below else left
        if eqn.primitive.name == "sub" and right is below:
            return None
        if (
            isinstance(other, jex.Literal)
            or other.aval.shape != start.aval.shape
            or other.aval.dtype != start.aval.dtype
        ):
            return None
        if not start.aval.shape:
            other = _summed(other, producer, largest)
        parts.append((other, -1 if eqn.primitive.name == "sub" else 1))
    return parts


def _summed(v: Any, producer: dict[Any, jex.JaxprEqn], largest: float) -> Any:
    """The array whose total a scalar is."""
    eqn: Any = producer.get(v)
    if eqn is None or eqn.primitive.name != "reduce_sum" or eqn.invars[0].aval.size > largest:
        return v
    return _summed(eqn.invars[0], producer, largest)


def _same(eqn: jex.JaxprEqn) -> bool:
    """Whether it converts to the type that is there, as JAX does to a carry that starts at a Python number."""
    if eqn.primitive.name != "convert_element_type":
        return False
    before: Any = eqn.invars[0].aval
    return before.dtype == eqn.params["new_dtype"]


def _path(out: Any, start: Any, producer: dict[Any, jex.JaxprEqn]) -> list[Any] | None:
    """Variables from `out` down to `start` through sums alone."""
    stack, seen = [[out]], {out}
    while stack:
        path = stack.pop()
        if path[-1] is start:
            return path
        eqn = None if isinstance(path[-1], jex.Literal) else producer.get(path[-1])
        if eqn is not None and (eqn.primitive.name in ("add", "add_any", "sub") or _same(eqn)):
            for v in eqn.invars:
                if not isinstance(v, jex.Literal) and v not in seen:
                    seen.add(v)
                    stack.append([*path, v])
    return None
