"""Roll up long Python loops: terms of one structure become one array of terms.

`sum(f(z[i], z[i + 1], c[i]) for i in range(10_000))` traces to ten thousand little programs that differ only in
literals and in where they slice. One of them is kept and batched, with these numbers stacked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from hivi import _jaxprs
from hivi._locality.base import Term

_MANY = 8
"""Fewest terms that are rolled up."""


def roll(jaxpr: jex.Jaxpr, terms: Sequence[Term]) -> tuple[jex.Jaxpr, list[Any], list[Term]] | None:
    """Batch the terms that are alike.

    Args:
        jaxpr: an inlined open jaxpr.
        terms: its terms, whose variables are computed in it.

    Returns:
        A program with new constants as its first inputs, these constants, and its terms; None where no terms are alike.
    """
    if len(terms) < _MANY:
        return None
    signatures = _signatures(jaxpr)
    found: dict[Any, list[int]] = {}
    for number, t in enumerate(terms):
        alone = isinstance(t.var, jex.Literal) or t.var in jaxpr.invars
        found.setdefault(number if alone else (t.output, signatures[t.var]), []).append(number)
    if max(map(len, found.values())) < _MANY:
        return None
    groups = [[k] for members in found.values() if len(members) < _MANY for k in members]
    groups = sorted(groups + [members for members in found.values() if len(members) >= _MANY])
    return _rebuilt(jaxpr, terms, groups)


def _rebuilt(
    jaxpr: jex.Jaxpr, terms: Sequence[Term], groups: Sequence[Sequence[int]]
) -> tuple[jex.Jaxpr, list[Any], list[Term]]:
    producer = {v: e for e in jaxpr.eqns for v in e.outvars}
    rollers = [_Roller(producer) for _ in groups]
    roots = [
        None if len(members) == 1 else roller.find(tuple(terms[k].var for k in members))
        for members, roller in zip(groups, rollers, strict=True)
    ]
    single = [terms[members[0]].var for members, root in zip(groups, roots, strict=True) if root is None]
    single = [v for v in single if not isinstance(v, jex.Literal)]
    shared = list(dict.fromkeys([*single, *(v for r in rollers for v in r.shared)]))
    common = _jaxprs.rebuild(jaxpr, outvars=shared)
    weights = [np.asarray([terms[k].weight for k in members]) for members in groups]

    def flat(*args: Any) -> list[Any]:
        env = dict(zip(shared, _jaxprs.evaluate(_jaxprs.trimmed(common), args), strict=True))
        outs = []
        for members, roller, root, weight in zip(groups, rollers, roots, weights, strict=True):
            if root is None:
                var = terms[members[0]].var
                outs.append(var.val if isinstance(var, jex.Literal) else env[var])
                continue
            array, batched = roller.run(root, env)
            array = array if batched else jnp.broadcast_to(array, (len(members), *jnp.shape(array)))
            if np.ptp(weight):
                array = array * jnp.asarray(weight, array.dtype).reshape(-1, *[1] * (array.ndim - 1))
            outs.append(array)
        return outs

    rolled, consts, _ = _jaxprs.trace(flat, *(v.aval for v in jaxpr.invars))
    rolled = _jaxprs.inline(rolled)
    found = [
        Term(var, 1.0 if np.ptp(weight) else float(weight[0]), terms[members[0]].output)
        for var, members, weight in zip(rolled.outvars, groups, weights, strict=True)
    ]
    return rolled, consts, found


class _Node(NamedTuple):
    """An equation for all terms at once; its operands are nodes, shared variables, or stacked literals."""

    eqn: jex.JaxprEqn
    operands: tuple[Any, ...]
    starts: np.ndarray | None
    output: int


class _Roller:
    """Finds the nodes of one group, and runs them."""

    def __init__(self, producer: dict[Any, jex.JaxprEqn]) -> None:
        self.producer = producer
        self.shared: dict[Any, None] = {}
        self.nodes: dict[tuple[Any, ...], Any] = {}

    def find(self, atoms: tuple[Any, ...]) -> Any:
        """What stands for these atoms, one of each term, which are of one structure."""
        key = tuple(map(id, atoms))
        if key not in self.nodes:
            self.nodes[key] = self._find(atoms)
        return self.nodes[key]

    def _find(self, atoms: tuple[Any, ...]) -> Any:
        first: Any = atoms[0]
        if isinstance(first, jex.Literal):
            kind: Any = first.aval
            values = np.asarray([a.val for a in atoms], kind.dtype)
            return values[0] if np.all(values == values[0]) else values
        if all(a is first for a in atoms):
            self.shared[first] = None
            return first
        eqns = [self.producer[a] for a in atoms]
        operands = tuple(self.find(tuple(column)) for column in zip(*(e.invars for e in eqns), strict=True))
        starts = np.asarray([e.params["start_indices"] for e in eqns]) if eqns[0].primitive.name == "slice" else None
        if starts is not None and np.all(starts == starts[0]):
            starts = None
        return _Node(eqns[0], operands, starts, eqns[0].outvars.index(first))

    def run(self, root: Any, env: dict[Any, Any]) -> tuple[Any, bool]:
        """Value of a node, and whether it has an axis over the terms."""
        done: dict[int, tuple[list[Any], bool]] = {}

        def value(node: Any) -> tuple[Any, bool]:
            if isinstance(node, np.ndarray | np.generic):
                return node, np.ndim(node) > 0
            if not isinstance(node, _Node):
                return env[node], False
            if id(node) not in done:
                done[id(node)] = _apply(node, [value(operand) for operand in node.operands])
            results, batched = done[id(node)]
            return results[node.output], batched

        return value(root)


def _apply(node: _Node, operands: Sequence[tuple[Any, bool]]) -> tuple[list[Any], bool]:
    arrays, batched = [a for a, _ in operands], [b for _, b in operands]
    if node.starts is not None:
        out: Any = node.eqn.outvars[0]
        start = jnp.asarray(node.starts, jnp.int32)
        return [
            jax.vmap(lambda x, s: lax.dynamic_slice(x, s, out.aval.shape), (0 if batched[0] else None, 0))(
                arrays[0], start
            )
        ], True
    run = functools.partial(_jaxprs.evaluate_equation, node.eqn)
    if not any(batched):
        return run(arrays), False
    return jax.vmap(lambda *xs: run(xs), [0 if b else None for b in batched])(*arrays), True


def _signatures(jaxpr: jex.Jaxpr) -> dict[Any, int]:
    """Variable -> a number that is equal for variables whose programs differ in literals and places of slices only."""
    numbers: dict[Any, int] = {}
    found: dict[Any, int] = {v: numbers.setdefault(("input", v), len(numbers)) for v in jaxpr.invars}
    texts: dict[int, str] = {}
    for eqn in jaxpr.eqns:
        operands = tuple(str(v.aval) if isinstance(v, jex.Literal) else found[v] for v in eqn.invars)
        key = (eqn.primitive.name, _parameters(eqn, texts), operands)
        for k, v in enumerate(eqn.outvars):
            found[v] = numbers.setdefault((*key, k), len(numbers))
    return found


def _parameters(eqn: jex.JaxprEqn, texts: dict[int, str]) -> Any:
    """Parameters of an equation, as something that compares."""
    name, params = eqn.primitive.name, dict(eqn.params)
    if name == "slice" and params["strides"] is None:
        start, limit = params["start_indices"], params["limit_indices"]
        return tuple(b - a for a, b in zip(start, limit, strict=True))
    if name == "custom_jvp_call":
        inner = params["call_jaxpr"]
        if inner.consts:
            return id(eqn)
        return params.get("name", ""), texts.setdefault(id(inner), str(inner))
    key = tuple(sorted(params.items()))
    try:
        hash(key)
    except TypeError:
        return id(eqn)
    return key
