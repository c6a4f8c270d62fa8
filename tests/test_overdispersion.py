"""Negative-binomial q for counts: gradients of the bound, what it gains, and refusals."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from numpyro.distributions import NegativeBinomial2, constraints

import hivi
from hivi._errors import FamilyError, FitError
from hivi._estimators.surrogate import surrogate
from hivi._families.product import build_proposal


def wide() -> hivi.Target:
    """A geometric-like count with mean 3 and variance 12, normalised."""
    prior = NegativeBinomial2(3.0, 1.0)
    return hivi.from_log_joint(
        lambda z: prior.log_prob(z["z"]), {"z": hivi.Latent((), constraints.nonnegative_integer)}
    )


def gap(family: Any) -> float:
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 1500, "progress": False}
    return -hivi.fit(wide(), family, **options).elbo(jax.random.key(1), samples=20_000).mean


@pytest.mark.slow
def test_the_right_concentration_is_exact_and_poisson_is_not():
    assert abs(gap(hivi.MeanField(concentration=1.0))) < 0.01
    assert gap(hivi.MeanField()) > 0.2


def test_gradient_against_the_sum_over_the_support():
    target, z = wide(), jnp.arange(400)
    proposal = build_proposal(hivi.MeanField(concentration=2.5), target.sites, jax.random.key(0))

    def exact(p: Any) -> Array:
        given = p.conditionals(p.parameters())["z"]
        log_q = given.likelihood.log_prob(jnp.broadcast_to(given.lam, (400, 1)), z)
        log_p = jax.vmap(lambda v: target.log_joint({"z": v}))(z)
        return jnp.sum(jnp.exp(log_q) * (log_p - log_q))

    def draw(key: Array, strategy: Any) -> Array:
        return eqx.filter_grad(lambda p: surrogate(p, target, {"z": strategy}, hivi.Elbo(), key, 2)[0])(proposal).lam[
            "z"
        ]

    right = float(eqx.filter_grad(exact)(proposal).lam["z"][0])
    keys = jax.random.split(jax.random.key(3), 20_000)
    for strategy in (hivi.Difference(), hivi.Score()):
        found = np.asarray(jax.jit(jax.vmap(lambda k, s=strategy: draw(k, s)))(keys), float)[:, 0]
        stderr = found.std(ddof=1) / np.sqrt(len(found))
        assert stderr < 0.05 * abs(right), "not precise enough to judge"
        assert abs(found.mean() - right) < 4.5 * stderr


@pytest.mark.slow
def test_a_hierarchy_takes_it_and_a_saved_run_keeps_it(tmp_path):
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 200, "progress": False}
    family = hivi.Hierarchical(prior=hivi.FullRank(), concentration=1.0)
    fit = hivi.fit(wide(), family, **options)
    fit.save(tmp_path / "run")
    again = hivi.load(tmp_path / "run")
    np.testing.assert_array_equal(again.sample(jax.random.key(1), 50)["z"], fit.sample(jax.random.key(1), 50)["z"])


def test_refusals():
    with pytest.raises(FamilyError, match="concentration"):
        hivi.fit(wide(), hivi.MeanField(concentration=-1.0), key=jax.random.key(0), progress=False)
    fit = hivi.fit(wide(), hivi.MeanField(concentration=1.0), key=jax.random.key(0), steps=50, progress=False)
    with pytest.raises(FitError, match="negative-binomial"):
        hivi.curvature(fit, key=jax.random.key(0))
