"""The few places where hivi touches JAX's intermediate representation, isolated because JAX changes it.

Everything here works on *open* jaxprs (`jax.extend.core.Jaxpr`): constants are explicit inputs, so that
data captured by a model's closure stays an argument of the compiled step instead of being baked into it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval

CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
"""Primitives that only call their inner jaxpr, and may be inlined (a checkpoint then saves no memory)."""
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
INDICES = {
    **dict.fromkeys(
        ("gather", "scatter", *(f"scatter-{op}" for op in ("add", "sub", "mul", "min", "max"))), slice(1, 2)
    ),
    **dict.fromkeys(("select_n", "cond"), slice(0, 1)),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
}
"""Primitive -> which of its operands are integers whatever the others are."""


def trace(fn: Callable[..., Any], *args: Any) -> tuple[jex.Jaxpr, list[Any], Any]:
    """Trace `fn(*args)`; return the open jaxpr (constants first, also its calls'), the constants, and the output shapes."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    held: list[tuple[Any, Any]] = []
    flat = inline(closed.jaxpr, held)
    jaxpr = lift(rebuild(flat, constvars=[*(v for v, _ in held), *flat.constvars]))
    return jaxpr, [*(value for _, value in held), *closed.consts], out


def lift(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """Turn the constants of a jaxpr into its first inputs."""
    return rebuild(jaxpr, invars=[*jaxpr.constvars, *jaxpr.invars], constvars=[])


def rebuild(jaxpr: jex.Jaxpr, **changes: Any) -> jex.Jaxpr:
    """Copy a jaxpr with some parts replaced; names of arguments and results are dropped with them."""
    info = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return jaxpr.replace(debug_info=info, **changes)


def inline(jaxpr: jex.Jaxpr, held: list[tuple[Any, Any]] | None = None) -> jex.Jaxpr:
    """Inline jits, checkpoints and nested calls; keep custom derivatives, loops and branches as they are.

    Calls that hold constants of their own stay calls, unless there is a list `held` for pairs (new variable, constant).
    """
    eqns: list[jex.JaxprEqn] = []
    outs = _inline_into(jaxpr, list(jaxpr.invars), {}, eqns, held)
    return rebuild(jaxpr, eqns=eqns, outvars=outs)


def _inline_into(
    jaxpr: jex.Jaxpr,
    args: list[Any],
    env: dict[Any, Any],
    out: list[jex.JaxprEqn],
    held: list[tuple[Any, Any]] | None = None,
) -> list[Any]:
    """Append the equations of `jaxpr` called on `args` to `out`, with fresh variables; return its results."""
    env = dict(env)
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom if isinstance(atom, jex.Literal) else env.get(atom, atom)

    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name in CALLS:
            inner: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            body, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
            if held is not None or not body.constvars:
                own = {v: jex.Var(v.aval) for v in body.constvars}
                if held is not None:
                    held += zip(own.values(), consts, strict=True)
                results = _inline_into(body, operands, own, out, held)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
        # Fresh output variables: the same inner jaxpr object may be called twice.
        fresh = [v if isinstance(v, jex.DropVar) else jex.Var(v.aval) for v in eqn.outvars]
        env.update((old, new) for old, new in zip(eqn.outvars, fresh, strict=True) if old is not new)
        out.append(eqn.replace(invars=operands, outvars=fresh))
    return [read(v) for v in jaxpr.outvars]


def prune(jaxpr: jex.Jaxpr, keep: Sequence[bool]) -> tuple[jex.Jaxpr, list[bool]]:
    """Drop outputs and all that only they need; return the smaller jaxpr and which inputs it still uses."""
    named = rebuild(jaxpr)
    return partial_eval.dce_jaxpr(named, list(keep))


def trimmed(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """Drop all that no output needs; the inputs stay."""
    small, used = prune(jaxpr, [True] * len(jaxpr.outvars))
    rest = iter(small.invars)
    return rebuild(small, invars=[next(rest) if u else v for v, u in zip(jaxpr.invars, used, strict=True)])


def evaluate(jaxpr: jex.Jaxpr, args: Sequence[Any]) -> list[Any]:
    """Run an open jaxpr on concrete or traced values; on reals in place of integers, arithmetic is carried on between them.

    Raises:
        TypeError, ValueError: what takes integers alone (a look-up) is given reals.
    """
    real = any(_is_real(x, v) for v, x in zip(jaxpr.invars, args, strict=True))
    # Results that are literals of the program come back as numbers or NumPy arrays.
    results = _between(jaxpr, args) if real else jax.core.eval_jaxpr(jaxpr, [], *args)
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in results]


def _is_real(x: Any, v: Any) -> bool:
    """Whether a value is real where the program has an integer."""
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.issubdtype(_dtype(v), jnp.integer))


def _dtype(v: Any) -> Any:
    return v.aval.dtype


def _between(jaxpr: jex.Jaxpr, args: Sequence[Any]) -> list[Any]:
    """`evaluate` on reals. Comparisons see the nearest integers (a support is checked at the values themselves)."""
    known: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else known[v]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _on_reals(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _on_reals(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """One equation of `_between`."""
    pairs = list(zip(eqn.invars, operands, strict=True))
    real = [x for v, x in pairs if _is_real(x, v)]
    if not real:
        return evaluate_equation(eqn, operands)
    if eqn.primitive.name in COMPARISONS:
        whole = [jnp.round(x).astype(_dtype(v)) if _is_real(x, v) else x for v, x in pairs]
        return evaluate_equation(eqn, whole)
    wide, params = jnp.result_type(*real), dict(eqn.params)
    kept = INDICES.get(eqn.primitive.name, slice(0, 0)).indices(len(operands))
    moved = set(range(len(operands))) - set(range(*kept))
    integer = [jnp.issubdtype(jnp.result_type(x), jnp.integer) for x in operands]
    operands = [jnp.asarray(x, wide) if k in moved and integer[k] else x for k, x in enumerate(operands)]
    if eqn.primitive.name == "convert_element_type" and jnp.issubdtype(params["new_dtype"], jnp.integer):
        return list(operands)  # integers of another width
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = wide
    return evaluate_equation(eqn.replace(params=params), operands)


def evaluate_equation(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Results of one equation, on operands of any shapes that its primitive takes."""
    binders: list[Any] = [jex.Var(v.aval) for v in eqn.invars]
    outs: list[Any] = [jex.Var(v.aval) for v in eqn.outvars]
    inner = eqn.replace(invars=binders, outvars=outs)
    alone = rebuild(_nothing(), invars=binders, outvars=outs, eqns=[inner], effects=eqn.effects)
    results = jax.core.eval_jaxpr(alone, [], *operands)
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in results]


@functools.cache
def _nothing() -> jex.Jaxpr:
    """The empty program."""
    return jax.make_jaxpr(lambda: ())().jaxpr


def fingerprint(jaxpr: jex.Jaxpr) -> str:
    """Text equal for equal programs: jaxprs compare by identity, so compilation caches need this.

    Constants of inner jaxprs are not arguments and print as shapes only, so their bytes are added.
    """
    digest = hashlib.sha256()
    for value in _inner_constants(jaxpr):
        digest.update(np.asarray(value).tobytes())
    return f"{jaxpr}\n{digest.hexdigest()}"


def _inner_constants(jaxpr: jex.Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        param: Any
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(param, "consts"):
                yield from param.consts
            if hasattr(param, "eqns"):
                yield from _inner_constants(getattr(param, "jaxpr", param))
