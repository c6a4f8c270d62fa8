"""Estimators that draw pairs or remember: their mean over every pair of draws, their coupling, and what they learn.

`test_unbiased.py` enumerates the draws; here the second draw of a pair is enumerated too, with the probability that the
coupling gives it, written down independently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

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
from cases import BOUNDS, TARGETS, built, perturbed, quick, states
from hivi import _jaxprs
from hivi._errors import FitError
from hivi._estimators import control_variates, differences, disarm
from hivi._estimators.base import AbstractStrategy, Average, nothing
from hivi._estimators.surrogate import memories, surrogate
from hivi._families.base import Conditional
from hivi._likelihoods.finite import FiniteLikelihood
from hivi._space import Values
from test_unbiased import assert_agrees, flat, means

# Every pair


def metropolised(rule: Any, lam: Array, a: Array, b: Array) -> Array:
    """Probability of moving from a to b: propose b != a by q(b)/(1-q(a)), accept by min(1, (1-q(a))/(1-q(b)))."""
    table = jnp.exp(rule.logits(lam))
    move = table[..., None, :] / jnp.maximum(1 - table[..., :, None], 1 - table[..., None, :])
    move = move * (1 - jnp.eye(rule.count))
    move = move + jnp.eye(rule.count) * (1 - jnp.sum(move, -1, keepdims=True))
    index = (a - rule.low)[..., None, None]
    row = jnp.take_along_axis(move, jnp.broadcast_to(index, (*a.shape, 1, rule.count)), -2)[..., 0, :]
    return jnp.prod(jnp.take_along_axis(row, (b - rule.low)[..., None], -1))


def independent(rule: Any, lam: Array, a: Array, b: Array) -> Array:
    """Probability of b, whatever a is."""
    return jnp.exp(jnp.sum(rule.log_prob(lam, b)))


class Paired(AbstractStrategy):
    """A strategy of pairs, with every second draw instead of one."""

    inner: AbstractStrategy
    pair: Callable[..., Any] = eqx.field(static=True)
    chance: Callable[..., Array] = eqx.field(static=True)
    grid: Any = eqx.field(static=True)
    memory: Any = None
    detached: ClassVar[bool] = True

    def refusal(self, site: Any, conditional: Conditional | None) -> str | None:
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Any) -> Any:
        grid = jnp.asarray(self.grid)
        evaluation = evaluation._replace(memory=self.memory)
        lam = jax.lax.stop_gradient(conditional.lam)
        weight = jax.vmap(lambda b: self.chance(conditional.likelihood, lam, evaluation.z[site], b))(grid)
        return jax.vmap(lambda b: self.pair(site, conditional, evaluation, b))(grid), weight

    def surrogate(self, measured: Any, increment: Callable[[Array], Array]) -> Array:
        one, weight = measured

        def of(number: int) -> Array:
            each = jax.tree.map(lambda x: x[:, :, :, number], one)
            return self.inner.surrogate(
                each, lambda change: increment(change) * self._spread(weight[..., number], change)
            )

        return sum((of(k) for k in range(weight.shape[-1])), jnp.zeros(()))

    def _spread(self, weight: Array, like: Array) -> Array:
        return weight.reshape(weight.shape + (1,) * (like.ndim - weight.ndim))


def grid_of(target: hivi.Target) -> Any:
    (site,) = target.sites
    return tuple(map(tuple, np.asarray(states(target.sites)[site.name]).tolist()))


PAIRED = [
    ("mean-field", "pair", "elbo"),
    ("mean-field", "chain", "elbo"),
    ("mean-field", "categorical", "elbo"),
    ("mixture", "pair", "elbo"),
    ("hvm full-rank", "pair", "elbo"),
    ("hvm full-rank", "pair", "inner 2"),
    ("mean-field", "pair", "outer 3"),
    ("mean-field", "categorical", "outer 2, inner 2"),
]


def paired(strategy: AbstractStrategy, module: Any, chance: Any, target: hivi.Target, memory: Any = None) -> Paired:
    return Paired(strategy, module.pair, chance, grid_of(target), memory)


@pytest.mark.parametrize("row", PAIRED, ids=" - ".join)
def test_disarm_has_the_right_mean(row):
    family, name, bound = row
    target = TARGETS[name]()
    strategy = paired(hivi.DisARM(), disarm, metropolised, target)
    assert_agrees(means(target, built(family, target), {"z": strategy}, BOUNDS[bound]))


@pytest.mark.parametrize("row", [r for r in PAIRED if "outer" not in r[2]], ids=" - ".join)
def test_coupled_local_expectation_has_the_right_mean(row):
    family, name, bound = row
    target = TARGETS[name]()
    strategy = paired(hivi.LocalExpectation(coupled=True), differences, metropolised, target)
    assert_agrees(means(target, built(family, target), {"z": strategy}, BOUNDS[bound]))


ALPHAS = {
    "start": (nothing(), nothing()),
    "0.4": (Average(jnp.array(0.4), jnp.ones(())), Average(jnp.ones(()), jnp.ones(()))),
}


@pytest.mark.parametrize("alpha", list(ALPHAS))
@pytest.mark.parametrize("family", ["mean-field", "mixture", "hvm full-rank", "mean-field, NumPyro"])
def test_double_control_variates_have_the_right_mean(family, alpha):
    target = from_numpyro() if "NumPyro" in family else smooth_chain()
    family = family.removesuffix(", NumPyro")
    strategy = paired(hivi.DoubleControlVariates(), control_variates, independent, target, ALPHAS[alpha])
    assert_agrees(means(target, built(family, target), {"z": strategy}, BOUNDS["elbo"]))


def smooth_chain() -> hivi.Target:
    """Three Bernoullis whose energy is arithmetic in their values."""
    field = jnp.array([0.3, -0.6, 0.8])

    def log_joint(z: Any) -> dict[str, Array]:
        value = 2.0 * z["z"] - 1.0
        return {"field": field * value, "link": 0.7 * value[1:] * value[:-1], "cube": 0.2 * jnp.sum(value) ** 3}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((3,), constraints.boolean)})


def from_numpyro() -> hivi.Target:
    """NumPyro's densities compare the values with the ends of their support, and take logarithms of others."""

    def model() -> None:
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.3, 0.6])).to_event(1))
        numpyro.sample("x", dist.Normal((z + 1) @ jnp.array([1.0, -0.5]), 0.8), obs=0.7)

    return hivi.from_numpyro(model)


def test_evaluation_between_integers():
    """Arithmetic goes on between the values, comparisons do not; a look-up is refused."""

    def program(z: Array) -> Array:
        return jnp.where(z >= 2, z * z, 0) + jnp.dot(z, jnp.array([3, 1])) + z.astype(jnp.int16) / 2

    jaxpr, consts, _ = _jaxprs.trace(program, jnp.array([1, 2]))
    jaxpr = _jaxprs.inline(jaxpr)
    (found,) = _jaxprs.evaluate(jaxpr, [*consts, jnp.array([1.25, 1.75])])
    np.testing.assert_allclose(found, [5.5 + 0.625, 1.75**2 + 5.5 + 0.875], rtol=1e-6)
    (same,) = _jaxprs.evaluate(jaxpr, [*consts, jnp.array([1, 2])])
    np.testing.assert_allclose(same, program(jnp.array([1, 2])), rtol=1e-6)
    jaxpr, consts, _ = _jaxprs.trace(lambda z, i: 2 * z[i] + 0 * z.at[i].set(1), jnp.array([1, 2]), jnp.array([1, 0]))
    (taken,) = _jaxprs.evaluate(_jaxprs.inline(jaxpr), [*consts, jnp.array([1.25, 1.75]), jnp.array([1, 0])])
    np.testing.assert_allclose(taken, [3.5, 2.5], rtol=1e-6)
    jaxpr, consts, _ = _jaxprs.trace(lambda z: jnp.arange(5.0)[z], jnp.array([1, 2]))
    with pytest.raises((TypeError, ValueError), match="integer"):
        _jaxprs.evaluate(_jaxprs.inline(jaxpr), [*consts, jnp.array([1.25, 1.75])])


def no_weight(site: str, conditional: Conditional, evaluation: Any, b: Array) -> Any:
    difference, weight, change = disarm.pair(site, conditional, evaluation, b)
    return difference, (weight > 0) * 1.0, change


def no_correction(site: str, conditional: Conditional, evaluation: Any, b: Array) -> Any:
    free, (at_a, at_b, at_mean), pair = control_variates.pair(site, conditional, evaluation, b)
    return free, (at_a, at_b, 0.0 * at_mean), pair


def test_control_a_coupling_without_its_weight_is_noticed():
    target = TARGETS["pair"]()
    strategy = dataclasses.replace(paired(hivi.DisARM(), disarm, metropolised, target), pair=no_weight)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agrees(means(target, built("mean-field", target), {"z": strategy}, hivi.Elbo()))


def test_control_a_control_variate_without_its_mean_is_noticed():
    target = smooth_chain()
    strategy = paired(hivi.DoubleControlVariates(), control_variates, independent, target, ALPHAS["start"])
    strategy = dataclasses.replace(strategy, pair=no_correction)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agrees(means(target, built("mean-field", target), {"z": strategy}, hivi.Elbo()))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_coupling_is_reversible_and_drawn_as_written(count):
    rule = FiniteLikelihood(Values("finite", 1, count))
    lam = jax.random.normal(jax.random.key(count), (1 if count == 2 else count,))
    values = jnp.arange(1, count + 1)
    q = jnp.exp(rule.logits(lam))
    chance = jax.vmap(lambda a: jax.vmap(lambda b: metropolised(rule, lam, a, b))(values))(values)
    np.testing.assert_allclose(q[:, None] * chance, (q[:, None] * chance).T, atol=1e-7)
    np.testing.assert_allclose(q @ chance, q, atol=1e-6)
    draws, keys = 20_000, jax.random.split(jax.random.key(0), count)
    for a, key, row in zip(values, keys, np.asarray(chance, float), strict=True):
        lams, starts = jnp.broadcast_to(lam, (draws, *lam.shape)), jnp.full(draws, a)
        found = disarm.partner(Conditional(rule, lams), starts, key)
        share = np.bincount(np.asarray(found) - 1, minlength=count) / draws
        stderr = np.sqrt(row * (1 - row) / draws)
        assert (np.abs(share - row) < 4.5 * stderr + 1e-6).all()


def test_disarm_is_quieter_than_leave_one_out_at_the_same_evaluations():
    target = TARGETS["chain"]()
    proposal = built("mean-field", target)
    spread = {
        name: gradients(target, proposal, strategy, samples).var(0).sum()
        for name, strategy, samples in (("disarm", hivi.DisARM(), 1), ("leave one out", hivi.Score(), 2))
    }
    assert spread["disarm"] < 0.5 * spread["leave one out"]


def test_coupling_quietens_local_expectation():
    target = TARGETS["chain"]()
    proposal = built("mean-field", target)
    plain, coupled = (
        gradients(target, proposal, hivi.LocalExpectation(coupled=c), n).var(0).sum()
        for c, n in ((False, 2), (True, 1))
    )
    assert coupled < 0.3 * plain


def gradients(target: hivi.Target, proposal: Any, strategy: Any, samples: int, memory: Any = None) -> np.ndarray:
    params, static = eqx.partition(proposal, eqx.is_inexact_array)

    def one(key: Array) -> Array:
        def value(p: Any) -> Array:
            own = eqx.combine(p, static)
            return surrogate(own, target, {"z": strategy}, hivi.Elbo(), key, samples, memory=memory)[0]

        return flat(jax.grad(value)(params))

    return np.asarray(quick(jax.vmap(one))(jax.random.split(jax.random.key(3), 4000)), float)


# Baselines that remember


class Remembering(AbstractStrategy):
    """A strategy with a memory that is given."""

    inner: AbstractStrategy
    memory: Any
    detached: ClassVar[bool] = True

    def refusal(self, site: Any, conditional: Conditional | None) -> str | None:
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Any) -> Any:
        return self.inner.measure(site, conditional, evaluation._replace(memory=self.memory))

    def surrogate(self, measured: Any, increment: Callable[[Array], Array]) -> Array:
        return self.inner.surrogate(measured, increment)


BASELINES = {"moving average": hivi.MovingAverage(), "learned": hivi.Learned(hidden=3)}


@pytest.mark.parametrize("bound", ["elbo", "outer 2, inner 2"])
@pytest.mark.parametrize("family", ["mean-field", "hvm full-rank"])
@pytest.mark.parametrize("name", list(BASELINES))
def test_a_baseline_with_any_memory_is_no_bias(name, family, bound):
    target = TARGETS["pair"]()
    proposal, strategy = built(family, target), hivi.Score(baseline=BASELINES[name])
    memory = perturbed(memories(proposal, {"z": strategy})["z"], jax.random.key(5), 0.7)
    memory = jax.tree.map(lambda x: jnp.abs(x) + 0.3, memory)  # weights of averages are positive
    result = means(target, proposal, {"z": Remembering(strategy, memory)}, BOUNDS[bound])
    assert_agrees(result)


def after_steps(strategy: Any, family: str, steps: int) -> tuple[hivi.Target, Any, Any]:
    """What a strategy remembers after steps at which the proposal stays where it is."""
    target = TARGETS["chain"]()
    proposal = built(family, target)
    memory = memories(proposal, {"z": strategy})

    @quick
    def step(known: Any, key: Array) -> Any:
        return surrogate(proposal, target, {"z": strategy}, hivi.Elbo(), key, 4, memory=known)[1].memory

    for key in jax.random.split(jax.random.key(1), steps):
        memory = step(memory, key)
    return target, proposal, memory


@pytest.mark.parametrize(
    ("strategy", "family", "least"),
    [
        (hivi.Score(baseline=hivi.MovingAverage(decay=0.98)), "mean-field", 1.3),
        (hivi.Score(baseline=hivi.Learned(hidden=8)), "hvm full-rank", 1.3),
    ],
    ids=["moving average", "learned"],
)
def test_what_a_baseline_learns_lowers_the_variance(strategy, family, least):
    target, proposal, memory = after_steps(strategy, family, 300)
    fresh, known = (gradients(target, proposal, strategy, 1, m).var(0).sum() for m in (None, memory))
    assert fresh > least * known


def test_a_learned_baseline_knows_more_than_an_average_where_lambda_moves():
    found = {}
    for name, baseline in (("average", hivi.MovingAverage(decay=0.98)), ("learned", hivi.Learned(hidden=8))):
        strategy = hivi.Score(baseline=baseline)
        target, proposal, memory = after_steps(strategy, "hvm full-rank", 400)
        found[name] = gradients(target, proposal, strategy, 1, memory).var(0).sum()
    assert found["learned"] < found["average"]


def test_a_fit_learns_and_is_resumed_bit_for_bit(tmp_path):
    target = TARGETS["pair"]()
    options: dict[str, Any] = {
        "key": jax.random.key(0), "samples": 2, "tolerance": None, "progress": False,
        "estimator": hivi.Score(baseline=hivi.Learned(hidden=4)),
    }  # fmt: skip
    once = hivi.fit(target, hivi.MeanField(), steps=300, **options)
    again = hivi.fit(target, hivi.MeanField(), steps=300, checkpoint=tmp_path / "run", **options)
    np.testing.assert_array_equal(once.history["elbo"], again.history["elbo"])
    resumed = hivi.fit(target, hivi.MeanField(), steps=300, checkpoint=tmp_path / "run", **options)
    np.testing.assert_array_equal(once.history["elbo"], resumed.history["elbo"])


# Refusals


def test_refusals_name_the_site_and_the_reason():
    key = jax.random.key(0)
    with pytest.raises(FitError, match=r"'z'.*DisARM.*not finite"):
        hivi.fit(TARGETS["count"](), hivi.MeanField(), key=key, estimator=hivi.DisARM(), progress=False)
    with pytest.raises(FitError, match=r"'z'.*DoubleControlVariates.*linear"):
        hivi.fit(
            smooth_chain(), hivi.MeanField(), key=key, estimator=hivi.DoubleControlVariates(),
            bound=hivi.ImportanceWeighted(outer=3), progress=False,
        )  # fmt: skip
    with pytest.raises(FitError, match=r"'z'.*between the site's values"):
        hivi.fit(TARGETS["pair"](), hivi.MeanField(), key=key, estimator=hivi.DoubleControlVariates(), progress=False)


# Stick the landing

LANDING = [
    "mean-field",
    "full-rank",
    "flow planar",
    "flow coupling",
    "flow maf",
    "standardised",
    "mixture",
]


def pathwise_pairs(
    target: hivi.Target, proposal: Any, names: tuple[str, ...], draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of many draws, pathwise and landing, of the same noise."""
    params, static = eqx.partition(proposal, eqx.is_inexact_array)

    def one(key: Array, strategy: Any) -> Array:
        chosen = {s.name: strategy if s.name in names else hivi.Pathwise() for s in target.sites}

        def value(p: Any) -> Array:
            return surrogate(eqx.combine(p, static), target, chosen, hivi.Elbo(), key, 1)[0]

        return flat(jax.grad(value)(params))

    keys = jax.random.split(jax.random.key(7), draws)
    both = (quick(jax.vmap(lambda k, s=s: one(k, s)))(keys) for s in (hivi.Pathwise(), hivi.StickTheLanding()))
    a, b = (np.asarray(x, float) for x in both)
    return a, b


@pytest.mark.parametrize(
    "family", [f if f in ("full-rank", "mixture") else pytest.param(f, marks=pytest.mark.slow) for f in LANDING]
)
def test_landing_leaves_out_only_what_has_mean_zero(family):
    target = TARGETS["normal"]()
    proposal = built(family, target)
    if family != "mixture":  # as wide as the target: the score of a narrow q is large
        proposal = proposal.recentre(jnp.array([0.3, -0.2]), jnp.array([0.9, 1.2]))
    plain, landed = pathwise_pairs(target, proposal, ("x",), 20_000)
    error = plain - landed
    stderr = error.std(0, ddof=1) / np.sqrt(len(error))
    assert np.linalg.norm(stderr) < 0.05 * np.linalg.norm(plain.mean(0)), "not precise enough to judge"
    assert (np.abs(error.mean(0)) < 4.5 * stderr + 1e-5).all()
    assert np.abs(error).max() > 1e-3, "nothing was left out"


def test_landing_has_no_noise_at_the_posterior():
    """Where q is the posterior every draw's gradient is zero."""
    target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, {"x": hivi.Latent()})
    proposal = eqx.tree_at(lambda p: p.lam, built("mean-field", target), {"x": jnp.array([0.0, 0.0])})
    plain, landed = pathwise_pairs(target, proposal, ("x",), 200)
    assert np.abs(landed).max() < 1e-6
    assert plain.std(0).max() > 0.5


def test_landing_refuses_what_would_be_biased():
    key, target = jax.random.key(0), TARGETS["normal"]()
    options: dict[str, Any] = {"key": key, "estimator": hivi.StickTheLanding(), "progress": False}
    with pytest.raises(FitError, match=r"'x'.*linear in the log-weights"):
        hivi.fit(target, hivi.MeanField(), bound=hivi.ImportanceWeighted(outer=2), **options)
    for family in (hivi.Hierarchical(), hivi.Flow(layers=1, kind="spline")):
        with pytest.raises(FitError, match=r"'x'.*no exact density"):
            hivi.fit(target, family, **options)


def test_a_memory_of_rows_that_change_is_refused():
    def model(y: Any) -> None:
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = jnp.zeros(8)
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 5, "progress": False}
    estimator = hivi.Score(baseline=hivi.MovingAverage())
    small = hivi.from_numpyro(model, y, subsample={"rows": 4})
    with pytest.raises(FitError, match=r"'z'.*minibatches"):
        hivi.fit(small, hivi.MeanField(), estimator=estimator, **options)
    hivi.fit(hivi.from_numpyro(model, y), hivi.MeanField(), estimator=estimator, **options)
