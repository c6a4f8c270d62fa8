"""`Auto` by measurement: what it counts, what it measures, and that it takes the best."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import TARGETS, built, perturbed
from hivi._errors import LoadError
from hivi._estimators.auto import label
from hivi._estimators.base import Fixed
from hivi._estimators.cost import operations
from hivi._estimators.measured import Setting, settle
from hivi._families.product import build_proposal
from hivi._fit import loop


def spins(n: int = 8) -> hivi.Target:
    """Every pair of spins is coupled: exact local expectations cost n evaluations."""
    couplings = jnp.triu(jax.random.normal(jax.random.key(0), (n, n)), 1) / np.sqrt(n)

    def log_joint(z: Any) -> Array:
        value = 2.0 * z["z"] - 1.0
        return value @ couplings @ value

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((n,), constraints.boolean)})


def test_operations_are_counted():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert operations(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert operations(lambda x: jnp.sum(jnp.exp(x) + 1), a) == 3 * 12
    assert operations(lambda x: jax.lax.fori_loop(0, 7, lambda _, v: v * x, x), a) >= 7 * 12
    assert operations(jax.jit(lambda x: x * x), a) == 12
    flow = built("hvm planar", TARGETS["pair"]())  # a family with static parts
    assert operations(lambda p, k: p.propose(k)[0]["z"], flow, jax.random.key(0)) > 100


def test_auto_takes_the_best_product_and_shows_the_table():
    target, family, auto = spins(), hivi.MeanField(), hivi.Auto(budget=4)
    assert auto.undecided(target, built_mean_field(target), hivi.Elbo()) == ("z",)
    key = jax.random.key(0)
    (found,) = auto.measure(target, built_mean_field(target), hivi.Elbo(), 4, key)
    names = [type(m.strategy).__name__ for m in found]
    assert sorted(names) == ["DisARM", "DoubleControlVariates", "Score"], "exact strategies are over the budget"
    assert [m.product for m in found] == sorted(m.product for m in found)
    assert found[0].product < 0.3 * next(m.product for m in found if isinstance(m.strategy, hivi.Score))
    table = auto.explain(target, family, key=key, samples=4)
    assert "a fit measures" in table
    assert all(n in table for n in names)
    options: dict[str, Any] = {"key": key, "steps": 200, "samples": 4, "tolerance": None, "progress": False}
    fit, again = (hivi.fit(target, family, estimator=auto, **options) for _ in range(2))
    assert fit.strategies["z"] != "Score"
    np.testing.assert_array_equal(fit.history["elbo"], again.history["elbo"])


def test_a_resumed_run_does_not_measure_again(tmp_path, monkeypatch):
    target = spins()
    options: dict[str, Any] = {
        "key": jax.random.key(0),
        "steps": 200,
        "samples": 4,
        "tolerance": None,
        "progress": False,
    }
    auto = hivi.Auto(budget=4)
    first = hivi.fit(target, hivi.MeanField(), estimator=auto, checkpoint=tmp_path, **options)
    monkeypatch.setattr(loop, "_measured", lambda *_: pytest.fail("measured again"))
    again = hivi.fit(target, hivi.MeanField(), estimator=auto, checkpoint=tmp_path, **options)
    assert again.strategies == first.strategies != {"z": "Score"}
    np.testing.assert_array_equal(again.history["elbo"], first.history["elbo"])
    with pytest.raises(LoadError, match="another configuration"):
        hivi.fit(target, hivi.MeanField(), estimator=hivi.LocalExpectation(), checkpoint=tmp_path, **options)


def test_small_models_are_not_measured():
    """A site of 20 values costs 19 evaluations: measured only where each of them is work."""
    interval = constraints.integer_interval(0, 19)
    target = hivi.from_log_joint(lambda z: -0.5 * (z["n"] - 7.0) ** 2, {"n": hivi.Latent((), interval)})
    proposal = built_mean_field(target)
    assert hivi.Auto().undecided(target, proposal, hivi.Elbo()) == ()
    assert hivi.Auto(work=10).undecided(target, proposal, hivi.Elbo()) == ("n",)
    assert hivi.Auto(cheap=0).undecided(target, proposal, hivi.Elbo()) == ("n",)
    data = jnp.arange(10_000.0)
    heavy = hivi.from_log_joint(
        lambda z, y: -0.5 * jnp.sum((z["n"] - y) ** 2), {"n": hivi.Latent((), interval)}, data=data
    )
    assert hivi.Auto().undecided(heavy, built_mean_field(heavy), hivi.Elbo()) == ("n",)


def built_mean_field(target: hivi.Target) -> Any:
    return build_proposal(hivi.MeanField(), target.sites, jax.random.key(0))


def test_auto_measures_exact_strategies_within_the_budget():
    target = spins(4)
    proposal = perturbed(built_mean_field(target), jax.random.key(1), 0.7)
    (found,) = hivi.Auto(cheap=0).measure(target, proposal, hivi.Elbo(), 2, jax.random.key(0))
    names = {label(m.strategy) for m in found}
    assert {"LocalExpectation", "LocalExpectation(coupled=True)", "DisARM", "Score"} <= names


def test_auto_measures_nothing_that_is_cheap():
    target = TARGETS["chain"]()
    assert hivi.Auto().undecided(target, built("mean-field", target), hivi.Elbo()) == ()
    assert "nothing to measure" in hivi.Auto().explain(target, hivi.MeanField(), key=jax.random.key(0))


def test_dead_code_is_not_counted():
    a = jnp.ones((30, 40))
    assert operations(lambda x: (jnp.exp(x), jnp.sum(x))[1], a) == 30 * 40


def test_sites_that_a_dict_leaves_out_are_measured():
    target = two_glasses()
    estimator = Fixed({"v": hivi.DisARM()}, hivi.Auto(budget=2, cheap=0))
    proposal = perturbed(built_mean_field(target), jax.random.key(1), 0.7)
    assert estimator.undecided(target, proposal, hivi.Elbo()) == ("u",)
    before = estimator.resolve(target, proposal, hivi.Elbo())
    after = settle(before, ("u",), Setting(target, proposal, hivi.Elbo(), 2), jax.random.key(0))
    assert label(before["u"]) == "Score"
    assert label(after["u"]) != "Score"
    assert after["v"] == hivi.DisARM()


def two_glasses(n: int = 5) -> hivi.Target:
    """Two sites of spins, every pair coupled."""
    couplings = jnp.triu(jax.random.normal(jax.random.key(0), (2 * n, 2 * n)), 1)

    def log_joint(z: Any) -> Array:
        value = 2.0 * jnp.concatenate([z["u"], z["v"]]) - 1.0
        return value @ couplings @ value

    return hivi.from_log_joint(log_joint, {k: hivi.Latent((n,), constraints.boolean) for k in ("u", "v")})


def test_a_model_without_a_derivative_is_measured_all_the_same():
    """A loop of unknown length has no reverse derivative: control variates are passed over, not the fit."""

    def log_joint(z: Any) -> Array:
        start = (jnp.array(0), jnp.sum(2.0 * z["z"] - 1.0) ** 2)
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 0.5 * c[1]), start)[1]

    target = hivi.from_log_joint(log_joint, {"z": hivi.Latent((5,), constraints.boolean)})
    (found,) = hivi.Auto(budget=2).measure(target, built_mean_field(target), hivi.Elbo(), 2, jax.random.key(0))
    assert {label(m.strategy) for m in found} == {"DisARM", "Score"}
