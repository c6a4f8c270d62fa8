"""Constants that are mostly zeros: a product with them touches only where they are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import quick
from hivi._factored import factorise
from hivi._locality.base import CAP
from hivi._locality.colour import colours

RNG = np.random.default_rng(0)
SIDE, SIZE = 4, 16
GRID = np.arange(SIZE).reshape(SIDE, SIDE)
TORUS = np.zeros((SIZE, SIZE))
for moved in (np.roll(GRID, 1, 0), np.roll(GRID, 1, 1)):
    TORUS[GRID, moved] = TORUS[moved, GRID] = 0.4
GROUP = RNG.integers(0, 6, 40)
INDICATORS, SEEN = np.eye(6)[GROUP], RNG.normal(size=40)
BLOCKS = np.kron(np.eye(4), RNG.normal(size=(3, 5)))
BAND = np.triu(np.tril(RNG.normal(size=(SIZE, SIZE)), 1), -1)
FULL = RNG.normal(size=(SIZE, SIZE))
LINE = (SIZE,)


def spins(z: Array) -> Array:
    return 2.0 * z - 1.0


def near(z: Array) -> Array:
    close = jnp.abs(jnp.arange(SIZE)[:, None] - jnp.arange(SIZE)) < 2
    return jnp.sum(jnp.tanh((close * FULL) @ z))


CASES: dict[str, tuple[Callable[[Array], Array], tuple[int, ...], int]] = {
    "adjacency": (lambda z: 0.5 * spins(z) @ TORUS @ spins(z), LINE, 8),
    "adjacency, einsum": (lambda z: 0.5 * jnp.einsum("i,ij,j", spins(z), TORUS, spins(z)), LINE, 8),
    "pairs": (lambda z: 0.5 * jnp.sum(TORUS * spins(z)[:, None] * spins(z)), LINE, 2),
    "pairs, weighted last": (lambda z: 0.5 * jnp.sum(jnp.outer(spins(z), spins(z)) * TORUS), LINE, 2),
    "indicators of groups": (lambda z: -0.5 * jnp.sum((SEEN - INDICATORS @ z) ** 2), (6,), 1),
    "one hot": (lambda z: -0.5 * jnp.sum((SEEN - jax.nn.one_hot(GROUP, 6) @ z) ** 2), (6,), 1),
    "blocks": (lambda z: -jnp.sum(jnp.logaddexp(0.0, z @ BLOCKS)), (12,), 3),
    "blocks of rows": (lambda z: -jnp.sum(jnp.logaddexp(0.0, z @ BLOCKS)), (5, 12), 3),
    "band": (lambda z: jnp.sum(jnp.tanh(BAND @ z)), LINE, 3),
    "band made in the model": (near, LINE, 3),
    "a choice": (lambda z: jnp.sum(jnp.tanh(jnp.where(BAND > 0, BAND, 0.0) @ z)), LINE, 3),
    "loop over rows": (lambda z: lax.map(lambda row: jnp.tanh(row @ z), jnp.asarray(BAND)).sum(), LINE, 3),
    "sum of a row": (lambda z: jnp.sum(jnp.tanh((TORUS * z).sum(1))), LINE, 4),
    "matrix of a latent": (lambda z: jnp.sum(jnp.tanh(TORUS @ (z[:, None] * FULL[:, :3]))), LINE, 4),
    "dense": (lambda z: jnp.sum(jnp.tanh(FULL @ z)), LINE, SIZE),
    "integers": (lambda z: jnp.sum(jnp.tanh((TORUS > 0).astype(int) @ z * 0.1)), LINE, 4),
}


def brute(fn: Callable[[Array], Array], z: Array) -> np.ndarray:
    points = [z.at[index].set(1 - z[index]) for index in np.ndindex(z.shape)]
    right = quick(jax.vmap(fn))(jnp.stack([z, *points]))
    return np.asarray(right[1:] - right[0]).reshape(z.shape)


def count(factored, shape: tuple[int, ...]) -> int:
    return math.prod(len(set(c.tolist())) for c in colours(factored.factors, "z", shape))


@pytest.mark.parametrize("name", CASES)
def test_few_colours_and_right_differences(name):
    fn, shape, expected = CASES[name]
    z = jnp.asarray(np.random.default_rng(1).integers(0, 2, shape), jnp.int32)
    factored = factorise(lambda z: {"log p": fn(z["z"])}, {"z": z})
    assert count(factored, shape) == expected
    assert factored.program.losses == ()
    change = quick(lambda z: factored.differences("z", (1 - z)[None], {"z": z}))(z)[0]
    np.testing.assert_allclose(change, brute(fn, z), rtol=1e-4, atol=1e-4)
    signal = quick(lambda z: factored.signal("z", shape, factored.terms({"z": z})))
    for index in [(0,) * len(shape), tuple(n - 1 for n in shape)]:
        # what the signal leaves out does not change with the coordinate
        after = signal(z.at[index].set(1 - z[index]))[index]
        np.testing.assert_allclose(after - signal(z)[index], change[index], rtol=1e-4, atol=1e-4)


def test_a_product_of_few_zeros_is_still_updated():
    """Of 40 coordinates a row reads 32 at most: nearly as many colours as coordinates, and each a cheap update."""
    weights = RNG.normal(size=(40, 30)) * (RNG.random((40, 30)) < 0.4)
    z = jnp.asarray(RNG.integers(0, 2, 40), jnp.int32)

    def fn(z: Array) -> Array:
        return jnp.sum(jnp.tanh(z @ weights))

    factored = factorise(lambda z: {"log p": fn(z["z"])}, {"z": z})
    assert 20 < count(factored, (40,)) < 40
    program, _ = factored.program.restrict(factored.program.touching("z"))
    plan = program.moves("z", len(factored.consts), (40,)).plan
    (how,) = plan.products.values()
    assert len(how.places[0]) > 1
    change = quick(lambda z: factored.differences("z", (1 - z)[None], {"z": z}))(z)[0]
    np.testing.assert_allclose(change, brute(fn, z), rtol=1e-4, atol=1e-4)


def test_more_places_than_the_cap_are_the_whole_axis():
    weights = np.zeros((3, 4 * CAP))
    weights[0, : CAP + 1] = 1.0
    factored = factorise(lambda z: {"log p": jnp.tanh(weights @ z["z"])}, {"z": jnp.zeros(4 * CAP)})
    assert count(factored, (4 * CAP,)) == 4 * CAP


def regression(x: Array, y: Array) -> None:
    with numpyro.plate("group", 6):
        z = numpyro.sample("z", dist.Poisson(3.0))
    with numpyro.plate("datum", len(y)):
        numpyro.sample("y", dist.Normal(x @ z, 1.0), obs=y)


@pytest.mark.parametrize("dtype", [float, np.float32, int])
def test_zeros_that_are_data_are_read_and_then_stay(dtype):
    """A design matrix of indicators. Other numbers at the same places are welcome, others are refused."""
    target = hivi.from_numpyro(regression, INDICATORS.astype(dtype), SEEN)
    assert count(target.factored, (6,)) == 1
    latents = {"z": hivi.Latent(LINE, constraints.boolean)}
    target = hivi.from_log_joint(lambda z, w: jnp.tanh(w @ z["z"]), latents, data=jnp.asarray(BAND))
    assert count(target.factored, LINE) == 3
    assert (
        hivi.from_log_joint(lambda z, w: jnp.tanh(w @ z["z"]), latents, data=jnp.asarray(FULL)).factored.program.read
        == ()
    )


def test_explain_counts_alike_tables():
    target = hivi.from_log_joint(lambda z: jnp.tanh(TORUS @ z["z"]), {"z": hivi.Latent(LINE, constraints.boolean)})
    assert "touches z[table[i]] (4 tables)" in hivi.explain(target)
