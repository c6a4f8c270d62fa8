"""The axis-map interpreter: exact on the idioms that matter, and sound on programs made at random.

Soundness is checked by brute force: change one coordinate of a small latent, run the program again,
and every element that changed must be reached by one of the maps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

from hivi._locality import axes, zeros
from hivi._locality.base import ALL, CAP, All, Along, Const, Loss, Read, Scope, Table, identity, table, total

VALUES = 3


def run(fn: Callable[..., Any], *args: Any, sites: Sequence[str | None] = ("z",)) -> tuple[list[Scope], list[Loss]]:
    """Scopes of `fn`; arguments beyond `sites` are data."""
    closed = jax.make_jaxpr(fn)(*args)
    seeds = [*sites, *[None] * (len(closed.jaxpr.invars) - len(sites))]
    return axes.scopes(closed.jaxpr, seeds, closed.consts)


def maps(fn: Callable[..., Any], *args: Any, sites: Sequence[str | None] = ("z",)) -> Any:
    """The maps of site z in the one output of `fn`."""
    (scope,), _ = run(fn, *args, sites=sites)
    return scope.get("z", frozenset())


# Precision

SCALAR, VECTOR, MATRIX = jnp.int32(1), jnp.zeros(6, jnp.int32), jnp.zeros((4, 5), jnp.int32)
REAL = jnp.zeros((4, 5))
A0, A1 = Along(0), Along(1)
ROW = {(A0, ALL)}
SAME1, SAME2 = {(A0,)}, {(A0, A1)}
PAIR = {(A0,), (Along(0, 1),)}


def stop_and_go(x: jax.Array) -> jax.Array:
    return jax.checkpoint(lambda y: lax.stop_gradient(jnp.sin(y)))(jax.jit(jax.nn.softplus)(x * 1.0))


PRECISE: dict[str, tuple[Callable[..., Any], jax.Array, set[Any]]] = {
    "plate": (lambda z: jnp.where(z > 1, jax.nn.relu(z * 2.0), jax.scipy.special.gammaln(z + 1.0)), MATRIX, SAME2),
    "scalar": (lambda z: z * jnp.ones(3), SCALAR, {()}),
    "calls": (stop_and_go, MATRIX, SAME2),
    "xlogy": (lambda z: jax.scipy.special.xlogy(z, z + 1.0), MATRIX, SAME2),
    "transpose": (lambda z: z.T == 1, MATRIX, {(A1, A0)}),
    "item": (lambda z: z[3], VECTOR, {(Const(3),)}),
    "last item": (lambda z: z[-1], VECTOR, {(Const(5),)}),
    "item of two": (lambda z: z[1, 2], MATRIX, {(Const(1), Const(2))}),
    "column": (lambda z: z[:, 2], MATRIX, {(A0, Const(2))}),
    "tail": (lambda z: z[1:], VECTOR, {(Along(0, 1),)}),
    "strided": (lambda z: z[1::2], VECTOR, {(Along(0, 1, 2),)}),
    "flip": (lambda z: z[::-1], VECTOR, {(Along(0, 5, -1),)}),
    "neighbours": (lambda z: z[:-1] * z[1:], VECTOR, PAIR),
    "diff": (jnp.diff, VECTOR, PAIR),
    "roll": (lambda z: jnp.roll(z, 1), VECTOR, {(Along(0, -1),), (Along(0, 5),)}),
    "roll tail": (lambda z: jnp.roll(z, 1)[1:] * z[1:], VECTOR, PAIR),
    "grid": (
        lambda z: z[1:, 1:] * z[:-1, 1:] * z[1:, :-1],
        MATRIX,
        {(Along(0, 1), Along(1, 1)), (A0, Along(1, 1)), (Along(0, 1), A1)},
    ),
    "pad": (lambda z: jnp.pad(z, ((1, 2), (0, 0))), MATRIX, {(Along(0, -1), A1)}),
    "crossed plates": (lambda z: z[:, :1] * jnp.ones((1, 3)), MATRIX, {(A0, Const(0))}),
    "size 1": (lambda z: z[2:3] + jnp.ones(4), VECTOR, {(Const(2),)}),
    "sums of split axes": (
        lambda z: z.reshape(2, 3).sum(1),
        VECTOR,
        {(Along(0, 0, 3),), (Along(0, 1, 3),), (Along(0, 2, 3),)},
    ),
    "products of split axes": (
        lambda z: z.reshape(2, 3) @ jnp.ones((3, 4)),
        VECTOR,
        {(Along(0, k, 3),) for k in range(3)},
    ),
    "sums of neighbours": (
        lambda z: z[jnp.array([[1, 2], [2, 3], [3, 4]])].sum(1),
        VECTOR,
        {(Along(0, 1),), (Along(0, 2),)},
    ),
    "sums of both halves of a split axis": (lambda z: z.reshape(2, 3).sum(), VECTOR, {(ALL,)}),
    "sum of a slice": (lambda z: z[1:4].sum(), VECTOR, {(Const(k),) for k in (1, 2, 3)}),
    "sum of every other": (lambda z: z[::2].sum() * jnp.ones(4), VECTOR, {(Const(k),) for k in (0, 2, 4)}),
    "sums of rows' heads": (lambda z: z[:, :2].sum(1), MATRIX, {(A0, Const(0)), (A0, Const(1))}),
    "sum of a corner": (
        lambda z: z[2:, 3:].sum(),
        MATRIX,
        {(Const(i), Const(j)) for i in (2, 3) for j in (3, 4)},
    ),
    "product of a slice": (lambda z: jnp.dot(z[:3], jnp.arange(3)), VECTOR, {(Const(k),) for k in (0, 1, 2)}),
    "running sum of a slice": (lambda z: jnp.cumsum(z[3:5]), VECTOR, {(Const(3),), (Const(4),)}),
    "sum of most of an axis": (lambda z: z[1:].sum(), VECTOR, {(ALL,)}),
    "two items": (lambda z: z[0] * z[4], VECTOR, {(Const(0),), (Const(4),)}),
    "sum of size 1": (lambda z: z[:, 1:2].sum(1), MATRIX, {(A0, Const(1))}),
    "row sums": (lambda z: z.sum(1), MATRIX, ROW),
    "softmax": (lambda z: z - jax.nn.logsumexp(z, -1, keepdims=True), REAL, ROW),
    "argmax": (lambda z: jnp.argmax(z, 1), MATRIX, ROW),
    "cumsum": (lambda z: jnp.cumsum(z, 1), MATRIX, ROW),
    "sort": (lambda z: jnp.sort(z, 1), MATRIX, ROW),
    "argsort": (lambda z: jnp.argsort(z, 1), MATRIX, ROW),
    "top k": (lambda z: lax.top_k(z, 2)[0], MATRIX, ROW),
    "product": (lambda z: z @ jnp.ones((5, 2), jnp.int32), MATRIX, ROW),
    "product from the left": (lambda z: jnp.ones((2, 4), jnp.int32) @ z, MATRIX, {(ALL, A1)}),
    "batched product": (lambda z: jnp.einsum("ij,ijk->ik", z, jnp.ones((4, 5, 2))), MATRIX, ROW),
    "one-hot": (lambda z: jax.nn.one_hot(z, 3) @ jnp.ones((3, 2)), VECTOR, SAME1),
    "reshape": (lambda z: z[:, None].reshape(4, 5, 1, 1)[..., 0] * 1, MATRIX, SAME2),
    "tile": (lambda z: jnp.tile(z, 2), VECTOR, {(table([0], np.arange(12) % 6),)}),
    "stack": (lambda z: jnp.stack([z[i] for i in range(6)]), VECTOR, SAME1),
    "stack of pairs": (lambda z: jnp.array([z[i] * z[i + 1] for i in range(5)]), VECTOR, PAIR),
    "stack of columns": (lambda z: jnp.stack([z[:, i] for i in range(5)], 1), MATRIX, SAME2),
    "stack of rows": (lambda z: jnp.stack([z[2], z[2] + 1]), MATRIX, {(Const(2), A1)}),
    "concatenate": (lambda z: jnp.concatenate([z[:2], z[2:] * 2]), MATRIX, SAME2),
    "matrix routine": (
        jax.vmap(lambda r: jnp.linalg.cholesky(jnp.diag(r**2 + 1.0))),
        REAL,
        ROW,
    ),
    "right-hand sides": (lambda z: jax.scipy.linalg.solve_triangular(jnp.eye(4), z), REAL, {(ALL, A1)}),
    "where": (lambda z: jnp.where(z[0] > 1, 1.0, z), VECTOR, {(ALL,)}),
    "where of another": (lambda z: jnp.where(z[0] > 1, 1.0, z[1]), VECTOR, {(Const(0),), (Const(1),)}),
}

INDEXED: dict[str, tuple[Callable[..., Any], jax.Array, set[Any]]] = {
    "arange": (lambda z: z[jnp.arange(5)], VECTOR, SAME1),
    "arange + 1": (lambda z: z[jnp.arange(5) + 1] * z[jnp.arange(5)], VECTOR, PAIR),
    "constants": (lambda z: z[np.array([0, 2, 4])], VECTOR, {(Along(0, 0, 2),)}),
    "diagonal": (lambda z: z[jnp.arange(4), jnp.arange(4) + 1], MATRIX, {(A0, Along(0, 1))}),
    "constant row": (lambda z: z[np.array([1, 1, 1])], MATRIX, {(Const(1), A1)}),
    "vmap": (lambda z: jax.vmap(lambda i: z[i] * z[i + 1])(jnp.arange(5)), VECTOR, PAIR),
    "vmap twice": (
        lambda z: jax.vmap(lambda i: jax.vmap(lambda j: z[i, j + 1])(jnp.arange(4)))(jnp.arange(4)),
        MATRIX,
        {(A0, Along(1, 1))},
    ),
    "windows": (
        lambda z: jax.vmap(lambda i: lax.dynamic_slice(z, (2 * i,), (2,)).sum())(jnp.arange(3)),
        VECTOR,
        {(Along(0, 0, 2),), (Along(0, 1, 2),)},
    ),
    "clipped windows": (
        lambda z: jax.vmap(lambda i: lax.dynamic_slice(z, (i,), (2,)))(np.array([0, 1, 5])),
        VECTOR,
        {(table([0, 1], np.array([[0, 1], [1, 2], [4, 5]])),)},
    ),
    "sum of constants": (lambda z: z[np.array([0, 1, 5])].sum(), VECTOR, {(Const(k),) for k in (0, 1, 5)}),
    "modulo": (lambda z: z[jnp.arange(5) % 6], VECTOR, SAME1),
    "table": (lambda z: jnp.arange(7.0)[z], VECTOR, SAME1),
    "pair table": (lambda z: jnp.ones((6, 6))[z[0], z[1]], VECTOR, {(Const(0),), (Const(1),)}),
    "pairs table": (lambda z: jnp.ones((6, 6))[z[:-1], z[1:]], VECTOR, PAIR),
    "rows table": (lambda z: jnp.ones((6, 6))[z[0], z[1]], MATRIX, {(Const(0), A0), (Const(1), A0)}),
    "categorical": (lambda z: jnp.ones((6, 3))[jnp.arange(6), z], VECTOR, SAME1),
    "take along": (lambda z: jnp.take_along_axis(jnp.ones((6, 3)), z[:, None], 1)[:, 0], VECTOR, SAME1),
    "taken along": (lambda z: jnp.take_along_axis(z, jnp.ones((4, 2), jnp.int32), 1), MATRIX, {(A0, Const(1))}),
    "set item": (lambda z: z.at[2].set(z[3]), VECTOR, PAIR),
    "set row": (lambda z: z.at[2].set(z[0]), MATRIX, {(A0, A1), (Along(0, -2), A1)}),
    "set range": (lambda z: z.at[jnp.arange(3)].add(z[3:]), VECTOR, {(A0,), (Along(0, 3),)}),
    "set slice": (lambda z: lax.dynamic_update_slice(z, z[3:5], (1,)), VECTOR, {(A0,), (Along(0, 2),)}),
    "set cells": (
        lambda z: jnp.zeros((4, 5)).at[jnp.arange(4), jnp.arange(4)].set(z[:, 0]),
        MATRIX,
        {(A1, Const(0))},
    ),
    "z[z]": (lambda z: z[z], VECTOR, {(ALL,)}),
    "z[z[0]]": (lambda z: z[z[0]], VECTOR, {(ALL,)}),
}


def chain(z: jax.Array) -> jax.Array:
    return lax.scan(lambda before, now: (now, before * now), z[0], z[1:])[1]


def chain_backwards(z: jax.Array) -> jax.Array:
    return lax.scan(lambda after, now: (now, after * now), z[-1], z[:-1], reverse=True)[1]


def chain_by_counter(z: jax.Array) -> jax.Array:
    return lax.scan(lambda c, _: ((c[0] + 1, z[c[0]]), z[c[0]] * c[1]), (1, z[0]), None, length=5)[1]


def chain_in_place(z: jax.Array) -> jax.Array:
    def body(i: Any, state: Any) -> Any:
        return state[0].at[i - 1].set(state[1] * z[i]), z[i]

    return lax.fori_loop(1, 6, body, (jnp.zeros(5, jnp.int32), z[0]))[0]


def nested(z: jax.Array) -> jax.Array:
    def row(above: jax.Array, here: jax.Array) -> Any:
        return here, lax.scan(lambda c, ab: (c, ab[0] * ab[1]), 0, (above, here))[1]

    return lax.scan(row, z[0], z[1:])[1]


LOOPS: dict[str, tuple[Callable[..., Any], jax.Array, set[Any]]] = {
    "map": (lambda z: lax.map(lambda r: r.sum(), z), MATRIX, ROW),
    "windows in a map": (
        lambda z: lax.map(lambda i: lax.dynamic_slice(z, (2 * i,), (2,)).sum(), jnp.arange(3)),
        VECTOR,
        {(Along(0, 0, 2),), (Along(0, 1, 2),)},
    ),
    "windows in a nest of maps": (
        lambda z: lax.map(
            lambda i: lax.map(lambda j: lax.dynamic_slice(z, (i, 2 * j), (1, 2)).sum(), jnp.arange(2)), jnp.arange(4)
        ),
        MATRIX,
        {(A0, Along(1, 0, 2)), (A0, Along(1, 1, 2))},
    ),
    "chain": (chain, VECTOR, PAIR),
    "chain backwards": (chain_backwards, VECTOR, PAIR),
    "chain by counter": (chain_by_counter, VECTOR, PAIR),
    "chain in place": (chain_in_place, VECTOR, PAIR),
    "chain by arange": (lambda z: lax.map(lambda t: z[t] * z[t + 1], jnp.arange(5)), VECTOR, PAIR),
    "second order": (
        lambda z: lax.scan(lambda c, x: ((c[1], x), c[0] * c[1] * x), (z[0], z[1]), z[2:])[1],
        VECTOR,
        PAIR | {(Along(0, 2),)},
    ),
    "last state": (lambda z: lax.scan(lambda c, x: (x, None), 0, z)[0], VECTOR, {(Const(5),)}),
    "nested": (nested, MATRIX, {(A0, A1), (Along(0, 1), A1)}),
    "no steps": (lambda z: lax.scan(lambda c, x: (x, None), z[0], z[1:1])[0], VECTOR, {(Const(0),)}),
    "one step": (lambda z: lax.scan(lambda c, x: (x, c * x), z[0], z[1:2])[1], VECTOR, {(Const(0),), (Const(1),)}),
    "accumulator": (lambda z: lax.scan(lambda c, x: (c + x, c + x), 0, z)[1], VECTOR, {(ALL,)}),
    "rows side by side": (lambda z: lax.scan(lambda c, x: (c + x, c + x), 0 * z[0], z)[1], MATRIX, {(ALL, A1)}),
    "cond": (lambda z: lax.cond(z[0] > 1, lambda: z[1] * 2, lambda: z[3]), VECTOR, {(Const(k),) for k in (0, 1, 3)}),
    "switch": (lambda z: lax.switch(1, [lambda: z[0], lambda: z[2]]), VECTOR, {(Const(2),)}),
    "while": (
        lambda z: lax.while_loop(lambda c: c[0] < z[1, 1], lambda c: (c[0] + 1, c[1] * 2), (0, z[0]))[1],
        MATRIX,
        {(Const(0), A0), (Const(1), Const(1))},
    ),
    "while, steps by data": (
        lambda z: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, z))[1],
        REAL,
        SAME2,
    ),
}


def test_a_split_axis_of_one_latent_leaves_the_others_alone():
    """What is read place by place is the latent whose axis was split, along the axes that were split."""
    x, z = jnp.zeros((6, 20)), jnp.zeros(120)

    def rows(x, z):
        y = (x * z.reshape(6, 20)).sum(1)
        return y[1:] * y[:-1]

    (scope,), losses = run(rows, x, z, sites=("x", "z"))
    assert scope["x"] == {(A0, ALL), (Along(0, 1), ALL)}
    assert {loss.site for loss in losses} == {"z"}  # more than 32 places
    (scope,), losses = run(
        lambda x, z: (x * z.reshape(4, 64)).sum(1), jnp.zeros((4, 64)), jnp.zeros(256), sites=("x", "z")
    )
    assert scope["x"] == ROW
    assert [loss.site for loss in losses] == ["z"]
    assert maps(lambda z: z.reshape(4, 2, 40).sum((1, 2)), jnp.zeros((8, 40))) == {
        (Along(0, 0, 2), ALL), (Along(0, 1, 2), ALL)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fn", "z", "expected"),
    [pytest.param(*case, id=name) for name, case in {**PRECISE, **INDEXED, **LOOPS}.items()],
)
def test_exact_maps(fn, z, expected):
    assert maps(fn, z) == expected


def test_identity_of_a_plate_of_size_one():
    assert maps(lambda z: jnp.exp(z) + 1, jnp.zeros(1)) == identity(1)


def test_index_by_data_widens_that_axis_only():
    (scope,), losses = run(lambda z, g: z[g], REAL, jnp.zeros(7, jnp.int32))
    assert scope == {"z": frozenset({(ALL, A1)})}
    assert losses == [Loss("z", "gather", "index is not known")]


def test_two_sites():
    x, z = jnp.zeros((6, 3)), VECTOR
    (scope,), _ = run(lambda x, z: x[jnp.arange(6), z], x, z, sites=("x", "z"))
    assert scope == {"x": frozenset({(A0, ALL)}), "z": frozenset({(A0,)})}
    (scope,), _ = run(lambda x, z: x[:, 1] * 2.0, x, z, sites=("x", "z"))
    assert scope == {"x": frozenset({(A0, Const(1))})}


def test_constants_are_looked_at_only_if_given():
    closed = jax.make_jaxpr(lambda z: z[np.array([0, 2, 4])])(VECTOR)
    (scope,), losses = axes.scopes(closed.jaxpr, ["z"])
    assert scope == {"z": total(1)}
    assert losses


def test_unknown_primitive_touches_everything():
    odd = Primitive("odd")
    odd.def_abstract_eval(lambda x, y: x)
    (scope,), losses = run(lambda z, w: odd.bind(z, w) * 2, MATRIX, MATRIX[0, 0], sites=("z", "w"))
    assert scope == {"z": total(2), "w": total(0)}
    assert losses == [Loss("z", "odd", "no rule for this primitive")]


def test_unknown_parameters_touch_everything(monkeypatch):
    def broken(params: Any, args: Any, outs: Any) -> Any:
        return params["not there"]

    monkeypatch.setitem(axes.RULES, "sin", broken)
    (scope,), losses = run(jnp.sin, REAL)
    assert scope == {"z": total(2)}
    assert losses == [Loss("z", "sin", "its rule does not cover this use")]


def test_mutable_arrays_touch_everything():
    def fn(z: jax.Array) -> jax.Array:
        ref = jax.new_ref(jnp.zeros(3, jnp.int32))
        ref[0] = z[0]
        return ref[...]

    (scope,), losses = run(fn, VECTOR)
    assert scope == {"z": total(1)}
    assert [loss.primitive for loss in losses] == ["ref"]


def test_the_cap_joins_and_says_so():
    assert len(maps(lambda z: sum(z[i] for i in range(CAP)), jnp.zeros(50))) == CAP
    (scope,), losses = run(lambda z: sum(z[i] for i in range(CAP + 1)), jnp.zeros(50))
    assert scope == {"z": total(1)}
    assert losses == [Loss("z", "add", f"more than {CAP} places")]
    (scope,), losses = run(lambda z: z[: CAP + 1].sum(), jnp.zeros(3 * CAP))
    assert scope == {"z": {(ALL,)}}
    assert losses == [Loss("z", "reduce_sum", f"reads more than {CAP} places of a part of an axis")]


def test_an_accumulator_is_reported():
    _, losses = run(LOOPS["accumulator"][0], VECTOR)
    assert losses
    _, losses = run(chain, VECTOR)
    assert not losses


@pytest.mark.usefixtures("fast")
def test_time_is_linear_and_sizes_do_not_matter():
    def fn(z: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sin(z[i]) * z[i + 1] for i in range(500)])

    closed = jax.make_jaxpr(fn)(jnp.zeros(100_000))
    assert len(closed.jaxpr.eqns) > 3000
    start = time.process_time()
    (scope,), _ = axes.scopes(closed.jaxpr, ["z"])
    assert time.process_time() - start < 1.0
    assert scope == {"z": frozenset(PAIR)}


# Soundness


@pytest.fixture(scope="module")
def fast() -> Iterator[None]:
    """Compile quickly, and do not check annotations at every call: the programs are many and small."""
    checks = jaxtyping.config.jaxtyping_disable
    jax.config.update("jax_disable_most_optimizations", True)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jaxtyping.config.update("jaxtyping_disable", checks)


def reach(scope: Scope, sizes: dict[str, tuple[int, ...]], shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """How many maps join each element (first axes) to each coordinate (last axes)."""
    counts = {}
    for site, size in sizes.items():
        counts[site] = np.zeros((*shape, *size), int)
        for m in scope.get(site, ()):
            hit = np.ones((*shape, *size), bool)
            where = np.indices((*shape, *size))
            for e, index in zip(m, where[len(shape) :], strict=True):
                if isinstance(e, Const):
                    hit &= index == e.index
                elif isinstance(e, Along):
                    assert 0 <= e.axis < len(shape)
                    hit &= index == e.stride * where[e.axis] + e.offset
                elif isinstance(e, Table):
                    assert all(0 <= a < len(shape) for a in e.axes)
                    hit &= index == e.array()[tuple(where[a] for a in e.axes)]
                else:
                    assert isinstance(e, All)
            counts[site] += hit
    return counts


def neighbourhoods(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], bases: int) -> tuple[Any, Any]:
    """Random values of all sites, and all their changes of one coordinate: (stacked values, what changed)."""
    points, changes = [], []
    for base in range(bases):
        at = {site: rng.integers(0, VALUES, shape) for site, shape in shapes.items()}
        points.append(at)
        changes.append((base, None, None))
        for site, shape in shapes.items():
            for where in itertools.product(*map(range, shape)):
                for step in range(1, VALUES):
                    new = at[site].copy()
                    new[where] = (new[where] + step) % VALUES
                    points.append({**at, site: new})
                    changes.append((base, site, where))
    return {site: jnp.asarray(np.stack([p[site] for p in points]), jnp.int32) for site in shapes}, changes


def violations(fn: Callable[..., Any], shapes: dict[str, tuple[int, ...]], seed: int, bases: int = 2) -> list[str]:
    """Every way in which the maps of the outputs of `fn` are wrong."""
    points, changes = neighbourhoods(np.random.default_rng(seed), shapes, bases)
    scopes, _ = run(fn, *(p[0] for p in points.values()), sites=tuple(shapes))
    outs = [np.asarray(out) for out in jax.vmap(fn)(*points.values())]
    starts = [i for i, (_, site, _) in enumerate(changes) if site is None]
    wrong = []
    for number, (out, scope) in enumerate(zip(outs, scopes, strict=True)):
        counts = reach(scope, shapes, out.shape[1:])
        wrong += [f"output {number}: {site} counted twice" for site, c in counts.items() if c.size and c.max() > 1]
        for i, (base, site, where) in enumerate(changes):
            if site is not None:
                missed = (out[i] != out[starts[base]]) & (counts[site][(..., *where)] == 0)
                wrong += [f"output {number}: {site}{where} changes it, maps {scope.get(site)}"] if missed.any() else []
    return wrong


def real(x: jax.Array) -> jax.Array:
    """Integers again, from floats; no multiple of 0.5 falls on a tie."""
    return jnp.round(x * 7.3).astype(jnp.int32)


TABLE = np.random.default_rng(0).integers(0, 9, (5, 5))
PERMUTED = np.array([2, 0, 3, 1])
EYE = np.eye(4)
R4 = np.arange(4)
HOLES = np.array([[0, 2, 0, 0], [0, 0, 0, 0], [3, 0, 0, 1], [0, 0, 5, 0]])


class Pool(NamedTuple):
    """Arrays that a random step may use: two matrices (4, 4), two vectors (4,), a scalar, a number 0..3."""

    m: jax.Array
    n: jax.Array
    v: jax.Array
    u: jax.Array
    s: jax.Array
    k: int


def triangle(p: Pool) -> jax.Array:
    return real(lax.linalg.triangular_solve(p.m + 6.0 * EYE, p.n * 1.0, left_side=p.k < 2, lower=p.k % 2 == 0))


def while_rows(p: Pool) -> jax.Array:
    return lax.while_loop(lambda c: c[0] < p.s, lambda c: (c[0] + 1, jnp.roll(c[1], 1, 0) + p.n), (0, p.m))[1]


def batched_while(p: Pool) -> Any:
    return jax.vmap(lambda a, b: lax.while_loop(lambda c: c < a, lambda c: c + b + 1, 0))(p.v, p.u)


def local_while(p: Pool) -> jax.Array:
    return lax.while_loop(lambda c: c[0] < p.k, lambda c: (c[0] + 1, c[1] * p.n + 1), (0, p.m))[1]


def in_place(p: Pool) -> jax.Array:
    return lax.fori_loop(0, 3, lambda i, c: c.at[i + 1].add(c[i] * p.n[i]), p.m)


def in_place_back(p: Pool) -> jax.Array:
    return lax.fori_loop(0, 4, lambda i, c: c.at[3 - i].set(p.v[i] + p.m[i, p.k]), p.u)


def state_machine(p: Pool) -> jax.Array:
    return lax.scan(lambda c, x: (x[c % 4] + p.s, x * c), p.u[0], p.m)[1]


def two_lags(p: Pool) -> jax.Array:
    return lax.scan(lambda c, x: ((c[1], x), c[0] + 2 * c[1] + x), (p.n[0], p.n[1]), p.m, reverse=p.k > 1)[1]


def swapping(p: Pool) -> jax.Array:
    last, trace = lax.scan(lambda c, x: ((c[1], c[0] + x), c[0]), (p.u[0], p.u[1]), p.v)
    return trace.at[p.k].set(last[p.k % 2])


def shift_register(p: Pool) -> jax.Array:
    return lax.scan(lambda c, x: (jnp.concatenate([c[1:], x[None]]), c * x), p.u, p.v)[1]


def counting_down(p: Pool) -> jax.Array:
    return lax.scan(lambda c, x: (c - 1, p.m[c] * x), 3, p.v)[1]


def odd_counter(p: Pool) -> jax.Array:
    return lax.scan(lambda c, x: ((c * 2 + 1) % 4, p.m[c] * x), p.k, p.v)[1]


def grid_loop(p: Pool) -> jax.Array:
    return lax.fori_loop(
        0, 4, lambda i, c: lax.fori_loop(0, 4, lambda j, d: d.at[i, j].set(p.m[i, j] + p.v[j]), c), p.n
    )


def nested_rows(p: Pool) -> jax.Array:
    def row(above: jax.Array, here: jax.Array) -> Any:
        return here + p.s, lax.scan(lambda c, ab: (ab[1], c + ab[0] * ab[1]), here[p.k], (above, here))[1]

    return lax.scan(row, p.n[p.k], p.m, reverse=p.k == 2)[1]


def branch(p: Pool) -> jax.Array:
    return lax.cond(p.s > 1, lambda a: a.T + p.v, lambda a: lax.cond(p.u[0] > p.k, jnp.flip, jnp.sin, a), p.m * 1.0)


def branch_of_loops(p: Pool) -> jax.Array:
    return lax.switch(p.s % 3, [lambda: p.v, lambda: lax.scan(lambda c, x: (x, c), p.s, p.u)[1], lambda: p.m[p.k]])


def segments(p: Pool) -> jax.Array:
    return jax.ops.segment_sum(p.m, p.v % 4, num_segments=4)


def associative(p: Pool) -> jax.Array:
    return lax.associative_scan(lambda a, b: a * 2 + b, p.m, axis=p.k % 2)


def windows(p: Pool) -> jax.Array:
    return lax.reduce_window(p.m, 0, lax.add, (2, 1), (1, 1), "SAME")


def custom(p: Pool) -> jax.Array:
    @jax.custom_vjp
    def double(x: jax.Array) -> jax.Array:
        return x * 2 + p.v.sum()

    double.defvjp(lambda x: (double(x), None), lambda _, g: (g,))
    return jax.checkpoint(lambda x: double(x) + p.s)(p.m)


def reduced(p: Pool) -> jax.Array:
    return lax.reduce((p.m, p.n), (0, 0), lambda a, b: (a[0] + b[0], jnp.maximum(a[1], b[1])), (p.k % 2,))[1]


SHARED = np.array([0, 2, 2, 1])
FROM, TO = np.array([0, 1, 2, 3, 1]), np.array([2, 3, 0, 1, 0])


def convolved(p: Pool) -> jax.Array:
    kernel = jnp.asarray(TABLE[None, None, :3, : 2 + p.k % 2], jnp.int32)
    strides, dilation = (1 + p.k // 2, 1), (1, 1 + p.k % 2)
    out = lax.conv_general_dilated(p.m[None, None], kernel, strides, "SAME", rhs_dilation=dilation)[0, 0]
    return jnp.concatenate([out, out])[:4]


def correlated(p: Pool) -> jax.Array:
    """Channels, a transposed layout, and a kernel that depends on the latents too."""
    image = jnp.stack([p.m, p.n], -1)[None]
    kernel = jnp.stack([p.n[:2, :2], p.m[:2, :2]], -1)[..., None]
    names = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (1, 1), ((p.k, 1), (0, 1)), dimension_numbers=names)[0, ..., 0][:4]


def by_order(p: Pool) -> jax.Array:
    order = jnp.asarray(PERMUTED)
    return lax.map(lambda t: p.m[order[t]] * p.v[order[(t + p.k) % 4]], jnp.arange(4))


def over_order(p: Pool) -> jax.Array:
    """A carry of what a constant order reads, one step late."""
    return lax.scan(lambda c, t: (p.v[t], c * p.m[t]), p.u[0], jnp.asarray(PERMUTED), reverse=p.k > 1)[1]


STEPS: dict[str, Callable[[Pool], Any]] = {
    "convolve grid": convolved,
    "convolve latents": correlated,
    "by order": by_order,
    "over order": over_order,
    "edges": lambda p: (p.v[FROM] * p.u[TO])[p.k % 2 :][:4],
    "edges of itself": lambda p: (p.v[FROM] + 2 * p.v[TO])[:4],
    "loop edges": lambda p: (p.v[SHARED] + 2 * p.v[PERMUTED])[:4],
    "gather cells by constants": lambda p: p.m[PERMUTED, SHARED] + p.m[SHARED][:, p.k],
    "gather clipped constants": lambda p: p.m.at[PERMUTED * 2 - 1].get(mode="clip"),
    "gather dropped constants": lambda p: p.m.at[PERMUTED * 2].get(mode="fill", fill_value=3),
    "gather by arithmetic": lambda p: p.v[(jnp.arange(4) * 3 + p.k) % 4] + p.u[jnp.arange(4) // 2],
    "gather by a mask": lambda p: p.v[jnp.where(jnp.asarray(PERMUTED) > 1, jnp.asarray(SHARED), p.k)],
    "gathers of gathers": lambda p: p.v[PERMUTED][SHARED] * p.v[::-1][PERMUTED],
    "scatter by constants": lambda p: p.u.at[PERMUTED].set(p.v),
    "scatter twice": lambda p: jnp.zeros(4, int).at[SHARED].add(p.v) + p.m,
    "scatter rows": lambda p: p.n.at[SHARED].add(p.m),
    "scatter cells": lambda p: p.n.at[SHARED, PERMUTED].add(p.v),
    "scatter outside": lambda p: p.u.at[PERMUTED * 2].add(p.v),
    "transposed ravel": lambda p: p.m.T.ravel().reshape(2, 8)[:, p.k : p.k + 4].sum(0),
    "long tile": lambda p: jnp.tile(p.m, (3, 2))[2:6, p.k : p.k + 4],
    "repeated rows": lambda p: jnp.repeat(p.m, 2, 0)[p.k : p.k + 4],
    "add": lambda p: p.m + p.n * (p.k + 1),
    "outer": lambda p: p.v[:, None] * p.u[None],
    "same outer": lambda p: p.v[:, None] * p.v[None] + p.s,
    "by transpose": lambda p: p.m * p.m.T,
    "broadcast": lambda p: p.m * p.v,
    "broadcast columns": lambda p: p.m + p.v[:, None],
    "crossed": lambda p: p.m[:, p.k : p.k + 1] + p.n[p.k : p.k + 1],
    "stretched": lambda p: p.m[:, p.k : p.k + 1] * TABLE[:1, :4],
    "compare": lambda p: jnp.where(p.m > p.n, p.v, -p.k),
    "scalar choice": lambda p: jnp.where(p.s > 1, p.m, p.n),
    "clip": lambda p: jnp.clip(p.m, p.s, 3),
    "sign": lambda p: jnp.sign(p.m - p.k) + p.m // 2,
    "bits": lambda p: lax.population_count(p.m) ^ (p.n << 1),
    "roots": lambda p: real(jnp.sqrt(jnp.abs(p.m * 1.0)) + lax.lgamma(jnp.abs(p.n) + 1.0)),
    "row": lambda p: p.m[p.k],
    "column": lambda p: p.m[:, p.k],
    "cell": lambda p: p.m[p.k, 3 - p.k],
    "item": lambda p: p.v[p.k],
    "sums": lambda p: p.m.sum(p.k % 2),
    "maxima": lambda p: p.m.max(p.k % 2),
    "argmin": lambda p: jnp.argmin(p.m, p.k % 2),
    "total": lambda p: p.v.sum() + (p.m + 1).prod(),
    "any": lambda p: (p.m > p.k).any(0),
    "reduced": reduced,
    "roll": lambda p: jnp.roll(p.m, p.k, p.k % 2),
    "unknown roll": lambda p: jnp.roll(p.m, p.s, 0),
    "flip": lambda p: jnp.flip(p.m, p.k % 2),
    "transpose": lambda p: p.m.T,
    "ravel": lambda p: jnp.roll(p.m.ravel(), p.k).reshape(4, 4),
    "regroup": lambda p: p.m.reshape(2, 2, 4).swapaxes(0, 1).reshape(4, 4),
    "long reshape": lambda p: p.m.reshape(1, 4, 2, 2)[0, :, 1, p.k % 2],
    "pad": lambda p: jnp.pad(p.m, ((p.k, 0), (0, 2)), constant_values=1)[:4, 2:] + p.s,
    "interior pad": lambda p: lax.pad(p.m, p.s, ((1, -1, 1), (0, 0, 0)))[:4],
    "crop": lambda p: lax.pad(p.v, p.s, ((-1, 1, 0),)),
    "concatenate": lambda p: jnp.concatenate([p.m[p.k :], p.n[: p.k]]),
    "concatenate pieces": lambda p: jnp.concatenate([p.v[:1], p.u[2:], p.s[None]]),
    "stack": lambda p: jnp.stack([p.v, p.m[p.k], p.u, p.v], p.k % 2),
    "stack items": lambda p: jnp.stack([p.v[(i * i + p.k) % 4] for i in range(4)]),
    "stack cells": lambda p: jnp.stack([p.m[i, (i + p.k) % 4] * p.m[0, i] for i in range(4)]),
    "unstack": lambda p: sum(jnp.unstack(p.m, axis=p.k % 2)[1:]),
    "split": lambda p: jnp.concatenate(jnp.split(p.m, [1, 3], axis=p.k % 2)[::-1], p.k % 2),
    "tile": lambda p: jnp.tile(p.m[:, :2], (1, 2)),
    "tile items": lambda p: jnp.tile(p.m[p.k : p.k + 1, :2], (4, 2)),
    "tile twice": lambda p: jnp.tile(p.v[:2], 5)[p.k : p.k + 4],
    "repeat": lambda p: jnp.repeat(p.v, 2)[p.k : p.k + 4],
    "triangle": lambda p: jnp.tril(p.m) + jnp.diag(p.v),
    "diagonal": lambda p: jnp.diagonal(p.m),
    "product": lambda p: p.m @ p.n,
    "with weights": lambda p: p.m @ TABLE[:4, :4],
    "rows with rows": lambda p: jnp.einsum("ij,kj->ik", p.m, p.n),
    "batched": lambda p: jnp.einsum("ij,ij->i", p.m, p.n),
    "batched columns": lambda p: jnp.einsum("ji,jki->ik", p.m, p.n[:, :, None] * p.v),
    "vector product": lambda p: p.m @ p.v,
    "one hot": lambda p: real(jax.nn.one_hot(p.v, 5) @ (TABLE * 1.0))[:, :4],
    "sort": lambda p: jnp.sort(p.m, p.k % 2),
    "argsort": lambda p: jnp.argsort(p.m, p.k % 2),
    "sort pairs": lambda p: lax.sort((p.m, p.n), dimension=p.k % 2, num_keys=1)[1],
    "top": lambda p: lax.top_k(p.m, 4)[p.k % 2],
    "cumsum": lambda p: jnp.cumsum(p.m, p.k % 2),
    "cummax": lambda p: lax.cummax(p.m, p.k % 2, reverse=p.k > 1),
    "associative": associative,
    "windows": windows,
    "convolve": lambda p: jnp.convolve(p.v, p.u[:2], "same"),
    "batch of convolutions": lambda p: lax.conv(p.m[:, None] * 1.0, p.n[:2, None, :3] * 1.0, (1,), "SAME")[:, 1],
    "softmax": lambda p: real(p.m - jax.nn.logsumexp(p.m * 1.0, p.k % 2, keepdims=True)),
    "cholesky": lambda p: real(jnp.linalg.cholesky(p.m @ p.m.T + 9 * EYE)),
    "batch of routines": lambda p: real(
        jnp.linalg.cholesky(p.m[:, :2, None] * EYE[:2, :2] + EYE[:2, :2]).sum(2) @ TABLE[:2, :4]
    ),
    "batch of eigenvalues": lambda p: real(jax.vmap(lambda r: jnp.linalg.eigh(jnp.outer(r, r) + EYE)[0])(p.m)),
    "batch of factors": lambda p: real(jnp.abs(jax.vmap(lambda r: jnp.linalg.qr(r * (R4 + EYE))[1][1])(p.m))),
    "batch of pivots": lambda p: jax.vmap(lambda r: lax.linalg.lu(r * (R4 + EYE) + 0.5)[2])(p.m),
    "batch of tridiagonals": lambda p: real(
        lax.linalg.tridiagonal_solve(p.n * 1.0, p.m + 9.0, p.n * 1.0, p.m[..., None] * 1.0)[..., 0]
    ),
    "triangular": triangle,
    "right-hand sides": lambda p: real(
        lax.linalg.triangular_solve(TABLE[:4, :4] + 9 * EYE, p.m * 9.0, left_side=p.k % 2 == 0, lower=True)
    ),
    "solve": lambda p: real(jnp.linalg.solve(p.m + 30 * EYE, p.v * 9.0)),
    "fft": lambda p: real(jnp.abs(jnp.fft.fft(p.m * 1.0))),
    "table": lambda p: jnp.asarray(TABLE)[p.m, p.k],
    "pair table": lambda p: jnp.asarray(TABLE)[p.v, p.u],
    "item table": lambda p: jnp.asarray(TABLE)[p.v[p.k], p.u[0]],
    "gather rows": lambda p: p.m[p.v % 4],
    "gather columns": lambda p: p.m[:, p.v % 4],
    "gather cells": lambda p: p.m[p.v % 4, p.u % 4],
    "gather per row": lambda p: p.m[R4, p.v % 4],
    "gather by constants": lambda p: p.m[PERMUTED],
    "gather by range": lambda p: p.m[jnp.arange(4) // (p.k + 1)],
    "gather by cells": lambda p: p.m[R4[::-1], (R4 + p.k) % 4],
    "gather stride": lambda p: p.m[:, np.array([3, 2, 1, 0])] + p.m[jnp.arange(2) * 2 + 1][:, :1].sum(),
    "gather outside": lambda p: p.m.at[jnp.arange(4) + p.k].get(mode="fill", fill_value=7),
    "gather clipped": lambda p: p.m.at[jnp.arange(4) + p.k - 1].get(mode="clip"),
    "gather of itself": lambda p: p.v[p.v % 4],
    "item of itself": lambda p: p.m[p.m[0, p.k] % 4],
    "take along": lambda p: jnp.take_along_axis(p.m, p.n % 4, p.k % 2),
    "take along constants": lambda p: jnp.take_along_axis(p.m, np.tile(PERMUTED, (4, 1)), p.k % 2),
    "vmap items": lambda p: jax.vmap(lambda i: p.m[i, 3 - i] * p.v[(i + p.k) % 4])(jnp.arange(4)),
    "vmap slices": lambda p: jax.vmap(lambda i: lax.dynamic_slice(p.v, (i + p.k,), (4,)))(jnp.arange(4)),
    "slice": lambda p: lax.dynamic_slice(p.m, (p.s, p.k), (1, 1))[0, 0] + lax.dynamic_slice(p.v, (p.k,), (2,))[1],
    "strided": lambda p: jnp.concatenate([p.m[::2, :], p.m[1::2, :]]),
    "set row": lambda p: p.m.at[p.k].set(p.v),
    "set column": lambda p: p.m.at[:, p.k].multiply(p.v),
    "set cell": lambda p: p.m.at[p.k, 1].add(p.n[0, p.k]),
    "set item": lambda p: p.v.at[p.k].set(p.v[3 - p.k]),
    "set unknown row": lambda p: p.m.at[p.s].set(p.v),
    "set unknown cells": lambda p: p.m.at[p.v, p.u].max(p.v),
    "set some": lambda p: p.m.at[jnp.arange(3) + p.k].set(p.n[:3]),
    "set cells": lambda p: p.m.at[R4, PERMUTED].set(p.v),
    "set reversed": lambda p: p.m.at[R4[::-1]].add(p.n),
    "set per row": lambda p: jax.vmap(lambda row, i, x: row.at[i].set(x))(p.m, p.v, p.u),
    "set slice": lambda p: lax.dynamic_update_slice(p.m, p.n[:2, :3], (p.k, p.k)),
    "set unknown slice": lambda p: lax.dynamic_update_slice(p.m, p.n[:2], (p.s, 0)),
    "set one": lambda p: lax.dynamic_update_slice(p.m, p.n[p.k : p.k + 1, :1], (3, p.k)),
    "segments": segments,
    "searched": lambda p: jnp.searchsorted(jnp.sort(p.v), p.u),
    "counted": lambda p: jnp.bincount(p.v, length=4),
    "scan": lambda p: lax.scan(lambda c, x: (x + c, c * x), p.v, p.m)[1],
    "state": lambda p: lax.scan(lambda c, x: (x + p.s, None), p.v, p.m, reverse=p.k > 1)[0],
    "lag": lambda p: lax.scan(lambda c, x: (x, c + x * 3), p.m[0], p.m[1:], reverse=p.k > 1)[1][p.k % 3],
    "lag from nothing": lambda p: lax.scan(lambda c, x: (x, c + x * 3), 0 * R4, p.m, reverse=p.k > 0)[1],
    "lag of all": lambda p: lax.scan(lambda c, x: (x, c + x * 3), p.n[p.k], p.m, reverse=p.k > 1)[1],
    "state machine": state_machine,
    "two lags": two_lags,
    "swapping": swapping,
    "shift register": shift_register,
    "counting down": counting_down,
    "odd counter": odd_counter,
    "nested rows": nested_rows,
    "grid loop": grid_loop,
    "map": lambda p: lax.map(lambda x: jnp.flip(x) + p.v[p.k], p.m),
    "map by number": lambda p: lax.map(lambda t: p.m[t] * p.n[(t + 1) % 4], jnp.arange(4)),
    "in place": in_place,
    "in place back": in_place_back,
    "sum by number": lambda p: lax.fori_loop(0, p.k, lambda i, c: c + p.m[i], p.v),
    "while rows": while_rows,
    "batched while": batched_while,
    "local while": local_while,
    "branch": branch,
    "branch of loops": branch_of_loops,
    "custom": custom,
    "relu": lambda p: jax.jit(jax.nn.relu)(p.m - p.k),
    "sparse product": lambda p: HOLES @ p.m,
    "sparse product, reals": lambda p: real((p.m + 0.1) @ jnp.asarray(HOLES * 0.3)),
    "sparse on both sides": lambda p: HOLES.T @ (p.m @ HOLES),
    "sparse weights of a latent": lambda p: (HOLES * p.m) @ p.n,
    "sparse sum": lambda p: jnp.sum(p.m * HOLES, p.k % 2),
    "sparse pairs": lambda p: p.v[:, None] * HOLES * p.u,
    "sparse by a choice": lambda p: jnp.where(HOLES > 2, p.m, 0) @ p.v,
    "sparse, but not there": lambda p: jnp.where(HOLES > 2, p.m, p.k) @ p.v,
    "sparse quotient": lambda p: real((p.m + 1.5) @ (HOLES / (p.n + 1.1))),
    "sparse, then not": lambda p: real((jnp.asarray(HOLES) * 0.3 + (p.k == jnp.arange(4))) @ p.m),
    "indicators": lambda p: jax.nn.one_hot(PERMUTED[p.k :], 4, dtype=jnp.int32).T @ p.m[p.k :],
    "sparse rows of a loop": lambda p: lax.scan(lambda c, row: (c, row @ p.v), 0, jnp.asarray(HOLES))[1],
    "sparse rows by number": lambda p: lax.map(lambda t: jnp.asarray(HOLES)[t] @ p.m, R4),
    "sparse batch": lambda p: jax.vmap(lambda row, x: row @ x)(jnp.asarray(HOLES), jnp.stack([p.m, p.n, p.m.T, p.n])),
    "band": lambda p: real((jnp.triu(jnp.ones((4, 4)), 2) + jnp.eye(4)) @ p.m),
}


def program(seed: int, steps: int = 5) -> tuple[Callable[..., list[jax.Array]], list[str]]:
    """A program made at random: every step may use what came before; all its arrays are outputs."""
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(list(STEPS), steps)]
    draws = [[rng.random() for _ in range(5)] + [int(rng.integers(4))] for _ in names]

    def fn(z: jax.Array, w: jax.Array) -> list[jax.Array]:
        kinds: dict[tuple[int, ...], list[jax.Array]] = {(4, 4): [z], (4,): [w], (): [z[1, 2]]}
        outs = []
        for name, (*at, k) in zip(names, draws, strict=True):
            # skewed towards the latest array of each shape
            picked = [
                kinds[shape][int(len(kinds[shape]) * a**0.5)]
                for shape, a in zip([(4, 4), (4, 4), (4,), (4,), ()], at, strict=True)
            ]
            out = jnp.asarray(STEPS[name](Pool(*picked, k)))  # pyright: ignore
            out = out.astype(jnp.int32) % 5
            kinds[out.shape].append(out)
            outs.append(out)
        return outs

    return fn, names


SITES = {"z": (4, 4), "w": (4,)}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("name", list(STEPS))
def test_every_step_is_sound(name):
    for seed in (0, 1):
        fn, _ = single(name, seed)
        assert violations(fn, SITES, seed) == []


def single(name: str, k: int) -> tuple[Callable[..., list[jax.Array]], list[str]]:
    """A program of one step on the latents themselves, with a second matrix that mixes both."""

    def fn(z: jax.Array, w: jax.Array) -> list[jax.Array]:
        pool = Pool(z, z[::-1] + w, w, z[k], z[1, 2], k)
        return [jnp.asarray(STEPS[name](pool))]

    return fn, [name]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("block", [b if b < 4 else pytest.param(b, marks=pytest.mark.slow) for b in range(10)])
def test_random_programs_are_sound(block):
    for seed in range(20 * block, 20 * (block + 1)):
        fn, names = program(seed)
        assert violations(fn, SITES, seed) == [], f"program {seed}: {names}"


def reshaped(x: jax.Array, rng: np.random.Generator) -> jax.Array:
    """Any shape with as many elements: axes merged or split, and axes of size 1 anywhere."""
    shape, left = [], x.size
    while left > 1:
        factor = int(rng.choice([d for d in range(2, left + 1) if left % d == 0]))
        shape.append(factor)
        left //= factor
    for _ in range(rng.integers(3)):
        shape.insert(int(rng.integers(len(shape) + 1)), 1)
    return x.reshape(shape)


def moved(x: jax.Array, rng: np.random.Generator) -> jax.Array:
    """One random step that only moves, repeats or adds elements, for arrays of any shape."""
    if x.ndim == 0:
        return jnp.stack([x, x + 1])
    a = int(rng.integers(x.ndim))
    n = x.shape[a]
    k = int(rng.integers(n))
    last = jnp.moveaxis(x, a, -1)
    choices = [
        lambda: reshaped(x, rng),
        lambda: reshaped(x, rng),
        lambda: jnp.transpose(x, rng.permutation(x.ndim).tolist()),
        lambda: lax.slice_in_dim(x, k, n, int(rng.integers(1, 3)), a),
        lambda: lax.slice_in_dim(x, k, k + 1, 1, a) * x,
        lambda: lax.slice_in_dim(x, k, k + 1, 1, a) * lax.slice_in_dim(x, 0, 1, 1, k % x.ndim),
        lambda: jnp.concatenate([jnp.flip(x, a), x * 2], a),
        lambda: jnp.concatenate([lax.slice_in_dim(x, i, i + 1, 1, a) for i in rng.permutation(n)], a),
        lambda: lax.pad(x, jnp.int32(1), [(int(rng.integers(-1, 2)) * (m > 1), 1, 0) for m in x.shape]),
        lambda: x.sum(a, keepdims=bool(k % 2)),
        lambda: jnp.cumsum(x, a),
        lambda: jnp.tile(x, [int(rng.integers(1, 3)) for _ in x.shape]) if x.size < 20 else x.max(a),
        lambda: jnp.take(x, rng.integers(0, n, int(rng.integers(1, 4))), a),
        lambda: jnp.take(x, jnp.arange(n - k) + k, a),
        lambda: last.at[..., k].set(last[..., 0] + last[..., n - 1]),
        lambda: last.at[..., jnp.arange(n - k) + k].add(last[..., : n - k]),
        lambda: jnp.stack(jnp.unstack(last, axis=-1)[k:], a),
        lambda: jax.vmap(lambda r: jnp.roll(r, k), in_axes=a, out_axes=a)(x),
        lambda: lax.scan(lambda c, y: (y, c + y), jnp.zeros(last.shape[1:], jnp.int32), last, reverse=k > 0)[1],
        lambda: jnp.expand_dims(x, a) + jnp.squeeze(x[None], 0)[..., None].reshape(*x.shape[:a], 1, *x.shape[a:]),
    ]
    out = choices[int(rng.integers(len(choices)))]()
    return out if 0 < out.size <= 40 and out.ndim < 5 else out.ravel()[:12].reshape(3, -1) if out.size > 40 else x


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("seed", range(32))
def test_random_shapes_are_sound(seed):
    shape = [(2, 1, 3), (6,), (3, 2), (1, 4)][seed % 4]

    def fn(z: jax.Array) -> list[jax.Array]:
        rng, outs = np.random.default_rng(seed), [z]
        for _ in range(5):
            outs.append(moved(outs[-1], rng))
        return outs[1:]

    assert violations(jax.jit(fn), {"z": shape}, seed) == []


def forget_broadcasting(patch: pytest.MonkeyPatch) -> None:
    """A size-1 axis is taken to run along the axis that it is stretched over."""
    patch.setattr("hivi._locality.rules.spread", lambda shape, out: tuple(map(Along, range(len(shape)))))


def forget_joining(patch: pytest.MonkeyPatch) -> None:
    """Maps that overlap are kept side by side."""
    patch.setattr(axes, "merge_reads", lambda found, shape, size: (frozenset(m for m, _ in found), ""))


def forget_mixing(patch: pytest.MonkeyPatch) -> None:
    """Sorting is taken to act on each element alone."""
    patch.setitem(axes.RULES, "sort", lambda params, args, outs: [[Read(i) for i in range(len(args))]] * len(outs))


def forget_the_index(patch: pytest.MonkeyPatch) -> None:
    """What is read depends on where it is read."""
    rule = axes.RULES["gather"]
    patch.setitem(axes.RULES, "gather", lambda params, args, outs: [rule(params, args, outs)[0][:1]])


def forget_the_choice(patch: pytest.MonkeyPatch) -> None:
    """Which case is taken depends on the predicate."""
    patch.setitem(axes.RULES, "select_n", lambda params, args, outs: [[Read(i) for i in range(1, len(args))]])


def forget_the_shift(patch: pytest.MonkeyPatch) -> None:
    """A carry enters a step as it left the step before."""
    patch.setattr("hivi._locality.loops._Scan._shifted", lambda self, e: e)


def forget_the_test(patch: pytest.MonkeyPatch) -> None:
    """How many steps a while loop takes depends on its test."""
    real_scope = axes._Interpreter.scope

    def scope(self: Any, name: str, reads: Any, args: Any, shape: Any) -> Scope:
        return real_scope(self, name, reads[:2] if name == "while" else reads, args, shape)

    patch.setattr(axes._Interpreter, "scope", scope)


def forget_a_place(patch: pytest.MonkeyPatch) -> None:
    """What is not zero is read."""
    real_places = zeros.places
    patch.setattr(zeros, "places", lambda *args: (found := real_places(*args)) and found[:-1])


def forget_what_was_added(patch: pytest.MonkeyPatch) -> None:
    """A sum is zero only where all its parts are."""
    patch.setitem(zeros._CARRIED, "add", lambda params, seen, extent: seen[0])


BUGS = {
    forget_a_place: ["sparse product", "sparse sum", "sparse rows of a loop"],
    forget_what_was_added: ["sparse, then not", "band"],
    forget_broadcasting: ["stretched"],
    forget_joining: ["by transpose", "same outer"],
    forget_mixing: ["sort", "argsort", "sort pairs"],
    forget_the_index: ["pair table", "gather rows", "gather cells"],
    forget_the_choice: ["compare", "scalar choice"],
    forget_the_shift: ["lag from nothing"],
    forget_the_test: ["while rows", "batched while"],
}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.__name__) for bug in BUGS])
def test_the_check_finds_an_unsound_rule(bug, monkeypatch):
    bug(monkeypatch)
    caught = [name for name in BUGS[bug] for k in range(2) if violations(single(name, k)[0], SITES, seed=k)]
    assert set(caught) == set(BUGS[bug])
