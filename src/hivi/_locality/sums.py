"""Rewrite terms so that their sums can be peeled: what stands around a sum goes inside, and sums in disguise become sums.

- Masks and weights: `where(mask, sum(x), 0)` is `sum(where(mask, x, 0))`, and `w * sum(x)`, with w from the data or another
  latent (a precision, say), is `sum(w * x)`.
- Integers: the number of agreements `sum(z[1:] == z[:-1])` is an integer and becomes a real number afterwards; here before.
- Products of vectors: `dot(w, x)` is `sum(w * x)`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from hivi import _jaxprs
from hivi._locality.base import Term

_GROWTH = 1 << 24  # most elements of a weighted array
_COPIES = ("broadcast_in_dim", "convert_element_type")
_SPLIT = ("add", "sub", "neg")
_LINEAR = (*_SPLIT, "reduce_sum", "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "rev", "copy")
"""Primitives of integers that are those of their real values, overflow aside."""
PASSES = 64
"""How often a program is rewritten at most: each time, a weight goes one step further inside."""
_EXACT = 1 << 20
"""Integers up to here are those of single precision, also after some additions."""


class _Outside(NamedTuple):
    """A mask or weight outside of a sum: which operand is the sum, the equation that makes it, and where that has the sum."""

    operand: int
    inner: jex.JaxprEqn
    below: int = 0


class _Plan(NamedTuple):
    """What is rewritten.

    Attributes:
        outside: result of an equation -> what goes inside of which sum.
        dots: results of products of vectors.
        real: integers whose real values are wanted.
    """

    outside: dict[Any, _Outside]
    dots: set[Any]
    real: set[Any]


class _Known(NamedTuple):
    """What is known of a program's variables.

    Attributes:
        producer: the equations that make them.
        touched: the latents on which they depend.
        discrete: the latents that have signals of their own.
        sums: those to which a sum over a discrete latent is added, and that are read once: weights go inside of these alone.
    """

    producer: Mapping[Any, jex.JaxprEqn]
    touched: Mapping[Any, frozenset[Any]]
    discrete: frozenset[Any]
    sums: frozenset[Any]


def _with_sums(jaxpr: jex.Jaxpr, touched: Mapping[Any, frozenset[Any]], discrete: frozenset[Any]) -> frozenset[Any]:
    uses = Counter(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    for eqn in reversed(jaxpr.eqns):
        if any(uses[v] for v in eqn.outvars):  # what an earlier pass left is read by nothing
            uses.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
    found: set[Any] = set()
    for eqn in jaxpr.eqns:
        below = any(not isinstance(v, jex.Literal) and v in found for v in eqn.invars)
        through = below and eqn.primitive.name in (*_SPLIT, "mul", "div", "convert_element_type")
        adds = (
            _sum(eqn) and math.prod(_shape(eqn.invars[0])) > 1 and touched.get(eqn.outvars[0], frozenset()) & discrete
        )
        if (through or adds) and uses[eqn.outvars[0]] == 1:
            found.add(eqn.outvars[0])
    return frozenset(found)


def push(
    jaxpr: jex.Jaxpr, terms: Sequence[Term], latents: Sequence[Any], discrete: Sequence[Any] = ()
) -> tuple[jex.Jaxpr, list[Any]] | None:
    """Make sums of what are sums in disguise, one step.

    Args:
        jaxpr: an inlined open jaxpr.
        terms: its terms.
        latents: the inputs that are latents.
        discrete: those of them that have signals of their own: other latents may be weights of their sums.

    Returns:
        A program of the same outputs with new constants as its first inputs, and these constants; None where there is
        nothing to rewrite.
    """
    producer = {v: e for e in jaxpr.eqns for v in e.outvars}
    touched: dict[Any, frozenset[Any]] = {v: frozenset({v}) for v in latents}
    for eqn in jaxpr.eqns:
        of = [touched[v] for v in eqn.invars if not isinstance(v, jex.Literal) and v in touched]
        if of:
            touched |= dict.fromkeys(eqn.outvars, frozenset().union(*of))
    plan = _Plan({}, set(), set())
    known = _Known(producer, touched, frozenset(discrete), _with_sums(jaxpr, touched, frozenset(discrete)))
    for t in terms:
        if not isinstance(t.var, jex.Literal) and t.var in producer:
            _look(producer[t.var], known, plan)
    if not any(plan):
        return None
    inputs: list[Any] = list(jaxpr.invars)
    pushed, consts, _ = _jaxprs.trace(lambda *args: _run(jaxpr, plan, args), *(v.aval for v in inputs))
    return _jaxprs.inline(pushed), consts


def _look(eqn: jex.JaxprEqn, known: _Known, plan: _Plan) -> None:
    """Add to the plan what can be done with the equation of a term."""
    if _counts(eqn, known):
        plan.real.update(_integers(eqn, known))
    elif _vectors(eqn):
        plan.dots.add(eqn.outvars[0])
    else:
        for k in _sums(eqn, known):
            inner = _maker(eqn.invars[k], known.producer)
            if inner is not None and _counts(inner, known):
                plan.real.update(_integers(inner, known))
            elif inner is not None and (below := _fits(eqn, k, inner, known)) is not None:
                plan.outside[eqn.outvars[0]] = _Outside(k, inner, below)
                return


def _sums(eqn: jex.JaxprEqn, known: _Known) -> list[int]:
    """The operands that may be sums, because the others are masks or weights."""
    name, operands = eqn.primitive.name, eqn.invars
    if name == "select_n" and len(operands) == 3 and operands[0].aval.dtype == bool:  # type: ignore[attr-defined]
        return [k for k in (1, 2) if _zero(operands[3 - k], known.producer)]
    if name not in ("mul", "div"):
        return []
    of = [frozenset() if isinstance(v, jex.Literal) else known.touched.get(v, frozenset()) for v in operands]
    places = (0, 1) if name == "mul" else (0,)
    # A latent weight is worth its place inside where the sum has a discrete latent that it does not have.
    return [k for k in places if not of[1 - k] or (of[k] & known.discrete and not of[k] & of[1 - k])]


def _maker(v: Any, producer: Mapping[Any, jex.JaxprEqn]) -> jex.JaxprEqn | None:
    """The equation that makes a value, whatever kind of float it was made a float of."""
    while not isinstance(v, jex.Literal) and v in producer:
        eqn = producer[v]
        source: Any = eqn.invars[0] if eqn.invars else None
        if eqn.primitive.name != "convert_element_type" or source.aval.dtype != v.aval.dtype:
            return eqn
        v = source
    return None


def _fits(eqn: jex.JaxprEqn, k: int, inner: jex.JaxprEqn, known: _Known) -> int | None:
    """Which operand of the inner equation is a sum, if what stands around operand k can go inside of it."""
    shapes = [_shape(v) for v in eqn.invars]
    if any(s not in ((), shapes[k]) for s in shapes):
        return None
    if _sum(inner):
        return 0 if math.prod(_shape(inner.invars[0])) <= _GROWTH else None
    name = inner.primitive.name
    if eqn.primitive.name == "select_n" or name not in (*_SPLIT, "mul", "div"):
        return None
    if any(_shape(v) not in ((), shapes[k]) for v in inner.invars):
        return None
    if inner.outvars[0] not in known.sums:
        return None
    found = [b for b, v in enumerate(inner.invars) if not isinstance(v, jex.Literal) and v in known.sums]
    return next((b for b in found if name != "div" or b == 0), None)


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def _sum(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name == "reduce_sum" or _vectors(eqn)


def _vectors(eqn: jex.JaxprEqn) -> bool:
    """Whether this is a product that sums over all axes but those that it has in common."""
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, _), (shared, _) = eqn.params["dimension_numbers"]
    return all(len(contracted) + len(shared) == len(_shape(v)) for v in eqn.invars)


def _zero(v: Any, producer: Mapping[Any, jex.JaxprEqn]) -> bool:
    while not isinstance(v, jex.Literal) and v in producer and producer[v].primitive.name in _COPIES:
        v = producer[v].invars[0]
    return isinstance(v, jex.Literal) and np.ndim(v.val) == 0 and bool(v.val == 0)


def _signed(v: Any) -> bool:
    return bool(np.issubdtype(v.aval.dtype, np.signedinteger))


def _counts(eqn: jex.JaxprEqn, known: _Known) -> bool:
    """Whether a sum of integers becomes a real number here."""
    if eqn.primitive.name != "convert_element_type" or not np.issubdtype(eqn.params["new_dtype"], np.floating):
        return False
    operand = eqn.invars[0]
    return not isinstance(operand, jex.Literal) and _signed(operand) and bool(_passes(operand, known))


def _passes(v: Any, known: _Known) -> list[Any]:
    """The operands of an integer whose real values make its own; empty where it is taken as it is.

    Integers of the data may be dates or keys: single precision holds their differences, but not them. They stay integers.
    """
    eqn = known.producer.get(v)
    if eqn is None or not _signed(v):
        return []
    name, operands = eqn.primitive.name, list(eqn.invars)
    if not all(abs(x.val) <= _EXACT if isinstance(x, jex.Literal) else x in known.touched for x in operands):
        return []
    if name == "mul":
        return operands if sum(isinstance(x, jex.Literal) for x in operands) == 1 else []
    if name == "convert_element_type":
        source: Any = operands[0].aval
        return operands if _signed(operands[0]) and source.dtype.itemsize <= eqn.params["new_dtype"].itemsize else []
    return operands if name in _LINEAR or _vectors(eqn) else []


def _integers(eqn: jex.JaxprEqn, known: _Known) -> set[Any]:
    """All integers below an equation whose real values are wanted."""
    found: set[Any] = {eqn.outvars[0]}
    stack = [eqn.invars[0]]
    while stack:
        v = stack.pop()
        if not isinstance(v, jex.Literal) and v not in found and _passes(v, known):
            found.add(v)
            stack.extend(_passes(v, known))
    return found


def _run(jaxpr: jex.Jaxpr, plan: _Plan, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.invars, args, strict=True))
    reals: dict[Any, Any] = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else env[v]

    def real(v: Any) -> Any:
        return (
            reals[v] if not isinstance(v, jex.Literal) and v in reals else jnp.asarray(read(v), jnp.result_type(float))
        )

    for eqn in jaxpr.eqns:
        out: Any = eqn.outvars[0]
        operands = [read(v) for v in eqn.invars]
        if out in plan.outside:
            env[out] = _inside(eqn, plan.outside[out], operands, read)
        elif out in plan.dots:
            product, axes = _summand(eqn, operands, out.aval.dtype)
            env[out] = jnp.sum(product, axes)
        elif out in plan.real:
            reals[out] = _of_reals(eqn, [real(v) for v in eqn.invars])
            # Real already, or still read as an integer elsewhere; what is not is dropped.
            env[out] = (
                reals[out].astype(out.aval.dtype) if not _signed(out) else _jaxprs.evaluate_equation(eqn, operands)[0]
            )
        else:
            env.update(zip(eqn.outvars, _jaxprs.evaluate_equation(eqn, operands), strict=True))
    return [jnp.asarray(read(v)) for v in jaxpr.outvars]


def _of_reals(eqn: jex.JaxprEqn, operands: list[Any]) -> jax.Array:
    if eqn.primitive.name == "convert_element_type":
        return operands[0]
    if _vectors(eqn):
        product, axes = _summand(eqn, operands, operands[0].dtype)
        return jnp.sum(product, axes)
    return eqn.primitive.bind(*operands, **eqn.params)


def _summand(eqn: jex.JaxprEqn, operands: Sequence[Any], dtype: Any) -> tuple[Any, tuple[int, ...]]:
    """What a sum, or a product of vectors (in numbers of this type), adds up, and over which axes."""
    if eqn.primitive.name == "reduce_sum":
        return operands[0], tuple(eqn.params["axes"])
    (left, right), (shared_left, shared_right) = eqn.params["dimension_numbers"]
    a = lax.transpose(jnp.asarray(operands[0], dtype), (*shared_left, *left))
    b = lax.transpose(jnp.asarray(operands[1], dtype), (*shared_right, *right))
    return a * b, tuple(range(len(shared_left), len(shared_left) + len(left)))


def _inside(eqn: jex.JaxprEqn, how: _Outside, operands: list[Any], read: Any) -> Any:
    """The equation with its mask or weight inside of the sum."""
    below = [read(v) for v in how.inner.invars]

    def around(x: Any, others: list[Any]) -> Any:
        """The equation with x in the sum's place."""
        others[how.operand] = x
        if eqn.primitive.name == "select_n":
            return jnp.where(others[0], others[2], others[1])
        return others[0] * others[1] if eqn.primitive.name == "mul" else others[0] / others[1]

    name = how.inner.primitive.name
    if name in _SPLIT:
        return how.inner.primitive.bind(*(around(jnp.asarray(x), list(operands)) for x in below), **how.inner.params)
    if name in ("mul", "div"):  # one weight of two
        weight = below[1 - how.below] if name == "mul" else 1 / jnp.asarray(below[1])
        return below[how.below] * around(jnp.asarray(weight), list(operands))
    inner: Any = how.inner.outvars[0]
    summand, axes = _summand(how.inner, below, inner.aval.dtype)
    spread = [jnp.expand_dims(x, axes) if np.ndim(x) else jnp.asarray(x) for x in operands]
    return jnp.sum(around(summand, spread), axes)
