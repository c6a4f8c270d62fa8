"""Locality through the constructs that models are written with: few colours, and differences as by brute force.

Controls are models that truly couple their coordinates: there, locality must not be claimed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from jax.scipy.signal import convolve2d
from jaxtyping import Array
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import hivi
from cases import quick
from hivi._factored import factorise
from hivi._locality.colour import colours

SIZE = 12
RNG = np.random.default_rng(0)
FIELD = jnp.asarray(RNG.normal(size=SIZE), jnp.float32)
PAIR = jnp.asarray(RNG.normal(size=(2, 2)), jnp.float32)
EMIT = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
SEEN = jnp.asarray(RNG.integers(0, 3, SIZE))
WEIGHTS = RNG.normal(size=SIZE)
ORDER = RNG.permutation(SIZE)
GROUP = RNG.integers(0, SIZE, 30)
RING = np.arange(SIZE), (np.arange(SIZE) + 1) % SIZE
CROSS = jnp.asarray([[0, 1, 0], [1, 0, 1], [0, 1, 0]], jnp.float32)


def by_ys(z: Array) -> Array:
    return lax.scan(lambda before, now: (now, PAIR[before, now]), z[0], z[1:])[1].sum()


def in_the_carry(z: Array) -> Array:
    def step(carry: Any, x: Any) -> Any:
        before, total = carry
        now, y = x
        return (now, total + PAIR[before, now] - EMIT[now, y] * 0.5), None

    return lax.scan(step, (z[0], jnp.float32(0.0)), (z[1:], SEEN[1:]))[0][1]


def from_a_python_zero(z: Array) -> Array:
    return lax.scan(lambda total, x: (total + PAIR[x[0], x[1]], None), 0.0, (z[:-1], z[1:]))[0]


def by_a_for_loop(z: Array) -> Array:
    return lax.fori_loop(1, SIZE, lambda i, total: total + PAIR[z[i - 1], z[i]], 0.0)


@jax.jit
def compiled(z: Array) -> Array:
    return jnp.sum(PAIR[z[:-1], z[1:]])


def compiled_in_parts(z: Array) -> Array:
    return jax.jit(jax.checkpoint(compiled))(z) + jnp.sum(jax.checkpoint(lambda z: FIELD * z)(z))


def vectors_in_the_carry(z: Array) -> Array:
    def step(carry: Any, now: Any) -> Any:
        before, total = carry
        return (now, total - PAIR[before, now].sum()), None

    return lax.scan(step, (z[0], jnp.float32(0.0)), z[1:])[0][1]


def by_fori(z: Array) -> Array:
    return lax.fori_loop(1, SIZE, lambda t, total: total + PAIR[z[t - 1], z[t]], jnp.float32(0.0))


def grid_by_fori(z: Array) -> Array:
    def row(i: Any, total: Any) -> Any:
        return lax.fori_loop(1, 5, lambda j, t: t + PAIR[z[i, j], z[i - 1, j]] * PAIR[z[i, j], z[i, j - 1]], total)

    return lax.fori_loop(1, 4, row, jnp.float32(0.0))


def read_by_the_terms(z: Array) -> Array:
    """The running sum changes the terms that follow: no coordinate is local."""
    return lax.scan(lambda total, now: (total + jnp.sin(total) * now + now, None), 0.1, z * FIELD)[0]


def running_terms(z: Array) -> Array:
    """What is summed is an output as well."""
    return (lax.scan(lambda total, now: (total + now, jnp.sin(total)), 0.0, z * FIELD)[1]).sum()


def python_loop(z: Array) -> Array:
    total: Any = 0.0
    for i in range(SIZE - 1):
        total = total + float(WEIGHTS[i]) * PAIR[z[i], z[i + 1]]
    return total


def python_loop_backwards(z: Array) -> Array:
    return sum(jnp.where(z[i] == z[i - 2], FIELD[i], 0.1 * i) for i in reversed(range(2, SIZE)))


def python_loop_of_shared(z: Array) -> Array:
    """All terms read one array that depends on every coordinate."""
    shared = jnp.tanh(z.sum() * 0.1)
    return sum(jnp.exp(shared * FIELD[i] * z[i]) for i in range(SIZE))


def python_loop_of_stack(z: Array) -> Array:
    return jnp.stack([jnp.sin(FIELD[i] * z[i]) * z[(i + 1) % SIZE] for i in range(SIZE)]).sum()


def energy(z: Array) -> Array:
    spins = 2.0 * z - 1.0
    around = lax.conv(spins[None, None], CROSS[None, None], (1, 1), "SAME")[0, 0]
    return 0.3 * (spins * around).sum()


def edges(z: Array) -> Array:
    return jnp.where(z[RING[0]] == z[RING[1]], 0.7, -0.3).sum()


def every_edge(z: Array) -> Array:
    i, j = np.triu_indices(SIZE, 1)
    return jnp.where(z[i] == z[j], 0.7, -0.3).sum()


LINE, GRID = (SIZE,), (5, 6)
CASES: dict[str, tuple[Callable[[Array], Array], tuple[int, ...], int]] = {
    "scan, by ys": (by_ys, LINE, 2),
    "scan, in the carry": (in_the_carry, LINE, 2),
    "scan of vectors, in the carry": (vectors_in_the_carry, GRID, 2),
    "fori_loop": (by_fori, LINE, 2),
    "scan, from a Python zero": (from_a_python_zero, LINE, 2),
    "fori_loop, from a Python zero": (by_a_for_loop, LINE, 2),
    "jit that holds an array": (compiled, LINE, 2),
    "jits and checkpoints": (compiled_in_parts, LINE, 2),
    "nested fori_loop": (grid_by_fori, (4, 5), 4),
    "scan, read by the terms": (read_by_the_terms, LINE, SIZE),
    "scan, an output too": (running_terms, LINE, SIZE),
    "cumulative sum": (lambda z: jnp.sin(jnp.cumsum(z * FIELD)).sum(), LINE, SIZE),
    "Python loop": (python_loop, LINE, 2),
    "Python loop backwards": (python_loop_backwards, LINE, 3),
    "Python loop of a shared array": (python_loop_of_shared, LINE, SIZE),
    "Python loop of a stack": (python_loop_of_stack, LINE, 2),
    "stack": (lambda z: jnp.exp(jnp.stack([FIELD[i] * z[i] for i in range(SIZE)])).sum(), LINE, 1),
    "tile": (lambda z: jnp.exp(-jnp.tile(z, 40) * jnp.tile(FIELD, 40)).sum(), LINE, 1),
    "tile rows": (lambda z: jnp.sin(jnp.tile(z, (3, 1)) * 0.3).sum(), GRID, 1),
    "repeat": (lambda z: jnp.sin(jnp.repeat(z * FIELD, 3) + jnp.arange(3 * SIZE)).sum(), LINE, 1),
    "ravel": (lambda z: jnp.sin(z.ravel() * jnp.arange(30.0)).sum(), GRID, 1),
    "add at": (lambda z: jnp.sin(jnp.zeros(20).at[jnp.arange(SIZE) + 2].add(z * FIELD)).sum(), LINE, 1),
    "set at an order": (lambda z: jnp.sin(jnp.ones(20).at[ORDER].set(z * FIELD)).sum(), LINE, 1),
    "add pairs": (lambda z: jnp.sin(jnp.zeros(6).at[np.arange(SIZE) // 2].add(z * FIELD)).sum(), LINE, 2),
    "add all": (lambda z: jnp.sin(jnp.zeros(6).at[np.zeros(SIZE, int)].add(z * FIELD)).sum(), LINE, SIZE),
    "constant order": (lambda z: jnp.sin(z[ORDER] * FIELD).sum(), LINE, 1),
    "groups": (lambda z: jnp.sin(z[GROUP] * jnp.arange(30.0)).sum(), LINE, 1),
    "table of constants": (lambda z: FIELD[ORDER][z * 5 + jnp.arange(SIZE) % 7].sum(), LINE, 1),
    "ring of edges": (edges, LINE, 2),
    "every edge": (every_edge, LINE, SIZE),
    "order and itself": (lambda z: jnp.sin(z[ORDER] + 2 * z[np.roll(ORDER, 1)]).sum(), LINE, 3),
    "convolution": (energy, GRID, 9),
    "convolve2d": (lambda z: (z * convolve2d(z * 1.0, CROSS, mode="same")).sum(), GRID, 9),
    "convolution in one dimension": (lambda z: jnp.sin(jnp.convolve(z * 1.0, jnp.ones(3), "same")).sum(), LINE, 3),
    "torus": (lambda z: (z * (jnp.roll(z, 1, 0) + 0.5 * jnp.roll(z, 1, 1))).sum(), (6, 6), 4),
    "mask outside a sum": (lambda z: jnp.where(jnp.arange(5) > 1, jnp.sin(z * 0.7).sum(1), 0.0).sum(), GRID, 1),
    "weight outside a sum": (lambda z: (FIELD[:5] * jnp.sin(z * 0.7).sum(1)).sum(), GRID, 1),
    "mask by the latent": (lambda z: jnp.where(z[:, 0] > 0, jnp.sin(z * 0.7).sum(1), 0.0).sum(), GRID, 6),
    "product of sums": (lambda z: (jnp.sin(z * 0.7).sum(1) * jnp.cos(z).sum(1)).sum(), GRID, 6),
}


def brute(fn: Callable[[Array], Array], z: Array, moved: Array) -> np.ndarray:
    points = [z.at[index].set(moved[index]) for index in np.ndindex(z.shape)]
    right = quick(jax.vmap(fn))(jnp.stack([z, *points]))
    return np.asarray(right[1:] - right[0]).reshape(z.shape)


@pytest.mark.parametrize("name", CASES)
def test_few_colours_and_right_differences(name):
    fn, shape, expected = CASES[name]
    z = jnp.asarray(np.random.default_rng(1).integers(0, 2, shape), jnp.int32)
    factored = factorise(lambda z: {"log p": fn(z["z"])}, {"z": z})
    found = [len(set(c.tolist())) for c in colours(factored.factors, "z", shape)]
    assert math.prod(found) == expected
    both = quick(lambda z: (factored.total(factored.terms({"z": z})), fn(z)))(z)
    np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)
    change = quick(lambda z: factored.differences("z", (1 - z)[None], {"z": z}))(z)[0]
    np.testing.assert_allclose(change, brute(fn, z, 1 - z), rtol=1e-4, atol=1e-4)
    signal = quick(lambda z: factored.signal("z", shape, factored.terms({"z": z})))
    for index in [(0,) * len(shape), tuple(n - 1 for n in shape), tuple(n // 2 for n in shape)]:
        # what the signal leaves out does not change with the coordinate
        after = signal(z.at[index].set(1 - z[index]))[index]
        np.testing.assert_allclose(after - signal(z)[index], change[index], rtol=1e-4, atol=1e-4)


def hmm() -> None:
    def step(before: Any, y: Any) -> Any:
        z = numpyro.sample("z", dist.Categorical(logits=PAIR[before]))
        numpyro.sample("y", dist.Categorical(logits=EMIT[z]), obs=y)
        return z, None

    scan(step, 0, SEEN)


def hmms() -> None:
    def step(before: Any, y: Any) -> Any:
        with numpyro.plate("chains", 3):
            z = numpyro.sample("z", dist.Categorical(logits=PAIR[before]))
            numpyro.sample("y", dist.Categorical(logits=EMIT[z]), obs=y)
        return z, None

    scan(step, jnp.zeros(3, int), jnp.tile(SEEN[:, None], (1, 3)))


def masked() -> None:
    with numpyro.plate("rows", 5):
        z = numpyro.sample("z", dist.Bernoulli(0.3 * jnp.ones(4)).to_event(1))
        with numpyro.handlers.mask(mask=jnp.arange(5) > 1):
            numpyro.sample("y", dist.Normal(z * 1.0, 1.0).to_event(1), obs=jnp.zeros((5, 4)))


def masked_factor() -> None:
    z = numpyro.sample("z", dist.Bernoulli(0.3 * jnp.ones((5, 4))).to_event(2))
    log_p = dist.Normal(z * 1.0, 1.0).to_event(1).log_prob(jnp.zeros((5, 4)))
    numpyro.factor("y", jnp.where(jnp.arange(5) > 1, log_p, 0.0).sum())


@pytest.mark.parametrize(("model", "expected"), [(hmm, 2), (hmms, 2), (masked, 1), (masked_factor, 1)])
def test_numpyro_models(model, expected):
    target = hivi.from_numpyro(model)
    shape = target.site("z").shape
    found = [len(set(c.tolist())) for c in colours(target.factored.factors, "z", shape)]
    assert math.prod(found) == expected
    z = jnp.asarray(np.random.default_rng(1).integers(0, 2, shape), jnp.int32)
    change = target.factored.differences("z", (1 - z)[None], {"z": z}, target.data, target.all_rows())[0]
    right = brute(lambda v: target.log_joint({"z": v}), z, 1 - z)
    np.testing.assert_allclose(change, right, rtol=1e-4, atol=1e-4)


def test_other_captured_indices_are_another_program():
    """Indices are part of the structure: equal programs must not share scopes that differ."""

    def target(order: np.ndarray) -> hivi.Target:
        latents = {"z": hivi.Latent(LINE, constraints.boolean)}
        return hivi.from_log_joint(lambda z: jnp.sin(z["z"][order] * FIELD).sum(), latents)

    one, other = target(ORDER), target(ORDER[::-1].copy())
    assert one.factored.program != other.factored.program
    assert one.factored.program == target(ORDER.copy()).factored.program


def test_indices_that_are_data_are_read_and_then_stay():
    """A permutation: one colour. Other data of that shape would need other scopes, and are refused."""
    latents = {"z": hivi.Latent(LINE, constraints.boolean)}
    order = jnp.asarray(ORDER)
    target = hivi.from_log_joint(lambda z, order: jnp.sin(z["z"][order] * FIELD), latents, data=order)
    assert [len(set(c.tolist())) for c in colours(target.factored.factors, "z", LINE)] == [1]
    assert dataclasses.replace(target, data=order + 0).data.shape == order.shape
    with pytest.raises(hivi.TargetError, match="make a new target"):
        dataclasses.replace(target, data=order[::-1])


def test_a_long_loop_is_one_factor():
    count = 2_000

    def fn(z: dict[str, Array]) -> dict[str, Array]:
        total: Any = 0.0
        for i in range(count - 1):
            total = total + jnp.where(z["z"][i] == z["z"][i + 1], 0.9, -0.4)
        return {"log p": total}

    z = {"z": jnp.zeros(count, jnp.int32)}
    start = time.process_time()
    jax.make_jaxpr(fn)(z)
    traced = time.process_time() - start
    factored = factorise(fn, z)
    assert time.process_time() - start < 5 * traced + 2.0  # the model is traced once more
    assert len(factored.program.jaxpr.eqns) < 60
    assert {f.shape for f in factored.factors} == {(), (count - 1,)}
    assert len(set(colours(factored.factors, "z", (count,))[0].tolist())) == 2
