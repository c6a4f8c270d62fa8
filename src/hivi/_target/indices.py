"""Indices into latents that lie outside them: JAX takes the nearest element without a word."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.lax import GatherScatterMode

from hivi import _jaxprs
from hivi._errors import TargetError, message
from hivi._target.base import Target


class _Reading(NamedTuple):
    """A place in a program where an array that depends on latents is read at indices that do not.

    Attributes:
        index: the indices.
        sites: the latents.
        shape: of the array.
        ends: pairs (column of the indices, or None where they have none; largest index that is inside).
        eqn: the equation.
    """

    index: Any
    sites: tuple[str, ...]
    shape: tuple[int, ...]
    ends: tuple[tuple[int | None, int], ...]
    eqn: jex.JaxprEqn


def check_indices(target: Target) -> None:
    """Refuse indices outside an array of latents, such as a group 3 of the groups 0, 1, 2, or groups that count from 1.

    Args:
        target: the target, with its present data; of minibatches every row is looked at.

    Raises:
        TargetError: naming the latents and the first index that is outside.
    """
    program, consts = target.factored.program, target.factored.consts
    readings = list(_readings(program.jaxpr, dict(enumerate(program.sites, len(consts)))))
    if not readings:
        return
    wanted = _jaxprs.rebuild(program.jaxpr, outvars=[r.index for r in readings])
    small, used = _jaxprs.prune(wanted, [True] * len(readings))

    def indices(rows: dict[str, Any]) -> list[Any]:
        leaves = jax.tree.leaves((target.data, rows))
        inputs = [*consts, *[None] * len(program.sites), *leaves]
        return _jaxprs.evaluate(small, [x for x, u in zip(inputs, used, strict=True) if u])

    blocks = max((math.ceil(p.size / p.batch) for p in target.plates), default=1)
    rows = {p.name: (jnp.arange(blocks * p.batch) % p.size).reshape(blocks, p.batch) for p in target.plates}
    found = jax.lax.map(indices, rows) if rows else [x[None] for x in indices({})]
    for reading, values in zip(readings, found, strict=True):
        for column, end in reading.ends:
            here = np.asarray(values if column is None else values[..., column])
            wrong = (here < 0) | (here > end)
            if wrong.any():
                block = int(np.argwhere(wrong)[0][0])
                if _matters(target, reading, {name: r[block] for name, r in rows.items()}):
                    raise TargetError(_outside(reading, int(here[wrong][0]), int(wrong.sum()), end))


def _matters(target: Target, reading: _Reading, rows: dict[str, Any]) -> bool:
    """Whether the log-density depends on what is read outside: not so behind a mask, or in the other case of a `where`."""
    program = target.factored.program
    z = [
        jnp.full(s.batch_shape, s.values.low + (s.values.count != 1) if s.discrete else 0.3, s.dtype)
        for s in sorted(target.sites, key=lambda s: s.name)
    ]
    inputs = [*target.factored.consts, *z, *jax.tree.leaves((target.data, rows))]
    outs = []
    for other in (False, True):
        env = dict(zip(program.jaxpr.invars, inputs, strict=True))
        for eqn in program.jaxpr.eqns:
            operands = [v.val if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
            results = _jaxprs.evaluate_equation(eqn, operands)
            if other and reading.eqn is eqn:
                results = [_elsewhere(eqn, operands)]
            env.update(zip(eqn.outvars, results, strict=True))
        outs.append([np.asarray(v.val if isinstance(v, jex.Literal) else env[v]) for v in program.jaxpr.outvars])
    return not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*outs, strict=True))


def _elsewhere(eqn: jex.JaxprEqn, operands: list[Any]) -> Any:
    """What is read, with something else in the places that lie outside."""
    result: Any = eqn.outvars[0].aval
    odd = jnp.nan if jnp.issubdtype(result.dtype, jnp.floating) else 1_000_003
    if eqn.primitive.name == "dynamic_slice":
        return jnp.full(result.shape, odd, result.dtype)
    changed = eqn.params | {"mode": GatherScatterMode.FILL_OR_DROP, "fill_value": odd}
    return eqn.primitive.bind(*operands, **changed)


def _readings(jaxpr: jex.Jaxpr, sites: dict[int, str]) -> Iterator[_Reading]:
    touched: dict[Any, frozenset[str]] = {jaxpr.invars[k]: frozenset({name}) for k, name in sites.items()}
    for eqn in jaxpr.eqns:
        of = [frozenset() if isinstance(v, jex.Literal) else touched.get(v, frozenset()) for v in eqn.invars]
        if of and of[0]:
            yield from _read(eqn, of)
        every = frozenset().union(*of)
        if every:
            touched |= dict.fromkeys(eqn.outvars, every)


def _read(eqn: jex.JaxprEqn, of: list[frozenset[str]]) -> Iterator[_Reading]:
    name, operand = eqn.primitive.name, eqn.invars[0]
    array: Any = operand.aval
    shape, names = tuple(array.shape), tuple(sorted(of[0]))
    if name == "gather" and eqn.params["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS and not of[1]:
        indexed, sizes = eqn.params["dimension_numbers"].start_index_map, eqn.params["slice_sizes"]
        ends = tuple((column, shape[d] - sizes[d]) for column, d in enumerate(indexed))
        yield _Reading(eqn.invars[1], names, shape, ends, eqn)
    if name == "dynamic_slice":  # a window that does not fit is moved on purpose; a single element is not
        sizes = eqn.params["slice_sizes"]
        for d, start in enumerate(eqn.invars[1:]):
            if sizes[d] == 1 and not of[d + 1] and not isinstance(start, jex.Literal):
                yield _Reading(start, names, shape, ((None, shape[d] - 1),), eqn)


def _outside(reading: _Reading, index: int, count: int, end: int) -> str:
    where = f"an index into {', '.join(repr(s) for s in reading.sites)} (an array of shape {reading.shape})"
    found = f"{index}" + (f", and {count - 1} more outside" if count > 1 else "")
    cure = (
        "correct the indices (do they count from 1?), or the size of the latent; where the last element is what you want "
        "there, as in padding, say so: a.at[index].get(mode='clip')"
    )
    return message(where, found, f"0 to {end}", cure)
