"""Locality is read from the arithmetic: however a chain is written, its signals, gradients and costs are the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import built, quick, total
from hivi._estimators.exact import site_colours, site_programs
from hivi._estimators.surrogate import surrogate
from hivi._factored import Factored, factorise

SIZE = 32
FIELD = jnp.asarray(np.random.default_rng(0).normal(size=SIZE), jnp.float32)
LATENT = {"z": hivi.Latent((SIZE,), constraints.boolean)}


def _link(a: Array, b: Array) -> Array:
    return jnp.where(a == b, 0.9, -0.4)


def _by_name(z: dict[str, Array]) -> dict[str, Array]:
    return {"field": FIELD * z["z"], "link": _link(z["z"][1:], z["z"][:-1])}


def _loop(z: dict[str, Array]) -> Array:
    value = z["z"]
    terms = [FIELD[i] * value[i] for i in range(SIZE)] + [_link(value[i + 1], value[i]) for i in range(SIZE - 1)]
    return sum(terms)


def _scalar(z: dict[str, Array]) -> Array:
    return (FIELD * z["z"]).sum() + _link(z["z"][1:], z["z"][:-1]).sum()


def _hidden(z: dict[str, Array]) -> Array:
    """The same number, as one global scalar."""
    both = jnp.stack([_scalar(z), jnp.float32(-1e9)])
    return jax.scipy.special.logsumexp(both)


def _plate() -> None:
    with numpyro.plate("items", SIZE):
        z = numpyro.sample("z", dist.Bernoulli(logits=FIELD))
    numpyro.factor("link", _link(z[1:], z[:-1]))


def _to_event() -> None:
    z = numpyro.sample("z", dist.Bernoulli(logits=FIELD).to_event(1))
    numpyro.factor("link", _link(z[1:], z[:-1]).sum())


SPELLINGS: dict[str, Callable[[], hivi.Target]] = {
    "loop": lambda: hivi.from_log_joint(_loop, LATENT),
    "scalar": lambda: hivi.from_log_joint(_scalar, LATENT),
    "plate": lambda: hivi.from_numpyro(_plate),
    "to_event": lambda: hivi.from_numpyro(_to_event),
}


def chain() -> hivi.Target:
    return hivi.from_log_joint(_by_name, LATENT)


def spelled(name: str) -> hivi.Target:
    if name in ("plate", "to_event") and not hasattr(hivi, "from_numpyro"):
        pytest.skip("no hivi.from_numpyro")
    return SPELLINGS[name]()


KEYS = 64


def gradients(target: hivi.Target, family: str, strategy: Any, keys: int = KEYS) -> np.ndarray:
    """Gradient estimates of four samples each, from the same keys whatever the target: (keys, parameters)."""
    proposal = built(family, target)
    params, static = eqx.partition(proposal, eqx.is_inexact_array)

    def objective(params: Any, key: Array) -> Array:
        return surrogate(eqx.combine(params, static), target, {"z": strategy}, hivi.Elbo(), key, 4)[0]

    found = quick(jax.vmap(jax.grad(objective), (None, 0)))(params, jax.random.split(jax.random.key(1), keys))
    return np.concatenate([np.asarray(x).reshape(keys, -1) for x in jax.tree.leaves(found)], 1)


def variance(gradient: np.ndarray) -> float:
    return float(gradient.var(0, ddof=1).sum())


@pytest.mark.parametrize("name", SPELLINGS)
def test_signals_and_colours_do_not_depend_on_the_spelling(name):
    reference, target = chain(), spelled(name)
    z = {"z": jax.random.bernoulli(jax.random.key(2), shape=(SIZE,)).astype(jnp.int32)}
    found, right = (t.factored.signal("z", (SIZE,), t.terms(z)) for t in (target, reference))
    if name in ("plate", "to_event"):  # the same chain, normalised site by site
        right = right - jax.nn.softplus(FIELD)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    assert site_colours(target, site_programs(target, built("mean-field", target), hivi.Elbo())) == {"z": 2}


@pytest.mark.parametrize("strategy", [hivi.Score(), hivi.LocalExpectation()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", SPELLINGS)
def test_gradients_do_not_depend_on_the_spelling(name, strategy):
    found, right = (gradients(t, "mean-field", strategy) for t in (spelled(name), chain()))
    np.testing.assert_allclose(variance(found), variance(right), rtol=0.01)
    np.testing.assert_allclose(found, right, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("plate", hivi.Score()),
        ("plate", hivi.LocalExpectation()),
        pytest.param("loop", hivi.Score(), marks=pytest.mark.slow),
        pytest.param("loop", hivi.LocalExpectation(), marks=pytest.mark.slow),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_gradients_of_a_hierarchy_do_not_depend_on_the_spelling(name, strategy):
    """The terms of r are local too."""
    found, right = (gradients(t, "hvm mean-field", strategy, 16) for t in (spelled(name), chain()))
    np.testing.assert_allclose(variance(found), variance(right), rtol=0.01)
    np.testing.assert_allclose(found, right, atol=1e-3 * max(1.0, np.abs(right).max()))


@pytest.mark.parametrize("family", ["mean-field", "hvm full-rank", "hvm mean-field"])
def test_colours_of_a_hierarchy(family):
    """r of an inverse flow splits by z_i: two colours remain; the linearised posterior of a full prior couples all."""
    target = chain()
    colours = site_colours(target, site_programs(target, built(family, target), hivi.Elbo()))
    assert colours == {"z": SIZE if family == "hvm full-rank" else 2}


def test_an_exact_expectation_loses_nothing_behind_a_logsumexp():
    """A global scalar costs time (32 colours), not variance; the score function's variance grows."""
    local, hidden = chain(), hivi.from_log_joint(_hidden, LATENT)
    assert site_colours(hidden, site_programs(hidden, built("mean-field", hidden), hivi.Elbo())) == {"z": SIZE}
    found, right = (gradients(t, "mean-field", hivi.LocalExpectation()) for t in (hidden, local))
    np.testing.assert_allclose(found, right, atol=1e-4)
    found, right = (gradients(t, "mean-field", hivi.Score()) for t in (hidden, local))
    assert variance(found) > 3 * variance(right)
    stderr = (found - right).std(0, ddof=1) / np.sqrt(KEYS)
    assert (np.abs((found - right).mean(0)) < 4.5 * stderr).all()


# Differences against brute force, and totals, on random small models


def model(seed: int) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """A random log-density of a (3, 4) site of three values and a scalar one."""
    rng = np.random.default_rng(seed)
    weights = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    matrix = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    order = rng.permutation(4)
    rows = jnp.asarray(rng.integers(0, 3, 6))
    pieces: list[Callable[[Array, Array], Array]] = [
        lambda z, s: weights * z,
        lambda z, s: -jnp.abs(z[1:] - z[:-1]) * 0.7,
        lambda z, s: jnp.where(z[:, :1] == z[:, 1:2], 1.0, 0.2) * s,
        lambda z, s: jnp.sin(z @ matrix),
        lambda z, s: jnp.cos(z[rows].sum(1) + s),
        lambda z, s: z[:, order] * z * 0.3,
        lambda z, s: jnp.tanh(z[:, None, :] - z[None, :, :]).sum() * 0.1,
        lambda z, s: jnp.log1p(z.sum(0)) * s,
        lambda z, s: sum(jnp.exp(-0.5 * z[i, i]) for i in range(3)),
        lambda z, s: jax.scipy.special.logsumexp(z * weights, axis=1),
        lambda z, s: jnp.take_along_axis(weights, z, axis=1),
        lambda z, s: (z[::2] * 1.5 - z[1] / 2.0) ** 2,
        lambda z, s: jnp.pad(z, ((0, 0), (1, 1)))[:, 2:] * z * 0.2,
        lambda z, s: jnp.cumsum(z, 1) * 0.1,
        lambda z, s: z.reshape(2, 6).sum(1) ** 2 * 0.05,
        lambda z, s: jnp.roll(z, 1, axis=1) * weights + s * 0.5,
    ]
    chosen = rng.choice(len(pieces), 4, replace=False)
    scales = rng.uniform(-2, 2, 4)

    def log_density(z: dict[str, Array]) -> dict[str, Array]:
        parts = [float(c) * pieces[k](z["z"], z["s"]) for c, k in zip(scales, chosen, strict=True)]
        return {"first": parts[0].sum() - parts[1].sum() / 3.0, "second": parts[2], "third": -(parts[3] * 2.0)}

    return log_density


def values(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed + 100)
    return {
        "z": jnp.asarray(rng.integers(0, 3, (3, 4)), jnp.int32),
        "s": jnp.asarray(rng.integers(0, 3, ()), jnp.int32),
    }


def sum_of(fn: Callable[..., Any], z: dict[str, Array]) -> Array:
    return total({k: jnp.asarray(v) for k, v in fn(z).items()})


@pytest.mark.parametrize("seed", range(20))
def test_differences_are_those_of_brute_force(seed):
    fn, z = model(seed), values(seed)
    factored: Factored = factorise(fn, z)
    whole = quick(lambda z: sum_of(fn, z))
    np.testing.assert_allclose(factored.total(factored.terms(z)), whole(z), rtol=1e-5, atol=1e-5)
    for site in ("z", "s"):
        moved = (z[site] + jnp.arange(1, 3).reshape((-1,) + (1,) * z[site].ndim)) % 3
        found = quick(lambda z, moved, site=site: factored.differences(site, moved, z))(z, moved)
        right = np.zeros(moved.shape)
        for m, index in itertools.product(range(2), np.ndindex(z[site].shape)):
            other = z | {site: z[site].at[index].set(moved[(m, *index)])}
            right[(m, *index)] = whole(other) - whole(z)
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_signal_holds_every_term_that_touches_its_coordinate(seed):
    """What is left out of the signal does not change when the coordinate does."""
    fn, z = model(seed), values(seed)
    factored = factorise(fn, z)
    whole = quick(lambda z: (sum_of(fn, z), factored.signal("z", (3, 4), factored.terms(z))))
    before, signal = whole(z)
    for index in np.ndindex(3, 4):
        other = z | {"z": z["z"].at[index].set((z["z"][index] + 1) % 3)}
        after, moved = whole(other)
        np.testing.assert_allclose(after - before, (moved - signal)[index], rtol=1e-4, atol=2e-4)


def expression(seed: int) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """A random tree of sums, differences, products and quotients with literals, and changes of shape."""
    rng = np.random.default_rng(seed)
    leaves: list[Callable[[Array], Array]] = [
        jnp.sin, jnp.cos, lambda x: x**2, lambda x: x[:, :1] * 2.0, lambda x: x.sum(), lambda x: x.sum(0), jnp.tanh
    ]  # fmt: skip

    def grow(depth: int) -> Callable[[Array], Array]:
        if depth == 0:
            return leaves[rng.integers(len(leaves))]
        a, b, c = grow(depth - 1), grow(rng.integers(depth)), float(rng.normal())
        kinds: list[Callable[[Array], Array]] = [
            lambda x: a(x) + b(x),
            lambda x: a(x) - b(x),
            lambda x: c * a(x) - b(x) / 1.7,
            lambda x: -a(x) + c,
            lambda x: jnp.transpose(a(x)).sum() + b(x),
            lambda x: jnp.ravel(a(x)) * c,
            lambda x: jnp.squeeze(a(x)[None]) - a(x).sum(),
            lambda x: jnp.broadcast_to(a(x), (3, 4)) * 0.5 if a(x).shape in ((), (3, 4), (4,)) else a(x),
        ]
        grown = kinds[rng.integers(len(kinds))]

        def safe(x: Array) -> Array:
            try:
                return grown(x)
            except (TypeError, ValueError):  # shapes that do not broadcast
                return a(x)

        return safe

    parts = [grow(4) for _ in range(2)]
    return lambda z: {f"part {k}": p(z["x"]) for k, p in enumerate(parts)}


@pytest.mark.parametrize("seed", range(30))
def test_peeling_keeps_totals(seed):
    fn = expression(seed)
    z = {"x": jax.random.normal(jax.random.key(seed), (3, 4))}
    factored = factorise(fn, z)
    found = factored.total(factored.terms(z))
    right = sum_of(fn, z)
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=1e-4)


def test_peeling_visits_a_shared_subexpression_once():
    """Sixty doublings are 2^60 paths; terms stay in the order in which they are written."""

    def fn(z: dict[str, Array]) -> dict[str, Array]:
        x = jnp.sin(z["x"])
        for _ in range(60):
            x = x + 0.5 * x
        return {"sum": jnp.cos(z["y"]) - x + (x + jnp.exp(z["y"])) * 2.0 + 3.0}

    z = {"x": jnp.array([0.1, 0.2]), "y": jnp.array([0.3, 0.4])}
    factored = factorise(fn, z)
    assert [[site for site, _ in f.scope] for f in factored.factors] == [["y"], ["x"], ["y"], []]
    np.testing.assert_allclose([f.weight for f in factored.factors], [1, 1.5**60, 2, 2], rtol=1e-9)
