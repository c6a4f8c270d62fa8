"""`Auto` by measurement: what it counts, what it measures, and that it takes the best."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import TARGETS, built, perturbed
from hivi._estimators.auto import label
from hivi._estimators.cost import operations
from hivi._families.product import build_proposal


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
