"""Constants that are mostly zeros: a product with them touches only where they are not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import equinox as eqx
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
from hivi._locality.base import ALL, CAP
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


@pytest.mark.parametrize("infinite", [False, True])
def test_a_product_whose_colours_move_some_places_is_still_updated(infinite):
    """A row of 40 reads 6: of ten colours or so each changes a few places of the product."""
    weights = np.zeros((40, 30))
    for column in weights.T:
        column[RNG.choice(40, 6, replace=False)] = RNG.normal(size=6)
    weights[np.flatnonzero(weights[:, 0])[0], 0] = -np.inf if infinite else 1.0
    z = jnp.asarray(RNG.integers(0, 2, 40), jnp.int32)

    def fn(z: Array) -> Array:
        return jnp.sum(jnp.tanh((z + 1.0) @ weights))

    factored = factorise(lambda z: {"log p": fn(z["z"])}, {"z": z})
    assert 5 < count(factored, (40,)) < 25
    program, _ = factored.program.restrict(factored.program.touching("z"))
    plan = program.moves("z", len(factored.consts), (40,)).plan
    (how,) = plan.products.values()
    assert len(how.places[0]) > 1
    change = quick(lambda z: factored.differences("z", (1 - z)[None], {"z": z}))(z)[0]
    alone = (
        weights[:, 0] == 0 if infinite else np.ones(40, bool)
    )  # infinity less itself is no number, one by one either
    np.testing.assert_allclose(change[alone], brute(fn, z)[alone], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "most"), [(4 * CAP, CAP + 1), (20, 6)])
def test_many_places_are_the_whole_axis(size, most):
    """One map of the axis costs less than a table for each place, where all would meet all anyhow."""
    weights = np.zeros((3, size))
    weights[0, :most] = 1.0
    factored = factorise(lambda z: {"log p": jnp.tanh(weights @ z["z"])}, {"z": jnp.zeros(size)})
    assert [f.maps("z") for f in factored.factors] == [{(ALL,)}]


CHAIN = np.eye(8) + np.eye(8, k=1)
COARSE = np.kron(np.ones((2, 2)), np.eye(4)).astype(np.uint8) * 3
NOT_FINITE: dict[str, Callable[[Array], Array]] = {
    "log": lambda z: jnp.nan_to_num(CHAIN @ jnp.log(z), nan=1.0, neginf=-1.0),
    "log, summed": lambda z: jnp.nan_to_num((CHAIN * jnp.log(z)).sum(1), nan=1.0, neginf=-1.0),
    "exp": lambda z: jnp.nan_to_num(CHAIN @ jnp.exp(1000.0 * z), nan=1.0, posinf=0.3),
    "quotient": lambda z: jnp.nan_to_num((CHAIN / z).sum(1), nan=1.0, posinf=0.3),
    "quotient of integers": lambda z: (COARSE // z.astype(jnp.uint8)).astype(float).sum(1) * 1e-3,
    "quotient of signed integers": lambda z: lax.div(CHAIN.astype(jnp.int32), jnp.tile(z, (8, 1))).sum(1) * 0.1,
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_zero_times_what_may_be_infinite_is_not_zero(name):
    z = jnp.asarray([0, 1, 1, 0, 1, 0, 0, 1], jnp.int32)

    def fn(z: Array) -> Array:
        return jnp.sum(jnp.tanh(NOT_FINITE[name](z)))

    factored = factorise(lambda z: {"log p": fn(z["z"])}, {"z": z})
    change = quick(lambda z: factored.differences("z", (1 - z)[None], {"z": z}))(z)[0]
    np.testing.assert_allclose(change, brute(fn, z), rtol=1e-4, atol=1e-4)


def grouped(x: Array, group: Array) -> None:
    with numpyro.plate("group", 6):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(jax.nn.one_hot(group, 6) @ z, 1.0), obs=x)


def test_indicators_made_of_integers_that_are_data():
    """Nothing is reported lost in a product of matrices; the groups are read for what they make zero."""
    group = RNG.integers(0, 6, 50)
    target = hivi.from_numpyro(grouped, jnp.linspace(-1.0, 1.0, 50), group)
    assert count(target.factored, (6,)) == 1
    with pytest.raises(hivi.TargetError, match="same integers"):
        dataclasses.replace(target, data=jax.tree.map(lambda x: x[::-1], target.data))


def test_places_that_a_gather_may_fill():
    """Rows of a matrix of zeros, taken out of bounds, are filled with numbers that are not zero."""

    def fn(z: Array) -> Array:
        rows = jnp.zeros((4, 8)).at[:, 0].set(1.0).at[jnp.array([1, 7])].get(mode="fill", fill_value=2.0)
        return jnp.sum(jnp.tanh(rows @ z))

    z = jnp.asarray([0, 1, 1, 0, 1, 0, 0, 1], jnp.int32)
    factored = factorise(lambda z: {"log p": fn(z["z"])}, {"z": z})
    change = quick(lambda z: factored.differences("z", (1 - z)[None], {"z": z}))(z)[0]
    np.testing.assert_allclose(change, brute(fn, z), rtol=1e-4, atol=1e-4)


def regression(x: Array, y: Array) -> None:
    with numpyro.plate("group", 6):
        z = numpyro.sample("z", dist.Poisson(3.0))
    with numpyro.plate("datum", len(y)):
        numpyro.sample("y", dist.Normal(x @ z, 1.0), obs=y)


@pytest.mark.parametrize("dtype", [float, np.float32, int])
def test_a_design_matrix_of_indicators_is_read(dtype):
    target = hivi.from_numpyro(regression, INDICATORS.astype(dtype), SEEN)
    assert count(target.factored, (6,)) == 1


LATENT = {"z": hivi.Latent(LINE, constraints.boolean)}


@pytest.mark.parametrize("dtype", [float, int])
def test_zeros_that_are_data_stay(dtype):
    """Other numbers at the same places are welcome, others are refused."""
    data = np.round(10 * BAND).astype(dtype)
    target = hivi.from_log_joint(lambda z, w: jnp.tanh(w @ z["z"]), LATENT, data=data)
    assert count(target.factored, LINE) == 3
    assert dataclasses.replace(target, data=2 * target.data).data.shape == BAND.shape
    with pytest.raises(hivi.TargetError, match="other integers or zeros"):
        dataclasses.replace(target, data=target.data + 1)
    changed = eqx.tree_at(lambda t: t.data, target, target.data + 1)  # without a check
    with pytest.raises(hivi.TargetError, match="other integers or zeros"):
        hivi.fit(changed, hivi.MeanField(), key=jax.random.key(0), steps=10, progress=False)


def test_only_what_locality_rests_on_stays():
    seen = np.eye(SIZE)[:5]  # mostly zeros, too

    def log_joint(z, data):
        return {"w": jnp.tanh(data["w"] @ z["z"]), "y": data["y"] * jnp.sin(z["z"])}

    target = hivi.from_log_joint(log_joint, LATENT, data={"w": BAND, "y": seen})
    assert count(target.factored, LINE) == 3
    assert dataclasses.replace(target, data={**target.data, "y": target.data["y"] + 1.0}).data["y"].shape == seen.shape
    dense = hivi.from_log_joint(log_joint, LATENT, data={"w": FULL, "y": seen})
    assert dense.factored.program.read == ()


def test_numbers_that_single_precision_takes_for_zero():
    far = np.arange(SIZE, dtype=float)
    kernel = np.exp(
        -40.0 * (far[:, None] - far) ** 2
    )  # from 1e-1000 on zero in double precision, from 1e-45 on in single
    target = hivi.from_log_joint(lambda z, w: jnp.tanh(w @ z["z"]), LATENT, data=kernel)
    assert count(target.factored, LINE) == 3


def test_explain_counts_alike_tables():
    target = hivi.from_log_joint(lambda z: jnp.tanh(TORUS @ z["z"]), {"z": hivi.Latent(LINE, constraints.boolean)})
    assert "touches z[table[i]] (4 tables)" in hivi.explain(target)
