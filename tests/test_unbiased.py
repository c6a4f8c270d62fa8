"""The gradient of every (family, support, estimator, bound) has the right mean, exactly and not only on average.

For fixed continuous noise the discrete draws of a small target can be enumerated, all of them at once: every sample,
outer draw and branch. `Forced` puts each joint value in place of what a proposal would draw, so that the mean of the
surrogate's gradient over the discrete draws is a finite sum, which must equal the gradient of the mean bound to
rounding. No Monte Carlo error hides a bias (a wrong sign, a missing baseline term, a factor N/B taken twice).
That the draws themselves come from q(z|lambda) is the business of test_proper_weighting.py and test_likelihoods.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp
from jaxtyping import Array

import hivi
from cases import BOUNDS, STRATEGIES, TARGETS, built, perturbed, quick, states, total
from hivi._estimators.base import AbstractStrategy
from hivi._estimators.surrogate import surrogate
from hivi._families.base import AbstractProposal, Conditional
from hivi._families.product import build_proposal
from hivi._space import Latents


def as_drawn(own: Any, key: Array, branch: Array | int, given: Latents) -> tuple[Latents, Any]:
    """A draw whose discrete values are given."""
    z, context = own.propose(key, branch)
    return {**z, **given}, context


class Forced(AbstractProposal):
    """A proposal whose discrete draws are given: draw number i, known by its key, takes `values[name][i]`."""

    sites: tuple[Any, ...] = eqx.field(static=True)
    own: AbstractProposal
    keys: Array
    values: dict[str, Array]
    draw: Callable[..., tuple[Latents, Any]] = eqx.field(static=True)

    def propose(self, key: Array, branch: Array | int = 0) -> tuple[Latents, Any]:
        number = jnp.argmax(jnp.all(jax.random.key_data(key) == self.keys, -1))
        return self.draw(self.own, key, branch, {n: v[number] for n, v in self.values.items()})

    @property
    def upstream(self) -> frozenset[str]:
        return self.own.upstream

    def redrawn(self, values: Latents, key: Array, branch: Array | int = 0) -> tuple[Latents, Any]:
        number = jnp.argmax(jnp.all(jax.random.key_data(key) == self.keys, -1))
        return self.draw(self.own, key, branch, {n: v[number] for n, v in self.values.items()} | values)

    def hidden(self, context: Any) -> Latents:
        return self.own.hidden(context)

    def log_q(self, z: Latents, context: Any, key: Array, inner: int = 0) -> dict[str, Array]:
        return self.own.log_q(z, context, key, inner)

    def log_density(self, z: Latents, key: Array, samples: int = 1) -> Array:
        return self.own.log_density(z, key, samples)

    def conditionals(self, context: Any) -> dict[str, Conditional]:
        return self.own.conditionals(context)

    def gather(self, rows: dict[str, Array]) -> Forced:
        return dataclasses.replace(self, own=self.own.gather(rows))

    def scales(self) -> dict[str, float]:
        return self.own.scales()

    def row_terms(self, plate: str) -> dict[str, int]:
        return self.own.row_terms(plate)

    @property
    def branches(self) -> int:
        return self.own.branches

    def log_weights(self) -> Array:
        return self.own.log_weights()

    def score_weight(self, inner: int) -> float:
        return self.own.score_weight(inner)


class Draws(NamedTuple):
    """The keys that `surrogate` gives to its draws, as arrays over (samples, outer, branches)."""

    draw: Array
    inner: Array


def keys_of(key: Array, shape: tuple[int, int, int], split: bool = True) -> Draws:
    """Repeat `surrogate`'s splitting of its key; where it changes, every test below fails."""
    keys = jax.random.split(jax.random.split(key)[1] if split else key, shape).reshape(-1)
    pairs = jax.vmap(jax.random.split)(keys)
    return Draws(pairs[:, 0], pairs[:, 1])


class Means(NamedTuple):
    """Mean over all discrete draws: the bound and its gradient, exactly and through the surrogate."""

    exact: tuple[Array, Array]
    found: tuple[Array, Array]


def means(*problem: Any) -> Means:
    """Enumerate every discrete draw of a problem, as for `means_by_seed`, at one continuous noise."""
    return means_by_seed(*problem)(0)


def means_by_seed(
    target: hivi.Target,
    proposal: AbstractProposal,
    strategies: Mapping[str, AbstractStrategy],
    bound: Any,
    samples: int = 1,
    most: int = 13,
    draw: Callable[..., tuple[Latents, Any]] = as_drawn,
    above: Mapping[str, Array] | None = None,
) -> Callable[[int], Means]:
    """The means as a function of the continuous noise's seed (and the minibatch's), compiled once.

    `above` has every value of the family's own discrete variables, which `draw` takes among those given.
    """
    shape = (samples, bound.draws, proposal.branches)
    count = math.prod(shape)
    branch = jnp.broadcast_to(jnp.arange(shape[2]), shape).reshape(-1)
    discrete = tuple(s for s in target.sites if s.discrete)
    values = states(tuple(dataclasses.replace(s, shape=s.batch_shape) for s in discrete), most)
    number = len(next(iter(values.values())))
    if above is not None:
        times = len(next(iter(above.values())))
        values = {n: jnp.tile(v, (times,) + (1,) * (v.ndim - 1)) for n, v in values.items()}
        values |= {n: jnp.repeat(v, number, 0) for n, v in above.items()}
        number = number * times
    params, static = eqx.partition(proposal, eqx.is_inexact_array)

    def tables(params: Any, key: Array) -> tuple[Array, Array]:
        """Log-weight and log q(z|lambda) of every draw at every discrete value: (draws, values) each."""
        keys, rows = keys_of(key, shape), target.minibatch(jax.random.split(key)[0])
        p = eqx.combine(params, static).gather(rows)

        def at(k_draw: Array, k_inner: Array, b: Array, value: Latents) -> tuple[Array, Array]:
            z, context = draw(p, k_draw, b, value)
            log_q = total(p.log_q(z, context, k_inner, bound.inner), p.scales())
            given = p.conditionals(context)
            known = {s.name: z[s.name] for s in discrete} | p.hidden(context)
            own = [jnp.sum(given[n].likelihood.log_prob(given[n].lam, v)) for n, v in known.items()]
            return target.log_joint(z, rows) - log_q, sum(own, jnp.zeros(()))

        over_values = jax.vmap(at, (None, None, None, 0))
        return jax.vmap(over_values, (0, 0, 0, None))(keys.draw, keys.inner, branch, values)

    def joint(table: Array, chosen: np.ndarray, start: int = 0) -> Array:
        """Entries of a table at every joint choice of consecutive draws: (choices, draws)."""
        return table[start + np.arange(chosen.shape[1]), chosen]

    one = np.array(list(itertools.product(range(number), repeat=count // samples)), np.int32)
    every = np.array(list(itertools.product(range(number), repeat=count)), np.int32)

    def exact(params: Any, key: Array) -> tuple[Array, Array]:
        log_w, log_q = tables(params, key)
        log_pi = eqx.combine(params, static).log_weights()
        out = jnp.zeros(())
        for start in range(0, count, count // samples):
            weight = jnp.exp(jnp.sum(joint(log_q, one, start), 1))
            out = out + jnp.sum(weight * bound.value(joint(log_w, one, start).reshape(-1, *shape[1:]), log_pi))
        return out / samples, log_q

    def found(params: Any, log_q: Array, key: Array) -> Array:
        own, keys = eqx.combine(params, static), keys_of(key, shape)

        def at(chosen: Array) -> Array:
            z = {n: v[chosen] for n, v in values.items()}
            forced = Forced(own.sites, own, jax.random.key_data(keys.draw), z, draw)
            return surrogate(forced, target, strategies, bound, key, samples)[0]

        weight = jnp.exp(jnp.sum(joint(log_q, every), 1))
        return jnp.sum(weight * jax.vmap(at)(jnp.asarray(every)))

    def both(params: Any, key: Array) -> Means:
        (value, log_q), gradient = jax.value_and_grad(exact, has_aux=True)(params, key)
        estimate = jax.value_and_grad(found)(params, jax.lax.stop_gradient(log_q), key)
        return Means((value, flat(gradient)), (estimate[0], flat(estimate[1])))

    compiled = quick(both)
    return lambda seed: compiled(params, jax.random.key(seed))


def flat(tree: Any) -> Array:
    """All leaves of a gradient, in one vector."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def assert_agrees(result: Means, rounding: float = 2e-5) -> None:
    """Bound and gradient agree to rounding, and are not trivially zero."""
    (value, gradient), (value_found, gradient_found) = result
    assert np.isfinite(np.asarray(gradient_found)).all()
    size = max(1.0, float(jnp.abs(gradient).max()))
    assert float(jnp.linalg.norm(gradient)) > 1e-3, "no gradient to compare with"
    np.testing.assert_allclose(value_found, value, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(gradient_found, gradient, rtol=0, atol=rounding * size)


def strategies(target: hivi.Target, kind: str) -> dict[str, AbstractStrategy]:
    """ "score", "enumeration", "table" (of a long range) or "exact" for the discrete sites, pathwise for the others."""
    exact = {
        "finite": "local expectation",
        "count": "difference",
        "binomial": "difference",
        "table": "local expectation",
    }
    names = {s.name: (exact[s.values.kind] if kind == "exact" else exact.get(kind, kind)) if s.discrete else "pathwise"
             for s in target.sites}  # fmt: skip
    return {site: STRATEGIES[name] for site, name in names.items()}


class Case(NamedTuple):
    """One row of the crossed table; two samples where the score function needs another draw for its baseline."""

    family: str
    target: str
    kind: str
    bound: str
    samples: int = 1
    most: int = 13


def crossed(families: str, target: str, kinds: str = "score exact", bounds: str = "", most: int = 13) -> list[Case]:
    """Every combination."""
    names = [b.strip() for b in bounds.split("|")] if bounds else list(BOUNDS)
    table = itertools.product(families.split("|"), kinds.split(), names)
    return [Case(f.strip(), target, k, b, 2 if k == "score" and BOUNDS[b].draws == 1 else 1, most) for f, k, b in table]


DEFAULT: list[Case] = [
    *crossed("mean-field", "pair"),
    *crossed("mean-field", "categorical", bounds="elbo | outer 3"),
    *crossed("mean-field", "count", "exact", bounds="elbo | outer 3"),
    *crossed("mean-field", "count", "score", bounds="elbo"),
    *crossed("mean-field", "binomial", "table", bounds="elbo | outer 2, inner 2"),
    *crossed("mean-field, free spread", "count", "exact", bounds="elbo | outer 3", most=30),
    *crossed("hvm full-rank, free spread", "binomial", "exact", bounds="elbo"),
    *crossed("hvm full-rank, inverse", "binomial", "exact", bounds="elbo"),
    *crossed("mean-field", "mixed", "exact", bounds="outer 3"),
    *crossed("mean-field", "chain", "exact", bounds="outer 2, inner 2"),
    Case("mean-field", "sites", "exact", "elbo"),
    Case("mean-field", "sites", "score", "elbo"),
    *crossed("mixture", "pair", "exact", bounds="elbo | inner 2"),
    *crossed("mixture", "pair", "score", bounds="elbo"),
    *crossed("mixture", "mixed", "exact", bounds="elbo"),
    *crossed("mixture", "count", "exact", bounds="elbo", most=40),
    *crossed("hvm full-rank", "pair", "exact", bounds="elbo | outer 2, inner 2"),
    *crossed("hvm full-rank", "pair", "score", bounds="inner 2"),
    *crossed("hvm mean-field", "pair", "score", bounds="outer 3"),
    *crossed("hvm planar", "pair", "exact", bounds="elbo"),
    *crossed("mean-field", "pair", "enumeration", bounds="elbo | outer 2, inner 2"),
    *crossed("mean-field", "sites", "enumeration", bounds="elbo"),
    *crossed("mean-field", "binomial", "enumeration", bounds="elbo"),
    *crossed("hvm full-rank", "pair", "enumeration", bounds="elbo | inner 2"),
    *crossed("mixture", "mixed", "enumeration", bounds="elbo"),
    *crossed("hvm full-rank, semi-implicit", "pair", "exact", bounds="inner 2"),
    *crossed("hvm full-rank, recursive", "pair", "exact", bounds="elbo"),
    *crossed("copula", "pair", "exact", bounds="elbo"),
]
TINY = "mean-field | mixture | hvm full-rank | hvm full-rank, inverse | hvm mean-field"
FLOWS = " | ".join(f"hvm {k}" for k in ("planar", "coupling", "maf", "spline"))
COPULAS = "copula | copula vine | copula vine, frank"
OTHERS = (
    "hvm planar, linearised | hvm full-rank, semi-implicit | hvm mixture, inverse | hvm hvm, linearised "
    "| hvm planar, recursive"
)
SLOW: list[Case] = [
    case
    for case in [
        *crossed(f"{TINY} | {FLOWS} | {OTHERS} | hvm hvm | hvm hvm, semi-implicit", "pair"),
        *crossed(TINY, "categorical", bounds="elbo | inner 2 | outer 3"),
        *crossed("mean-field", "counts", "exact", bounds="elbo", most=11),
        *crossed("copula", "pair", "exact", bounds="outer 2, inner 2"),
        *crossed("copula", "count", "exact", bounds="elbo", most=40),
        *crossed("product of mixtures", "mixed", bounds="elbo | inner 2"),
        *crossed(f"{TINY} | hvm planar | hvm mixture | hvm hvm", "count", "exact", bounds="elbo | inner 2", most=40),
        *crossed(f"{TINY} | hvm planar | hvm mixture", "mixed", "exact"),
        *crossed("hvm full-rank | hvm mean-field | hvm planar", "binomial", "exact", bounds="elbo | inner 2"),
        *crossed("mixture", "binomial", "table", bounds="elbo | inner 2"),
        *crossed("hvm full-rank, free spread | hvm planar, free spread", "binomial", "exact", bounds="elbo | inner 2"),
        *crossed(
            "hvm full-rank, free spread | hvm planar, free spread", "count", "exact", bounds="elbo | inner 2", most=30
        ),
        *crossed("hvm full-rank | hvm planar | hvm mixture | product", "sites", "exact", bounds="elbo | inner 2"),
        *crossed("mean-field | mixture | hvm full-rank | hvm planar", "triple", bounds="elbo | inner 2"),
        *crossed(COPULAS, "pair"),
        *crossed(COPULAS, "categorical", bounds="elbo | inner 2"),
        *crossed(COPULAS, "triple", bounds="elbo | inner 2"),
        *crossed(COPULAS, "count", "exact", bounds="elbo | inner 2", most=40),
        *crossed(COPULAS, "binomial", "exact", bounds="elbo | inner 2"),
        *crossed(COPULAS, "mixed", "exact"),
        *crossed("copula", "sites", "exact", bounds="elbo"),
        *crossed("hvm full-rank, recursive", "pair", "exact", bounds="inner 2"),
    ]
    if case not in DEFAULT and not (case.family == "hvm mixture" and BOUNDS[case.bound].inner)
]


def solve(case: Case) -> Means:
    """The two gradients of one row of the table."""
    target = TARGETS[case.target]()
    proposal = built(case.family, target)
    chosen = strategies(target, case.kind)
    return means(target, proposal, chosen, BOUNDS[case.bound], case.samples, case.most)


@pytest.mark.parametrize("case", DEFAULT, ids=lambda c: f"{c.family} - {c.target} - {c.kind} - {c.bound}")
def test_gradient_has_the_right_mean(case):
    assert_agrees(solve(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda c: f"{c.family} - {c.target} - {c.kind} - {c.bound}")
def test_gradient_has_the_right_mean_everywhere(case, x64):
    assert_agrees(solve(case), rounding=1e-6)


# In double precision, where nothing hides behind rounding

X64 = [
    ("mean-field", "count", "exact", "outer 3", 1e-7),
    ("mean-field", "pair", "score", "outer 2, inner 2", 1e-12),
    ("mean-field", "categorical", "exact", "elbo", 1e-12),
]


@pytest.mark.parametrize("row", X64, ids=lambda r: " - ".join(r[:4]))
def test_gradient_in_double_precision(row, x64):
    assert_agrees(solve(Case(*row[:4])), rounding=row[4])


# Controls: the check can fail


SCORE = hivi.Score()


class Spoiled(AbstractStrategy):
    """The score function with a mistake in it."""

    spoil: Callable[[Any, Callable[[Array], Array]], Array] = eqx.field(static=True)
    detached: ClassVar[bool] = True

    def refusal(self, site: Any, conditional: Conditional | None) -> str | None:
        return None

    def measure(self, site: str, conditional: Conditional, evaluation: Any) -> Any:
        return (*SCORE.measure(site, conditional, evaluation), evaluation.parts[0].terms)

    def surrogate(self, measured: Any, increment: Callable[[Array], Array]) -> Array:
        return self.spoil(measured, increment)


def wrong_sign(measured: Any, increment: Callable[[Array], Array]) -> Array:
    return -SCORE.surrogate(measured[:3], increment)


def own_baseline(measured: Any, increment: Callable[[Array], Array]) -> Array:
    """The baseline contains the draw that it is for."""
    log_q, signal, _, _ = measured
    baseline = jnp.mean(signal, (0, 1), keepdims=True)
    return jnp.sum(log_q * -increment(jax.lax.stop_gradient(baseline - signal)))


def missing_terms(measured: Any, increment: Callable[[Array], Array]) -> Array:
    """The local signal lacks the terms of the first factor."""
    log_q, signal, predicted, terms = measured
    return SCORE.surrogate((log_q, signal - terms[0], predicted), increment)


def increment_of_elbo(measured: Any, increment: Callable[[Array], Array]) -> Array:
    """Under a multi-sample bound, the increment of the plain one."""
    return SCORE.surrogate(measured[:3], lambda change: change / change.shape[1])


@pytest.mark.parametrize(
    ("spoil", "target", "bound", "samples"),
    [
        (wrong_sign, "pair", "elbo", 2),
        (own_baseline, "pair", "elbo", 2),
        (missing_terms, "chain", "elbo", 1),
        (increment_of_elbo, "pair", "outer 3", 1),
    ],
)
def test_a_biased_estimator_is_noticed(spoil, target, bound, samples):
    model = TARGETS[target]()
    result = means(model, built("mean-field", model), {"z": Spoiled(spoil)}, BOUNDS[bound], samples)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agrees(result)


def test_no_baseline_is_no_bias():
    """One sample has no other draw for a baseline; the gradient is noisier, and right."""
    assert_agrees(solve(Case("mean-field", "chain", "score", "elbo", samples=1)))


# Draws as they come


def test_gradient_of_the_draws_themselves():
    """No enumeration: the mean over many keys, paired with the exact mean at the same continuous noise."""
    target = TARGETS["pair"]()
    proposal = built("hvm mean-field, linearised", target, scale=1.0)
    params, static = eqx.partition(proposal, eqx.is_inexact_array)
    grid = states(target.sites)["z"]
    bound, chosen = hivi.Elbo(), {"z": hivi.LocalExpectation()}

    def exact(params: Any, key: Array) -> Array:
        p, keys = eqx.combine(params, static), keys_of(key, (1, 1, 1))
        _, context = p.propose(keys.draw[0])
        given = p.conditionals(context)["z"]
        log_q_z = jax.vmap(lambda z: jnp.sum(given.likelihood.log_prob(given.lam, z)))(grid)
        log_w = jax.vmap(lambda z: target.log_joint({"z": z}) - total(p.log_q({"z": z}, context, keys.inner[0])))(grid)
        return jnp.sum(jnp.exp(log_q_z) * log_w)

    def difference(key: Array) -> tuple[Array, Array]:
        found = jax.grad(lambda q: surrogate(eqx.combine(q, static), target, chosen, bound, key, 1)[0])(params)
        right = jax.grad(exact)(params, key)
        return flat(found) - flat(right), flat(right)

    keys = jax.random.split(jax.random.key(4), 20_000)
    error, right = (np.asarray(x) for x in quick(jax.vmap(difference))(keys))
    stderr = error.std(0, ddof=1) / np.sqrt(len(keys))
    assert np.linalg.norm(stderr) < 0.03 * np.linalg.norm(right.mean(0)), "not precise enough to judge"
    assert (np.abs(error.mean(0)) < 4.5 * stderr + 1e-6).all()


def test_pathwise_gradient_is_that_of_the_bound():
    """Without discrete sites the surrogate is the bound itself, differentiated through the draws."""
    target = TARGETS["constrained"]()
    proposal = built("flow planar", target)
    bound = hivi.ImportanceWeighted(outer=3)
    params, static = eqx.partition(proposal, eqx.is_inexact_array)
    key = jax.random.key(1)
    keys = keys_of(key, (2, 3, 1))

    def direct(params: Any) -> Array:
        p = eqx.combine(params, static)

        def log_weight(k_draw: Array, k_inner: Array) -> Array:
            z, context = p.propose(k_draw)
            return target.log_joint(z) - total(p.log_q(z, context, k_inner))

        log_w = jax.vmap(log_weight)(keys.draw, keys.inner).reshape(2, 3)
        return jnp.mean(logsumexp(log_w, 1) - jnp.log(3.0))

    def through(params: Any) -> Array:
        chosen = strategies(target, "exact")
        return surrogate(eqx.combine(params, static), target, chosen, bound, key, 2)[0]

    a, b = quick(jax.value_and_grad(direct))(params), quick(jax.value_and_grad(through))(params)
    assert_agrees(Means((a[0], flat(a[1])), (b[0], flat(b[1]))))


# Minibatches

ROWS, BATCH = 4, 2
OBSERVED = np.array([0.3, -1.2, 0.8, 2.0], np.float32)


def grouped(y: Array) -> None:
    """A Bernoulli for all rows, and one in each row of a plate."""
    up = numpyro.sample("g", dist.Bernoulli(0.4))
    with numpyro.plate("data", ROWS):
        z = numpyro.sample("z", dist.Bernoulli(logits=0.8 * up - 0.2))
        numpyro.sample("y", dist.Normal(1.5 * z - 0.5 * up, 1.0), obs=y)


def by_rows(target: hivi.Target) -> dict[tuple[int, ...], int]:
    """One seed for each minibatch."""
    found: dict[tuple[int, ...], int] = {}
    for seed in range(60):
        rows = target.minibatch(jax.random.split(jax.random.key(seed))[0])["data"]
        found.setdefault(tuple(sorted(np.asarray(rows).tolist())), seed)
    return found


def assert_agreement_over_minibatches(family: Any, kind: str) -> None:
    """The mean over all minibatches is the gradient of the whole data: N/B is applied once."""
    full = hivi.from_numpyro(grouped, OBSERVED)
    small = hivi.from_numpyro(grouped, OBSERVED, subsample={"data": BATCH})
    seeds = by_rows(small)
    assert len(seeds) == math.comb(ROWS, BATCH)
    proposal = perturbed(build_proposal(family, full.sites, jax.random.key(0)), jax.random.key(1), 0.5)
    like = build_proposal(family, small.sites, jax.random.key(0))
    local = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(proposal))
    right = means(full, proposal, strategies(full, kind), hivi.Elbo())
    assert_agrees(right)
    at = means_by_seed(small, local, strategies(small, kind), hivi.Elbo())
    each = [at(seed) for seed in seeds.values()]
    value, gradient = (sum(m.found[k] for m in each) / len(each) for k in (0, 1))
    assert_agrees(Means(right.exact, (value, gradient)))


@pytest.mark.parametrize("kind", ["score", "exact"])
def test_minibatches_average_to_the_full_gradient(kind):
    """In p and in q of a local site."""
    assert_agreement_over_minibatches(hivi.MeanField(), kind)


@pytest.mark.slow
def test_rows_of_a_hierarchy_take_the_plate_scale():
    """A family that is repeated over rows: every term of its log q carries N/B, the tighter bound's too."""
    small = hivi.from_numpyro(grouped, OBSERVED, subsample={"data": BATCH})
    family = {"z": hivi.Hierarchical(prior=hivi.MeanField(), auxiliary=hivi.Linearised()), ".*": hivi.MeanField()}
    proposal = perturbed(build_proposal(family, small.sites, jax.random.key(0)), jax.random.key(1), 0.3)
    bound = hivi.ImportanceWeighted(outer=1, inner=2)
    assert_agrees(means(small, proposal, strategies(small, "exact"), bound))
    p = proposal.gather(small.all_rows())
    z, context = p.propose(jax.random.key(0))
    terms = p.log_q(z, context, jax.random.key(1), 2)
    scaled = {n for n in terms if n in p.scales()}
    assert scaled == {n for n in terms if "data" in n}
    assert all(p.scales()[n] == ROWS / BATCH for n in scaled)
    assert any("tighter" in n for n in scaled)
