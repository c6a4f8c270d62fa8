"""Sums in disguise, and arrays against themselves: few colours, and differences as by brute force.

A log-joint says the same thing in many ways: `0.4 * jnp.sum(s[1:] * s[:-1])` of integers, a dot product, a sum times a precision.
Whichever it is, a coordinate of z must meet its own terms alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import quick
from hivi._locality.colour import colours

LINE, GRID = (6,), (3, 4)
WEIGHTS = jnp.array([0.3, -0.8, 0.5, 1.1, -0.4])
DATA = {"w": WEIGHTS, "b": jnp.array(0.7)}


def spins(z: Array) -> Array:
    return 2 * z - 1


def pairs(z: Array) -> Array:
    return 1.0 * z[1:] * z[:-1]


def long_sum_of_integers(z: Array) -> Array:
    total = jnp.array(0)
    for i in range(5):
        total = total + (z[i] == z[i + 1]) - z[i] * 2
    return 0.7 * total


CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], int]] = {
    # name: (log-joint of z, data and a latent scale b; shape of z; colours)
    "integers": (lambda z, d, b: 0.4 * jnp.sum(spins(z) * jnp.roll(spins(z), 1)), LINE, 2),
    "integers, twice": (lambda z, d, b: -jnp.sum(spins(z)[1:] * spins(z)[:-1]) * 0.3 - 0.1 * spins(z).sum(), LINE, 2),
    "integers, divided": (lambda z, d, b: jnp.sum(spins(z)[1:] * spins(z)[:-1]) / 2, LINE, 2),
    "integers, axis by axis": (lambda z, d, b: 0.4 * jnp.sum(jnp.sum(z * jnp.roll(z, 1, 0), 0)), (4, 3), 2),
    "agreements": (lambda z, d, b: 0.7 * jnp.sum(z[1:] == z[:-1]), LINE, 2),
    "a Python loop of integers": (lambda z, d, b: long_sum_of_integers(z), LINE, 2),
    "dot": (lambda z, d, b: jnp.dot(WEIGHTS, pairs(z)), LINE, 2),
    "dot of integers": (lambda z, d, b: 0.7 * jnp.dot(z[1:], z[:-1]), LINE, 2),
    "dot with data": (lambda z, d, b: pairs(z) @ d["w"], LINE, 2),
    "einsum": (lambda z, d, b: jnp.einsum("ij,ij->", 1.0 * z[1:], 1.0 * z[:-1]), GRID, 2),
    "batched dots": (lambda z, d, b: jnp.einsum("ij,ij->i", 1.0 * z, 0.5 + 1.0 * z), GRID, 1),
    "an average": (lambda z, d, b: jnp.average(pairs(z), weights=WEIGHTS), LINE, 2),
    "a weight from data": (lambda z, d, b: d["b"] * jnp.sum(pairs(z)), LINE, 2),
    "divided by data": (lambda z, d, b: jnp.sum(pairs(z)) / d["b"] ** 2, LINE, 2),
    "a latent weight": (lambda z, d, b: jnp.exp(b) * jnp.sum(pairs(z)), LINE, 2),
    "divided by a latent": (lambda z, d, b: -0.5 * jnp.sum((WEIGHTS - z[:5]) ** 2) / jnp.exp(2 * b) - 5 * b, LINE, 1),
    "a latent weight of a dot": (lambda z, d, b: b * jnp.dot(WEIGHTS, z[:5]), LINE, 1),
    "a latent weight of integers": (lambda z, d, b: b * jnp.sum(z[1:] == z[:-1]), LINE, 2),
    "a latent weight of several sums": (lambda z, d, b: b * (jnp.sum(pairs(z)) - jnp.dot(WEIGHTS, z[:5])), LINE, 2),
    "weights of weights": (lambda z, d, b: jnp.exp(b) * (d["b"] * (jnp.sum(pairs(z)) / 3.0)) / d["w"][2], LINE, 2),
    "weights and several sums": (lambda z, d, b: b * (2.0 * (jnp.sum(pairs(z)) - 0.5 * z.sum()) / d["b"]), LINE, 2),
    "reversed": (lambda z, d, b: jnp.sum(1.0 * z * z[::-1]), LINE, 2),
    "reversed, with a middle": (lambda z, d, b: jnp.sum(jnp.exp(0.3 * z * z[::-1])), (5,), 2),
    "flipped": (lambda z, d, b: jnp.sum(1.0 * z * jnp.flip(z, 1)), (3, 4), 2),
    "transposed": (lambda z, d, b: jnp.sum(jnp.exp(0.2 * z * z.T)), (3, 3), 9),
}


def built(name: str) -> tuple[hivi.Target, Callable[[Array, Array], Array]]:
    fn, shape, _ = CASES[name]
    latents = {"z": hivi.Latent(shape, constraints.integer_interval(0, 3)), "b": hivi.Latent()}
    target = hivi.from_log_joint(
        lambda z, d: {"fn": fn(z["z"], d, z["b"]), "b": -0.5 * z["b"] ** 2}, latents, data=DATA
    )
    return target, quick(lambda z, b: jnp.sum(fn(z, DATA, b)) - 0.5 * b**2)


@pytest.mark.parametrize("name", CASES)
def test_few_colours_and_right_differences(name: str) -> None:
    _, shape, most = CASES[name]
    target, direct = built(name)
    rng = np.random.default_rng(0)
    z, moved = (jnp.asarray(rng.integers(0, 4, shape), jnp.int32) for _ in range(2))
    b = jnp.array(0.4)
    found = quick(lambda z, moved: target.factored.differences("z", moved[None], {"z": z, "b": b}, DATA, {}))(z, moved)[
        0
    ]
    right = np.zeros(shape)
    for index in np.ndindex(shape):
        right[index] = direct(z.at[index].set(moved[index]), b) - direct(z, b)
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(target.log_joint({"z": z, "b": b}), direct(z, b), rtol=1e-5, atol=1e-5)
    counts = [len(set(c.tolist())) for c in colours(target.factored.factors, "z", shape)]
    assert np.prod(counts) <= most, counts


@pytest.mark.parametrize(
    "fn",
    [
        lambda z: jnp.sum(1.0 * z) ** 2,
        lambda z: jnp.sum(1.0 * z) * jnp.sum(jnp.sqrt(1.0 * z)),
        lambda z: jnp.dot(1.0 * z, jnp.cumsum(1.0 * z)),
        lambda z: jnp.log1p(jnp.sum(z)),
        lambda z: 1.0 * (jnp.sum(z) // 2),
    ],
    ids=["square", "product", "with a cumulative sum", "logarithm", "half"],
)
def test_what_is_no_sum_is_left_alone(fn: Callable[[Array], Array]) -> None:
    target = hivi.from_log_joint(lambda z: fn(z["z"]), {"z": hivi.Latent(LINE, constraints.integer_interval(0, 3))})
    z = jnp.array([1, 3, 0, 2, 2, 1])
    np.testing.assert_allclose(target.log_joint({"z": z}), fn(z), rtol=1e-5)
    found = quick(lambda z: target.factored.differences("z", ((z + 1) % 4)[None], {"z": z}, None, {}))(z)[0]
    right = [fn(z.at[i].set((z[i] + 1) % 4)) - fn(z) for i in range(6)]
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_unsigned_integers_may_wrap_and_are_left_alone() -> None:
    def fn(z: Array) -> Array:
        return 0.5 * (jnp.sum(z.astype(jnp.uint8)) - jnp.uint8(3)).astype(jnp.float32)

    target = hivi.from_log_joint(lambda z: fn(z["z"]), {"z": hivi.Latent(LINE, constraints.boolean)})
    z = jnp.array([1, 0, 0, 0, 0, 1])
    assert float(target.log_joint({"z": z})) == float(fn(z))


def test_a_long_loop_of_integers_is_read_in_few_passes() -> None:
    """One pass for the whole chain of additions, not one for each."""

    def fn(z: dict[str, Array]) -> Array:
        total = jnp.array(0)
        for i in range(300):
            total = total + (z["z"][i] == z["z"][i + 1])
        return 0.3 * total

    target = hivi.from_log_joint(fn, {"z": hivi.Latent((301,), constraints.boolean)})
    assert len(target.factored.factors) < 10
    assert [len(set(c.tolist())) for c in colours(target.factored.factors, "z", (301,))] == [2]


def test_signals_of_a_hand_written_mixture_are_local() -> None:
    """Data with a latent precision in front of the sum: each assignment meets its own datum, and is exact in one colour."""
    y = jnp.array([-2.1, -1.9, 2.2, 1.8, 2.0])

    def log_joint(z: dict[str, Array]) -> Array:
        residual = y - z["mu"][z["k"]]
        return (
            -0.5 * jnp.exp(-2 * z["s"]) * jnp.sum(residual**2)
            - 5 * z["s"]
            - 0.5 * jnp.sum(z["mu"] ** 2)
            - 0.5 * z["s"] ** 2
        )

    latents = {"k": hivi.Latent((5,), constraints.integer_interval(0, 1)), "mu": hivi.Latent((2,)), "s": hivi.Latent()}
    target = hivi.from_log_joint(log_joint, latents)
    assert "1 colour" in hivi.Auto().explain(target, hivi.MeanField())
    assert jax.tree.leaves(target.data) == []


def test_recursions_in_a_loop_stay_as_they_are() -> None:
    """A weight goes inside of sums over discrete latents that are read once: else terms would double at every step."""

    def fn(z: dict[str, Array], d: dict[str, Array]) -> Array:
        before = last = jnp.zeros(())
        total = jnp.zeros(())
        for t in range(20):
            before, last = last, 0.5 * last + 0.3 * before + z["z"][t]
            total = total + d["y"][t] * last - jnp.exp(last)
        return total

    for support in (constraints.real, constraints.boolean):
        target = hivi.from_log_joint(fn, {"z": hivi.Latent((20,), support)}, data={"y": jnp.ones(20)})
        assert len(target.factored.program.jaxpr.eqns) < 400


def test_large_integers_of_the_data_cancel_exactly() -> None:
    seconds = jnp.arange(6) * 7 + 1_700_000_000
    z = jnp.array([0, 1, 1, 0, 1, 0])
    for fn in (
        lambda z, d: 0.1 * jnp.sum(d["t"] - 1_700_000_000 - z["z"]),
        lambda z, d: 0.1 * jnp.sum(d["t"] - z["z"] - 1_700_000_000),
    ):
        target = hivi.from_log_joint(fn, {"z": hivi.Latent(LINE, constraints.boolean)}, data={"t": seconds})
        assert float(target.log_joint({"z": z})) == pytest.approx(0.1 * (105 - 3), rel=1e-5)


def test_types_of_numbers_stay(x64: None) -> None:
    def narrow(z: dict[str, Array]) -> Array:
        return jnp.float32(0.5) * jnp.sum(z["z"][1:] == z["z"][:-1]).astype(jnp.float32)

    def wide(z: dict[str, Array]) -> Array:
        small = z["z"].astype(jnp.int8) * jnp.int8(20)
        return jnp.dot(small, small, preferred_element_type=jnp.float32)

    z = jnp.array([1, 1, 0, 1, 0, 0])
    for fn, right in ((narrow, 1.0), (wide, 1200.0)):
        target = hivi.from_log_joint(fn, {"z": hivi.Latent(LINE, constraints.boolean)})
        assert float(target.log_joint({"z": z})) == right
