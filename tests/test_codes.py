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
from cases import TARGETS, perturbed, quick, states
from hivi._errors import FamilyError
from hivi._estimators.surrogate import surrogate
from hivi._families.base import AbstractProposal, Conditional
from hivi._families.codes import CodesProposal
from hivi._families.product import build_proposal
from hivi._space import Latents
from test_unbiased import Means, agree, flat, keys_of


class ForcedCodes(AbstractProposal):
    """Draw number i, known by its key, takes code i and value i."""

    sites: tuple[Any, ...] = eqx.field(static=True)
    own: CodesProposal
    keys: Array
    codes: Array
    values: dict[str, Array]

    def propose(self, key: Array, branch: Array | int = 0) -> tuple[Latents, Any]:
        number = jnp.argmax(jnp.all(jax.random.key_data(key) == self.keys, -1))
        z, context = self.own.given_code(self.codes[number], key)
        return {**z, **{n: v[number] for n, v in self.values.items()}}, context

    def hidden(self, context: Any) -> Latents:
        return self.own.hidden(context)

    def log_q(self, z: Latents, context: Any, key: Array, inner: int = 0) -> dict[str, Array]:
        return self.own.log_q(z, context, key, inner)

    def log_density(self, z: Latents, key: Array, samples: int = 1) -> Array:
        return self.own.log_density(z, key, samples)

    def conditionals(self, context: Any) -> dict[str, Conditional]:
        return self.own.conditionals(context)


def proposal_of(target: hivi.Target, bits: int = 2) -> Any:
    built = build_proposal(hivi.Codes(bits=bits), target.sites, jax.random.key(0))
    return perturbed(built, jax.random.key(1), 0.4)


def every_mean(target: hivi.Target, proposal: Any, chosen: Any, bound: Any, samples: int) -> Means:
    """The mean bound and gradient over all codes and draws, exactly and through the surrogate."""
    params, static = eqx.partition(proposal, eqx.is_inexact_array)
    grid = states(target.sites)["z"]
    codes = jnp.array(list(itertools.product((0, 1), repeat=proposal.effect.shape[1])))
    pairs = list(itertools.product(range(len(codes)), range(len(grid))))
    which, value = (jnp.array(x) for x in zip(*pairs, strict=True))
    draws = samples * bound.draws
    every = jnp.array(list(itertools.product(range(len(pairs)), repeat=draws)))

    def table(p: Any) -> tuple[Array, Array]:
        def at(code: Array, z: Array) -> tuple[Array, Array]:
            _, context = p.given_code(code, jax.random.key(0))
            given = p.conditionals(context)
            latents = {"z": z}
            log_w = target.log_joint(latents) - sum(
                jnp.sum(t) for t in p.log_q(latents, context, jax.random.key(0)).values()
            )
            everything = {**latents, **p.hidden(context)}
            log_q = sum(jnp.sum(c.likelihood.log_prob(c.lam, everything[n])) for n, c in given.items())
            return log_w, log_q

        return jax.vmap(at)(codes[which], grid[value])

    def exact(q: Any) -> Array:
        log_w, log_q = table(eqx.combine(q, static))
        one = jnp.array(list(itertools.product(range(len(pairs)), repeat=bound.draws)))
        weight = jnp.exp(jnp.sum(log_q[one], 1))
        return jnp.sum(weight * bound.value(log_w[one][..., None], jnp.zeros(1)))

    def found(q: Any, log_q: Array) -> Array:
        own, key = eqx.combine(q, static), jax.random.key(0)
        keys = jax.random.key_data(keys_of(key, (samples, bound.draws, 1)).draw)

        def at(numbers: Array) -> Array:
            forced = ForcedCodes(own.sites, own, keys, codes[which][numbers], {"z": grid[value][numbers]})
            return surrogate(forced, target, chosen, bound, key, samples)[0]

        return jnp.sum(jnp.exp(jnp.sum(log_q[every], 1)) * jax.vmap(at)(every))

    log_q = jax.lax.stop_gradient(table(proposal)[1])
    a = quick(jax.value_and_grad(exact))(params)
    b = quick(jax.value_and_grad(found))(params, log_q)
    return Means((a[0], flat(a[1])), (b[0], flat(b[1])))


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("strategy", [hivi.LocalExpectation(), hivi.Score(), hivi.Score(baseline=hivi.MovingAverage())])
def test_gradient_has_the_right_mean(strategy, samples):
    target = TARGETS["pair"]()
    agree(every_mean(target, proposal_of(target), {"z": strategy}, hivi.Elbo(), samples))


def test_gradient_of_a_multi_sample_bound_has_the_right_mean():
    target = TARGETS["pair"]()
    agree(every_mean(target, proposal_of(target), {"z": hivi.Score()}, hivi.ImportanceWeighted(outer=2), 1))


def test_control_a_signal_without_log_p_is_noticed(monkeypatch):
    """The local signal of a bit lacks log p, though z is drawn below it: the term that must not be dropped."""
    from hivi._estimators.base import Evaluation

    monkeypatch.setattr(
        Evaluation, "total", lambda self: self.parts[1].sign * self.parts[1].factored.total(self.parts[1].terms)
    )
    target = TARGETS["pair"]()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        agree(every_mean(target, proposal_of(target), {"z": hivi.LocalExpectation()}, hivi.Elbo(), 1))


def test_log_density_is_that_of_the_mixture_over_all_codes():
    target = TARGETS["chain"]()
    p = proposal_of(target, bits=3)
    grid = states(target.sites)["z"]
    codes = jnp.array(list(itertools.product((0, 1), repeat=3)))

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
