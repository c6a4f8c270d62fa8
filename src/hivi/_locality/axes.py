"""The axis-map interpreter: which coordinates of each latent can an element of an array depend on?

It walks a jaxpr once and follows *values*, not derivatives: comparisons, indices and the predicates
of branches count, because latents may be discrete. What it does not know makes an array depend on
everything that went in, with a `Loss` that says where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from hivi._locality import zeros
from hivi._locality.base import (
    ALL,
    CAP,
    LOOPS,
    All,
    Along,
    Arr,
    AxisMap,
    Const,
    Known,
    Loss,
    Maps,
    Params,
    Read,
    Rule,
    Scope,
    Shape,
    Unsupported,
    compose,
    identity,
    total,
    used,
)
from hivi._locality.indexing import INDEXING, copies
from hivi._locality.integers import FOLDED, along, fit, fit_columns, fold, side_by_side
from hivi._locality.loops import CONTROL
from hivi._locality.merging import join, merge, merge_reads, reachable
from hivi._locality.rules import BASIC, VIEWS, spread

RULES: dict[str, Rule] = {**BASIC, **INDEXING}
"""Rule of each primitive by name; one that is not here makes its outputs depend on all of its inputs."""

_CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat2", "remat", "checkpoint", "composite"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_closed_call", "call", "core_call"), "call_jaxpr"),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
    "custom_vmap_call": "call",
}


def scopes(
    jaxpr: Any,
    seeds: Sequence[str | None],
    consts: Sequence[Any] | None = None,
    inputs: Sequence[Any] | None = None,
) -> tuple[list[Scope], list[Loss]]:
    """Find which latent coordinates each element of each output can depend on.

    Args:
        jaxpr: an open jaxpr.
        seeds: for each input variable, the name of the latent that it is, or None.
        consts: values of the constant variables. Integer arrays among them keep indexing exact, and zeros say what
            products skip; the answer then holds for these values only.
        inputs: in the same way, values of the input variables that are not latents; None where not known.

    Returns:
        One scope per output variable, and the places where locality was given up.
    """
    sizes = {site: tuple(v.aval.shape) for site, v in zip(seeds, jaxpr.invars, strict=True) if site is not None}
    interpreter = _Interpreter(sizes, trusting=consts is not None)
    try:
        constants = interpreter.constants(jaxpr, consts)
        args = [
            _literal(_shape(v), x) if site is None else Arr(_shape(v), {site: identity(len(sizes[site]))}, finite=True)
            for v, site, x in zip(jaxpr.invars, seeds, inputs or [None] * len(seeds), strict=True)
        ]
        outs = interpreter.run(jaxpr, constants, args)
    except _MutableArrays:
        everything = {site: total(len(size)) for site, size in sizes.items()}
        losses = [Loss(site, "ref", "mutable arrays are not followed") for site in sizes]
        return [everything for _ in jaxpr.outvars], losses
    return [reachable(out.scope, out.shape, sizes) for out in outs], list(interpreter.losses)


class _MutableArrays(Exception):
    """A Ref can be written through any of its uses: dependencies no longer follow the variables."""


def _shape(variable: Any) -> Shape:
    if "Ref" in type(variable.aval).__name__:
        raise _MutableArrays
    return tuple(getattr(variable.aval, "shape", ()))


def _literal(shape: Shape, value: Any) -> Arr:
    """A constant, with its integers where they are affine, or each of its columns is."""
    known = fit(value)
    short = known is None and shape and 1 < shape[-1] <= CAP
    return Arr(shape, {}, known, fit_columns(value) if short else None, zeros.pattern(value) if known is None else None)


class _Interpreter:
    """Walks jaxprs, and knows the lengths of the `loops` around, innermost first.

    The steps of loops are the axes -1, -2, ... from the outermost on, so that `shape + loops` has the size of every axis.

    Only if `trusting` may the values of constant arrays shape the answer.
    """

    def __init__(self, sizes: dict[str, Shape], trusting: bool) -> None:
        self.sizes = sizes
        self.trusting = trusting
        self.losses: dict[Loss, None] = {}
        self.loops: Shape = ()

    def run(self, jaxpr: Any, consts: Sequence[Arr], args: Sequence[Arr]) -> list[Arr]:
        """Interpret an open jaxpr."""
        env: dict[Any, Arr] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> Arr:
            if not isinstance(v, Literal):
                return env[v]
            shape = _shape(v)
            return _literal(shape, v.val if self.trusting or not shape else None)

        for eqn in jaxpr.eqns:
            shapes = [_shape(v) for v in eqn.outvars]
            outs = self._equation(eqn, [read(v) for v in eqn.invars], shapes)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, args: list[Arr], shapes: list[Shape]) -> list[Arr]:
        name = eqn.primitive.name
        try:
            if name in _CALLS:
                return self.call(eqn.params[_CALLS[name]], args)
            control = CONTROL.get(name)
            if control is not None:
                return control(self, eqn.params, args)
            if name not in RULES and any(arg.scope for arg in args):
                return self._unknown(name, args, shapes, "no rule for this primitive")
            return self._primitive(name, eqn, args, shapes)
        except (LookupError, AttributeError, ValueError, Unsupported):  # say, a parameter renamed by a later JAX
            return self._unknown(name, args, shapes, "its rule does not cover this use")

    def _unknown(self, name: str, args: Sequence[Arr], shapes: Sequence[Shape], reason: str) -> list[Arr]:
        """Outputs that depend on everything that their operands depend on."""
        scope: Scope = {}
        for arg in args:
            for site, maps in arg.scope.items():
                scope[site] = total(len(self.sizes[site]))
                if shapes and maps != scope[site]:
                    self.losses[Loss(site, name, reason)] = None
        return [Arr(shape, scope) for shape in shapes]

    def _primitive(self, name: str, eqn: Any, args: list[Arr], shapes: list[Shape]) -> list[Arr]:
        if name == "iota":
            return [self._iota(eqn.params, shapes[0])]
        touched = any(arg.scope for arg in args)
        told = args[0].known is not None or args[0].support is not None if args else False
        viewed = told and (name in VIEWS or (name == "gather" and copies(eqn.params, args)))
        params = {**eqn.params, LOOPS: self.loops}
        reads = RULES[name](params, args, shapes) if touched or viewed else [[]] * len(shapes)
        if touched and name in ("reduce_sum", "dot_general"):
            reads = [zeros.summed(mine, name, params, args) for mine in reads]
        outs = []
        for v, shape, mine in zip(eqn.outvars, shapes, reads, strict=True):
            known, columns = None, None
            dtype = getattr(v.aval, "dtype", None)
            if isinstance(dtype, np.dtype) and dtype.kind in "iub":
                extent = shape + self.loops
                known = (
                    _seen(args[0].known, mine, args[0].shape, extent)
                    if viewed
                    else _folded(name, args, shape, dtype, extent)
                )
                columns = side_by_side(name, eqn.params, args, shape)
            scope, support = self.scope(name, mine, args, shape) if touched else {}, None
            if viewed and mine and args[0].support is not None:
                support = _seen(args[0].support, mine, args[0].shape, shape + self.loops)
            elif known is None:
                real = isinstance(dtype, np.dtype) and dtype.kind == "f"
                support = zeros.carried(name, params, args, shape, real)
            if name in ("mul", "and", "select_n"):
                scope = {site: zeros.masked(m, support, shape + self.loops) for site, m in scope.items()}
            finite = touched and zeros.stays_finite(name, params, args)
            outs.append(Arr(shape, scope, known, columns, support, finite))
        return outs

    def _iota(self, params: Params, shape: Shape) -> Arr:
        axis, dtype = params["dimension"], params["dtype"]
        integer = isinstance(dtype, np.dtype) and dtype.kind in "iu"
        fits = integer and 0 < shape[axis] <= np.iinfo(dtype).max
        return Arr(shape, {}, along(axis, 0, 1, shape[axis]) if fits else None)

    def scope(self, name: str, reads: Sequence[Read], args: Sequence[Arr], shape: Shape) -> Scope:
        """Scope of an output of this shape that reads its operands so."""
        reads = [r for r in reads if args[r.operand].scope]
        if len(reads) == 1 and reads[0].view is None and reads[0].place is None:
            return args[reads[0].operand].scope
        found: dict[str, list[tuple[AxisMap, tuple[int, Const | Along] | None]]] = {}
        extent = shape + self.loops
        for read in reads:
            own = args[read.operand].shape
            view = _tight(read.view, own)
            for site, maps in args[read.operand].scope.items():
                for m in maps:
                    if view is None:
                        found.setdefault(site, []).append((m, read.place))
                        continue
                    views, reason = _one_by_one(m, view, own, self.sizes[site])
                    for v in views:
                        new = tuple(compose(e, v, extent) for e in m)
                        if (reason or read.reason) and new.count(ALL) > m.count(ALL):
                            self.losses[Loss(site, name, read.reason or reason)] = None
                        found.setdefault(site, []).append((new, read.place))
        return self._noted(name, {site: merge_reads(f, extent, self.sizes[site]) for site, f in found.items()})

    def merged(self, name: str, found: dict[str, set[AxisMap]], shape: Shape) -> Scope:
        """Scope of an array of this shape, from maps that may overlap."""
        return self._noted(
            name, {site: merge(maps, shape + self.loops, self.sizes[site]) for site, maps in found.items()}
        )

    def _noted(self, name: str, results: dict[str, tuple[Maps, str]]) -> Scope:
        for site, (_, reason) in results.items():
            if reason:
                self.losses[Loss(site, name, reason)] = None
        return {site: maps for site, (maps, _) in results.items() if maps}

    def call(self, jaxpr: Any, args: Sequence[Arr]) -> list[Arr]:
        """Interpret a nested jaxpr."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        values = list(getattr(jaxpr, "consts", ())) if self.trusting else []
        if len(inner.invars) != len(args):
            raise Unsupported
        return self.run(inner, self.constants(inner, values or None), args)

    def constants(self, jaxpr: Any, values: Sequence[Any] | None) -> list[Arr]:
        """Constant variables of a jaxpr; without values, only their shapes are known."""
        values = [None] * len(jaxpr.constvars) if values is None else values
        return [_literal(_shape(v), c) for v, c in zip(jaxpr.constvars, values, strict=True)]

    def widened(self, name: str, old: Scope, new: Scope) -> Scope:
        """A scope that covers both, by one map for each site that grew."""
        scope = dict(old)
        for site, maps in new.items():
            if not maps <= old.get(site, frozenset()):
                scope[site] = frozenset({join([*maps, *old.get(site, ())])})
                self.losses[Loss(site, name, "accumulates over steps")] = None
        return scope


def _one_by_one(m: AxisMap, view: AxisMap, shape: Shape, sizes: Shape) -> tuple[list[AxisMap], str]:
    """Views that together read what `view` reads of an array of this shape, and what is lost by it (or "").

    Where an element reads a whole axis of an array, as a sum does, and this holds a few places of a latent axis only (a slice,
    a split or gathered axis), it reads these places one by one.
    """
    among: set[int] = set()
    for e, size in zip(m, sizes, strict=True):
        over = [a for a in used(e) if a >= 0 and isinstance(view[a], All)]
        count = math.prod(shape[a] for a in over)
        among.update(over if count < size and (2 * count <= size or len(over) < len(used(e))) else ())
    if not among:
        return [view], ""
    if math.prod(shape[a] for a in among) > CAP:
        return [view], f"reads more than {CAP} places of a part of an axis"
    places = itertools.product(*(range(n) if a in among else [None] for a, n in enumerate(shape)))
    return [tuple(e if k is None else Const(k) for e, k in zip(view, place, strict=True)) for place in places], ""


def _tight(view: AxisMap | None, shape: Shape) -> AxisMap | None:
    """Any index of an axis of size 1 is index 0."""
    if view is None or ALL not in view:
        return view
    return tuple(Const(0) if n == 1 and isinstance(e, All) else e for e, n in zip(view, shape, strict=True))


def _seen(known: Known | None, reads: Sequence[Read], shape: Shape, extent: Shape) -> Known | None:
    """What is known of an operand of this shape, of a view of it."""
    return known.seen(_tight(reads[0].view, shape), extent) if known is not None and reads else None


def _folded(name: str, args: Sequence[Arr], shape: Shape, dtype: np.dtype, extent: Shape) -> Known | None:
    """Known integers of an output, computed from known operands."""
    if name not in FOLDED or not any(a.known for a in args):
        return None
    return fold(name, [a.known and a.known.seen(spread(a.shape, shape), extent) for a in args], dtype, extent)
