"""The hierarchy over binary codes: its gradient over every code and draw, its proper weighting, what it can represent."""

from __future__ import annotations

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import TARGETS, perturbed, states, total
from hivi._errors import FamilyError, FitError, TargetError
from hivi._estimators.hierarchical_score import HierarchicalScore
from hivi._estimators.measured import Setting, moments
from hivi._families.product import build_proposal
from hivi._space import Latents
from test_unbiased import Means, assert_agrees, means


def proposal_of(target: hivi.Target, bits: int = 2) -> Any:
    built = build_proposal(hivi.Codes(bits=bits), target.sites, jax.random.key(0))
    return perturbed(built, jax.random.key(1), 0.4)


def every_code(bits: int) -> Array:
    return jnp.array(list(itertools.product((0, 1), repeat=bits)))


def at_code(own: Any, key: Array, branch: Array | int, given: Latents) -> tuple[Latents, Any]:
    """A draw whose code is given, too."""
    _, context = own.given_code(given["code"], key)
    return {"z": given["z"]}, context


def every_mean(target: hivi.Target, strategy: Any, bound: Any, samples: int) -> Means:
    """The mean bound and gradient over all codes and draws, exactly and through the surrogate."""
    above = {"code": every_code(2)}
    return means(target, proposal_of(target), {"z": strategy}, bound, samples, 13, at_code, above)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("strategy", [hivi.LocalExpectation(), hivi.Score(), hivi.Score(baseline=hivi.MovingAverage())])
def test_gradient_has_the_right_mean(strategy, samples):
    target = TARGETS["pair"]()
    assert_agrees(every_mean(target, strategy, hivi.Elbo(), samples))


def test_gradient_of_a_multi_sample_bound_has_the_right_mean():
    target = TARGETS["pair"]()
    assert_agrees(every_mean(target, hivi.Score(), hivi.ImportanceWeighted(outer=2), 1))


def test_control_a_signal_without_log_p_is_noticed(monkeypatch):
    """The local signal of a bit lacks log p, though z is drawn below it: the term that must not be dropped."""
    from hivi._estimators.base import Evaluation

    monkeypatch.setattr(
        Evaluation, "total", lambda self: self.parts[1].sign * self.parts[1].factored.total(self.parts[1].terms)
    )
    target = TARGETS["pair"]()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agrees(every_mean(target, hivi.LocalExpectation(), hivi.Elbo(), 1))


BITS_BY = {
    "hierarchical score": HierarchicalScore(),
    "local expectation": hivi.LocalExpectation(),
    "DisARM": hivi.DisARM(),
    "moving average": hivi.Score(baseline=hivi.MovingAverage()),
    "learned": hivi.Score(baseline=hivi.Learned()),
}
"""Strategies of the bits; z below a moved code is drawn anew, so that the mean is over that draw, too."""


def exact_gradient(target: hivi.Target, proposal: Any) -> Array:
    """Of the bound of eq. 5, summed over every code and every z."""
    params, static = eqx.partition(proposal, eqx.is_inexact_array)
    grid, codes = states(target.sites)["z"], every_code(2)

    def bound(p: Any) -> Array:
        own = eqx.combine(p, static)

        def at(z: Array, code: Array) -> Array:
            _, context = own.given_code(code, jax.random.key(0))
            latents = {"z": z, **own.hidden(context)}
            given = own.conditionals(context)
            log_q = sum(jnp.sum(c.likelihood.log_prob(c.lam, latents[n])) for n, c in given.items())
            weight = target.log_joint({"z": z}) - total(own.log_q(latents, context, jax.random.key(0)), {})
            return jnp.exp(log_q) * weight

        return jnp.sum(jax.vmap(lambda z: jax.vmap(lambda c: at(z, c))(codes))(grid))

    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(jax.grad(bound)(params))])


@pytest.mark.parametrize("name", [n if n == "DisARM" else pytest.param(n, marks=pytest.mark.slow) for n in BITS_BY])
def test_strategies_of_the_bits(name):
    """By simulation: 20,000 gradients against the exact one, precise to a thirtieth of its length."""
    target, key = TARGETS["pair"](), jax.random.key(3)
    proposal = proposal_of(target)
    exact = exact_gradient(target, proposal)
    chosen = {"z": hivi.LocalExpectation(), "code of z": BITS_BY[name]}
    mean, variance = moments(Setting(target, proposal, hivi.Elbo(), 2), chosen, key, 20_000)
    stderr = jnp.sqrt(variance / 20_000)
    assert float(jnp.linalg.norm(stderr)) < 0.03 * float(jnp.linalg.norm(exact))
    assert float(jnp.max(jnp.abs(mean - exact) / stderr)) < 4.5


def test_a_user_chooses_the_strategy_of_the_bits():
    target = TARGETS["pair"]()
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 100, "progress": False}
    fit = hivi.fit(target, hivi.Codes(bits=2), estimator={"code of z": hivi.DisARM()}, **options)
    assert fit.strategies == {"z": "LocalExpectation", "code of z": "DisARM"}
    assert "code of z" in hivi.Auto().explain(target, hivi.Codes(bits=2))
    with pytest.raises(FitError, match="other draws depend on it"):
        hivi.fit(target, hivi.Codes(bits=2), estimator={"code of z": hivi.Enumeration()}, **options)
    with pytest.raises(TargetError, match="did you mean 'code of z'"):
        hivi.fit(target, hivi.Codes(bits=2), estimator={"code of y": hivi.DisARM()}, **options)


def test_log_density_is_that_of_the_mixture_over_all_codes():
    target = TARGETS["chain"]()
    p = proposal_of(target, bits=3)
    grid = states(target.sites)["z"]
    codes = every_code(3)

    def joint(z: Array, code: Array) -> Array:
        _, context = p.given_code(code, jax.random.key(0))
        given, latents = p.conditionals(context), {"z": z, **p.hidden(context)}
        return sum(jnp.sum(c.likelihood.log_prob(c.lam, latents[n])) for n, c in given.items())

    exact = jax.scipy.special.logsumexp(jax.vmap(lambda z: jax.vmap(lambda c: joint(z, c))(codes))(grid), axis=1)
    found = jax.vmap(lambda z: p.log_density({"z": z}, jax.random.key(2), 20_000))(grid)
    np.testing.assert_allclose(np.exp(exact).sum(), 1.0, atol=1e-5)
    np.testing.assert_allclose(found, exact, atol=0.03)


def test_one_bit_keeps_both_modes():
    """Four bits that agree or differ together: mean-field keeps one of the two modes, one code bit both."""

    def log_joint(z: Latents) -> Array:
        spins = 2.0 * z["z"] - 1
        return 0.75 * jnp.sum(spins) ** 2 / 2

    target = hivi.from_log_joint(log_joint, {"z": hivi.Latent((4,), constraints.boolean)})
    log_z = float(
        jax.scipy.special.logsumexp(jax.vmap(lambda z: target.log_joint({"z": z}))(states(target.sites)["z"]))
    )
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 3000, "progress": False}
    flat_fit = hivi.fit(target, hivi.MeanField(), **options)
    fit = hivi.fit(target, hivi.Codes(bits=1, spread=2.0), **options)
    gaps = [log_z - f.elbo(jax.random.key(1)).mean for f in (flat_fit, fit)]
    assert gaps[0] > 0.6
    assert 0 <= gaps[1] + 0.01 < 0.15
    draws = np.asarray(fit.sample(jax.random.key(2), 400)["z"])
    assert set(fit.sample(jax.random.key(2), 2)) == {"z"}
    assert 0.3 < (draws.mean(1) > 0.5).mean() < 0.7


def test_saved_and_loaded(tmp_path):
    target = TARGETS["pair"]()
    fit = hivi.fit(target, hivi.Codes(bits=2), key=jax.random.key(0), steps=100, progress=False)
    fit.save(tmp_path / "run")
    again = hivi.load(tmp_path / "run")
    np.testing.assert_array_equal(again.sample(jax.random.key(1), 20)["z"], fit.sample(jax.random.key(1), 20)["z"])


def test_in_a_product_and_refusals():
    target = TARGETS["mixed"]()
    family = {"z": hivi.Codes(bits=1), "x": hivi.MeanField()}
    fit = hivi.fit(target, family, key=jax.random.key(0), steps=200, progress=False)
    assert np.isfinite(fit.elbo(jax.random.key(1)).mean)
    with pytest.raises(FamilyError, match=r"Codes\(bits"):
        hivi.Codes(bits=0)
    with pytest.raises(FamilyError, match="inner=2"):
        hivi.fit(
            TARGETS["pair"](),
            hivi.Codes(),
            key=jax.random.key(0),
            bound=hivi.ImportanceWeighted(inner=2),
            progress=False,
        )
