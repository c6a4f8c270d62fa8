"""Sums over what each factor touches: every element sees all of its own, no noise at mean-field, no bias anywhere."""

from __future__ import annotations

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints

import hivi
from cases import BOUNDS, TARGETS, built
from hivi._estimators.base import Evaluation, Part
from hivi._estimators.factor_expectation import _group
from hivi._estimators.measured import Setting, moments
from hivi._factored import factorise
from hivi._locality.covering import _cover, covering, touched
from test_unbiased import assert_agrees, means

KEY = jax.random.key(0)


def spins(shape: tuple[int, ...], *, ring: bool = False, field: bool = False) -> hivi.Target:
    """Neighbours along every axis are coupled; with `field`, a factor that touches all of them too."""

    def log_joint(z: Any) -> dict[str, Array]:
        s, out = 2.0 * z["z"] - 1.0, {"own": 0.3 * z["z"]}
        for axis in range(len(shape)):
            n = shape[axis]
            after = jnp.roll(s, -1, axis) if ring else jax.lax.slice_in_dim(s, 1, n, axis=axis)
            before = s if ring else jax.lax.slice_in_dim(s, 0, n - 1, axis=axis)
            out[f"along {axis}"] = 0.5 * before * after
        return out | ({"all": jnp.tanh(jnp.sum(s) - 0.5)} if field else {})

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent(shape, constraints.boolean)})


def regimes(y: Any) -> None:
    """Hidden regimes: three of them, one after the other."""
    change = jnp.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.05, 0.15, 0.8]])

    def step(before: Any, now: Any) -> tuple[Any, None]:
        z = numpyro.sample("z", dist.Categorical(change[before]))
        numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=now)
        return z, None

    scan(step, 0, y)


def table_of(width: int) -> hivi.Target:
    """One factor that touches all coordinates."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(2,) * width), jnp.float32)
    return hivi.from_log_joint(lambda z: table[tuple(z["z"])], {"z": hivi.Latent((width,), dist.constraints.boolean)})


# Coverings

GROUPS = {
    "pair": (2, 2, [(0, 1)]),
    "ring of three, three values": (3, 3, [(0, 1), (1, 2), (0, 2)]),
    "all pairs of 20": (20, 2, list(itertools.combinations(range(20), 2))),
    "all triples of 7": (7, 2, list(itertools.combinations(range(7), 3))),
    "of different sizes": (6, 3, [(0,), (0, 1), (1, 2, 3), (2, 3), (4, 5)]),
}
ROWS = {
    "pair": 4,
    "ring of three, three values": 10,
    "all pairs of 20": 11,
    "all triples of 7": 16,
    "of different sizes": 27,
}


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_sees_all_its_values(name):
    colours, count, groups = GROUPS[name]
    rows = _cover(groups, colours, count, 64)
    assert len(rows) <= ROWS[name]
    assert rows.min() >= 0
    assert rows.max() < count
    for group in groups:
        assert len({tuple(r) for r in rows[:, group].tolist()}) == count ** len(group)
    assert _cover(groups, colours, count, count ** max(map(len, groups)) - 1) is None, "fewer cannot do"


def test_few_evaluations_serve_large_sites():
    sizes = {}
    for name, target in {
        "lattice": spins((16, 16), ring=True), "odd ring": spins((5,), ring=True), "chain": spins((100,)),
    }.items():  # fmt: skip
        site = target.sites[0]
        found = covering([(target.factored.factors, ())], "z", site.shape, 2, 64)
        sizes[name] = len(found.rows)
        # Each scope's values are counted once: over the rows that show the same, shares add up to one.
        np.testing.assert_allclose((1 / found.times).sum(0), 2.0 ** (found.scopes >= 0).sum(1))
    assert sizes == {"lattice": 4, "odd ring": 4, "chain": 4}


@pytest.mark.parametrize("ring", [False, True])
def test_scopes_are_what_the_elements_depend_on(ring):
    target = spins((3, 4), ring=ring)
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.integers(0, 2, (3, 4)), jnp.int32)
    before = target.factored.terms({"z": z}, None, {})
    moved = [target.factored.terms({"z": z.reshape(-1).at[i].add(1).reshape(3, 4)}, None, {}) for i in range(12)]
    for number, factor in enumerate(target.factored.factors):
        found = touched(factor, "z", (3, 4), 8)
        change = np.stack([np.asarray(m[number] - before[number]).reshape(-1) for m in moved])
        for element, scope in enumerate(found):
            assert set(np.flatnonzero(change[:, element]).tolist()) == set(scope[scope >= 0].tolist())
    assert touched(target.factored.factors[-1], "z", (3, 4), 1) is None


# The mean

CASES = [
    ("chain", "mean-field", "elbo"),
    ("chain", "mixture", "elbo"),
    ("chain", "hvm full-rank", "elbo"),
    ("chain", "hvm planar, semi-implicit", "inner 2"),
    ("categorical", "mean-field", "elbo"),
    ("categorical", "hvm full-rank", "elbo"),
]


@pytest.mark.parametrize(("target", "family", "bound"), CASES)
def test_gradient_has_the_right_mean(target, family, bound, x64):
    problem = TARGETS[target]()
    assert_agrees(means(problem, built(family, problem), {"z": hivi.FactorExpectation()}, BOUNDS[bound], 1))


@pytest.mark.parametrize("family", ["mean-field", "hvm full-rank"])
def test_factors_that_touch_all_get_their_local_expectation(family, x64):
    problem = spins((6,), field=True)
    strategies = {"z": hivi.FactorExpectation(states=8)}
    found = covering([(problem.factored.factors, ())], "z", (6,), 2, 8)
    assert sum(o is None for o in found.owners) == 1
    assert_agrees(means(problem, built(family, problem), strategies, BOUNDS["elbo"], 1))


def test_control_a_wrong_share_is_found(x64, monkeypatch):
    problem = TARGETS["chain"]()
    plain = hivi.FactorExpectation.measure

    def wrong(self: Any, *args: Any) -> Any:
        (weights, change), wide = plain(self, *args)
        return (weights.at[0].multiply(1.1), change), wide

    monkeypatch.setattr(hivi.FactorExpectation, "measure", wrong)
    with pytest.raises(AssertionError):
        assert_agrees(means(problem, built("mean-field", problem), {"z": hivi.FactorExpectation()}, BOUNDS["elbo"], 1))


def gradients(target: hivi.Target, strategy: Any, family: str = "mean-field", count: int = 32) -> Array:
    """Mean and variance of gradients."""
    return moments(Setting(target, built(family, target), hivi.Elbo(), 2), {"z": strategy}, KEY, count)


@pytest.mark.parametrize(
    "make", [lambda: spins((3, 4), ring=True), lambda: hivi.from_numpyro(regimes, jnp.array([0.1, 2.0, 4.2, 3.0, 0.4]))],
    ids=["lattice", "regimes"],
)  # fmt: skip
def test_mean_field_has_no_noise_and_the_gradient_of_all_states(make):
    target = make()
    mean, variance = gradients(target, hivi.FactorExpectation())
    exact, _ = gradients(target, hivi.Enumeration())
    np.testing.assert_allclose(mean, exact, atol=2e-5)
    assert float(variance.sum()) < 1e-4 * float(gradients(target, hivi.LocalExpectation())[1].sum())


def pairs(y: Any) -> None:
    """Two coupled units a row."""
    with numpyro.plate("rows", len(y)):
        a = numpyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(a[:, 0] * (1 + a[:, 1]), 1.0), obs=y)


def test_rows_in_minibatches():
    """Their sums are over four joint values, at the plate's scale."""
    y = jnp.asarray(np.random.default_rng(1).normal(size=6), jnp.float32)
    whole, parts = hivi.from_numpyro(pairs, y), hivi.from_numpyro(pairs, y, subsample={"rows": 2})
    exact, noise = gradients(whole, hivi.FactorExpectation())
    assert float(noise.sum()) < 1e-8
    family = built("mean-field", parts)
    np.testing.assert_array_equal(family.lam["z"], built("mean-field", whole).lam["z"])
    mean, variance = moments(Setting(parts, family, hivi.Elbo(), 1), {"z": hivi.FactorExpectation()}, KEY, 3000)
    np.testing.assert_array_less(abs(mean - exact), 4.5 * np.sqrt(variance / 3000) + 1e-6)


def test_impossible_values_of_no_weight_are_no_obstacle():
    table = jnp.log(jnp.array([[0.0, 0.0], [0.2, 0.8]]))
    target = hivi.from_log_joint(
        lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), dist.constraints.boolean)}
    )
    proposal = eqx.tree_at(lambda p: p.lam, built("mean-field", target), {"z": jnp.array([[200.0], [0.3]])})
    gradient = moments(Setting(target, proposal, hivi.Elbo(), 2), {"z": hivi.FactorExpectation()}, KEY, 8)[0]
    share = jax.nn.sigmoid(0.3)
    np.testing.assert_allclose(gradient, [0.0, share * (1 - share) * (jnp.log(0.8 / 0.2) - 0.3)], atol=1e-6)


def test_auto_takes_it_where_it_is_right():
    """At mean-field under the ELBO, and nowhere where sums over parts of the log-weight would be biased."""
    target, strategy = spins((6, 6)), hivi.FactorExpectation()
    flat, mixed = built("mean-field", target), built("mixture", target)
    bounds = (hivi.Elbo(), hivi.ImportanceWeighted(1), hivi.ImportanceWeighted(4))
    found = [hivi.Auto().resolve(target, flat, b)["z"] for b in bounds]
    assert found == [strategy, strategy, hivi.LocalExpectation()]
    assert hivi.Auto().resolve(target, mixed, hivi.ImportanceWeighted(1))["z"] == hivi.LocalExpectation()
    wide = spins((5,), field=True)
    assert hivi.Auto().resolve(wide, built("mean-field", wide), hivi.Elbo())["z"] == hivi.LocalExpectation()


def test_what_it_refuses():
    options: dict[str, Any] = {"key": KEY, "steps": 5, "progress": False}
    strategy = hivi.FactorExpectation(states=16)
    with pytest.raises(hivi.FitError, match=r"'z'.*can cover no factor.*states=32.*LocalExpectation"):
        hivi.fit(table_of(5), hivi.MeanField(), estimator=strategy, **options)
    with pytest.raises(hivi.FitError, match=r"'z'.*linear"):
        hivi.fit(
            TARGETS["chain"](), hivi.MeanField(), estimator=strategy, bound=hivi.ImportanceWeighted(outer=3), **options
        )
    rows = hivi.from_numpyro(pairs, jnp.zeros(4))
    with pytest.raises(hivi.FitError, match=r"'z'.*row by row"):
        hivi.fit(rows, hivi.MeanField(), estimator=strategy, bound=hivi.ImportanceWeighted(1, plate="rows"), **options)
    with pytest.raises(hivi.FitError, match=r"'z'.*no table"):
        hivi.fit(TARGETS["counts"](), hivi.MeanField(), estimator=strategy, **options)
    with pytest.raises(hivi.FitError, match=r"FactorExpectation\(states=...\).*at least 4"):
        hivi.FactorExpectation(states=3)
    with pytest.raises(hivi.FitError, match=r"found 100000; expected at most 4096.*LocalExpectation"):
        hivi.FactorExpectation(states=100_000)
    with pytest.raises(hivi.FitError, match=r"'z'.*can cover no factor.*by pairs"):
        hivi.fit(table_of(13), hivi.MeanField(), estimator=strategy, **options)


def test_closed_forms_of_differences_stay_apart():
    """A term whose differences have a closed form is not evaluated row by row, but that form is used."""

    def log_p(z: Any) -> dict[str, Array]:
        s = 2.0 * z["z"] - 1.0
        return {"chain": 0.5 * s[1:] * s[:-1], "ends": 0.7 * s[:1] * s[-1:]}

    def closed(z: Any, value: Any) -> Array:
        change = 0.7 * 2.0 * (value - z["z"])
        return change * jnp.zeros(4).at[0].set(2.0 * z["z"][-1] - 1.0).at[-1].set(2.0 * z["z"][0] - 1.0)

    z = {"z": jnp.array([0, 1, 1, 0])}
    parts = []
    for overrides in ({}, {("ends", "z"): closed}):
        factored = factorise(log_p, z, overrides=overrides)
        part = Part(1.0, factored, factored.terms(z), ((None, z),))
        parts.append((covering([_group(part, "z")], "z", (4,), 2, 64), Evaluation(z, (part,))))
    (whole, plain), (found, own) = parts
    assert [o is None for o in whole.owners] == [False, False]
    assert [o is None for o in found.owners] == [False, True]
    moved = 1 - z["z"][None]
    assert not np.allclose(own.differences("z", moved, [(1,)]), 0)
    np.testing.assert_allclose(own.differences("z", moved, [(1,)]), plain.differences("z", moved, [(1,)]), rtol=1e-6)
    np.testing.assert_allclose(
        own.differences("z", moved, [(0,)]) + own.differences("z", moved, [(1,)]),
        plain.differences("z", moved),
        atol=1e-6,
    )
