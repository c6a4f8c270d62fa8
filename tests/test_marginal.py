"""k-hat of the marginal q, and the ladder of bounds."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

import hivi
from hivi import _marginal
from hivi._marginal import pareto_khat
from hivi.diagnostics import bound_ladder, marginal_khat

KEY = jax.random.key(0)


def table() -> hivi.Target:
    logs = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
    return hivi.from_log_joint(lambda z: logs[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)})


def test_khat_of_a_known_tail() -> None:
    """Weights N(0,1)/N(0,s^2), s < 1, have a Pareto tail of shape 1 - s^2."""
    for scale, tolerance in ((0.4, 0.1), (0.8, 0.1)):
        x = scale * np.random.default_rng(0).normal(size=200_000)
        assert pareto_khat(-0.5 * x**2 + 0.5 * (x / scale) ** 2) == pytest.approx(1 - scale**2, abs=tolerance)
    assert pareto_khat(np.zeros(500)) == 0.0


def test_khat_of_ties() -> None:
    """Discrete draws have few distinct weights: bounded ones are no tail, but rare values that weigh much are."""
    rng = np.random.default_rng(0)
    p = np.array([0.02, 0.1, 0.3, 0.4, 0.15, 0.03])
    close = p * np.exp(rng.normal(0, 0.03, 6))
    z = rng.choice(6, 1000, p=close / close.sum())
    assert pareto_khat(np.log(p / close)[z]) < 0.5
    assert pareto_khat(np.r_[np.zeros(997), np.full(3, 0.1)]) == 0.0
    assert pareto_khat(np.r_[np.full(500, -1.0), np.zeros(497), np.full(3, 0.1)]) < 0.5
    assert pareto_khat(np.r_[np.zeros(997), np.full(3, 5.0)]) == np.inf
    assert pareto_khat(np.r_[np.full(500, -1.0), np.zeros(497), np.full(3, 5.0)]) == np.inf


def test_khat_of_mean_field_on_a_correlated_gaussian() -> None:
    """Mean-field has variance 1 - rho^2 in all directions, so k = 1 - (1 - rho^2)/(1 + rho) = rho along the widest."""
    for rho, trusted in ((0.3, True), (0.95, False)):
        precision = jnp.linalg.inv(jnp.array([[1.0, rho], [rho, 1.0]]))
        target = hivi.from_log_joint(lambda z, p=precision: -0.5 * z["x"] @ p @ z["x"], {"x": hivi.Latent((2,))})
        fit = hivi.fit(target, hivi.MeanField(), key=KEY, steps=2000, progress=False)
        found = marginal_khat(fit, key=KEY, samples=10_000)
        assert found.exact
        assert found.trusted is trusted
        assert found.value == pytest.approx(rho, abs=0.2)


def test_khat_does_not_blame_q_for_r() -> None:
    """With the parameters of r spoilt, the bound falls and the k-hat of the marginal stays good."""
    fit = hivi.fit(table(), hivi.Hierarchical(prior=hivi.Flow(2)), key=KEY, steps=2000, progress=False)
    spoilt = jax.tree.map(lambda x: x + 0.3 if eqx.is_inexact_array(x) else x, fit.proposal.auxiliary)
    worse = eqx.tree_at(lambda f: f.auxiliary, fit.proposal, spoilt)
    bad = type(fit)(**{**vars(fit), "proposal": worse})
    assert bad.elbo(KEY, 1000).mean < fit.elbo(KEY, 1000).mean - 0.1
    found = marginal_khat(bad, key=KEY)
    assert not found.exact
    assert 256 <= found.inner <= 4096
    assert found.noise > marginal_khat(fit, key=KEY).noise or found.inner > 256
    assert found.trusted
    assert "draws of lambda" in str(found)


@pytest.mark.slow
def test_ladder_shows_the_gap() -> None:
    fit = hivi.fit(table(), hivi.MeanField(), key=KEY, steps=2000, progress=False)
    ladder = bound_ladder(fit, key=KEY, samples=8192)
    assert [r.bound.draws for r in ladder.rungs] == [1, 8, 64]  # exact log q: no rungs for lambda
    assert ladder.rungs[0].estimate.mean == pytest.approx(-0.2231, abs=0.03)
    assert ladder.gap.mean == pytest.approx(0.2231, abs=0.04)
    hierarchical = hivi.fit(table(), hivi.Hierarchical(prior=hivi.FullRank()), key=KEY, steps=300, progress=False)
    rungs = bound_ladder(hierarchical, key=KEY, samples=2048, inner=(8,), outer=()).rungs
    assert [r.bound.inner for r in rungs] == [0, 8]
    assert rungs[1].estimate.mean > rungs[0].estimate.mean - 3 * rungs[0].estimate.stderr
    mixed = hivi.fit(table(), hivi.Hierarchical(prior=hivi.Mixture(2)), key=KEY, steps=300, progress=False)
    found = bound_ladder(mixed, key=KEY, samples=256, inner=(8,), outer=())
    assert len(found.rungs) == 1 or "mixture prior" in str(found)


def test_refusals(monkeypatch) -> None:
    fit = hivi.fit(table(), hivi.MeanField(), key=KEY, steps=100, progress=False)
    with pytest.raises(hivi.FitError, match="at least 100"):
        marginal_khat(fit, key=KEY, samples=5)
    with monkeypatch.context() as patch:
        for noise, cure in ((0.0, "float64"), (1.0, "auxiliary")):  # an exact density, and an estimate
            far = jnp.full(200, -jnp.inf)
            patch.setattr(
                _marginal, "_densities", lambda *a, n=noise, far=far: far.at[3:].set(-1 - n * jax.random.uniform(a[-1]))
            )
            with pytest.raises(hivi.FitError, match=rf"not finite at 3 of 200 draws of q itself.*{cure}"):
                marginal_khat(fit, key=KEY, samples=200)
    with pytest.raises(hivi.FitError, match="without its target"):
        marginal_khat(type(fit)(**{**vars(fit), "target": None}), key=KEY)
