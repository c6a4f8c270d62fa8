"""Multi-sample bounds taken row by row of a plate: value and gradient against enumeration, and what they refuse."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

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
from cases import STRATEGIES, perturbed, quick
from hivi._estimators.by_row import split
from hivi._estimators.evaluation import log_weights
from hivi._estimators.surrogate import surrogate
from hivi._families.product import ProductProposal, build_proposal
from test_unbiased import Forced, Means, as_drawn, assert_agrees, flat, keys_of

X = jnp.array([0.3, -0.9, 1.4])
WEIGHTS, PRIOR = jnp.array([1.2, -0.7]), jnp.array([0.3, 0.6])
BATCH, CELLS = 2, jnp.array(list(itertools.product([0, 1], repeat=2)))
"""Rows of a minibatch; values of one row's two units."""


def model(x: Array, shared: bool = True) -> None:
    g = numpyro.sample("g", dist.Normal(0.2, 0.8)) if shared else 0.4
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=jnp.log(PRIOR) - jnp.log(1 - PRIOR)).to_event(1))
        numpyro.sample("x", dist.Normal(g + z @ WEIGHTS, 0.6), obs=x)


def target(batch: int = BATCH, shared: bool = True) -> hivi.Target:
    return hivi.from_numpyro(model, X, shared, subsample={"rows": batch})


def by_row(outer: int, inner: int = 0) -> hivi.ImportanceWeighted:
    return hivi.ImportanceWeighted(outer, inner, plate="rows")


FAMILIES: dict[str, Any] = {
    "mean-field": hivi.MeanField(),
    "mixture": hivi.Mixture(2, equal=True),
    "hvm": hivi.Hierarchical(prior=hivi.FullRank()),
}


def built(family: str, on: hivi.Target) -> Any:
    found = {"z": FAMILIES[family], ".*": hivi.MeanField()}
    if all(s.name == "z" for s in on.sites):
        del found[".*"]
    k1, k2 = jax.random.split(jax.random.key(0))
    return perturbed(build_proposal(found, on.sites, k1), k2, 0.4)


def log_p_of_row(x: Array, g: Array, z: Array) -> Array:
    """By hand, and not by hivi."""
    prior = jnp.sum(z * jnp.log(PRIOR) + (1 - z) * jnp.log(1 - PRIOR))
    return prior + jax.scipy.stats.norm.logpdf(x, g + z @ WEIGHTS, 0.6)


class Case(NamedTuple):
    family: str
    strategy: str
    outer: int
    inner: int = 0


CASES = [
    Case("mean-field", "local expectation", 2),
    Case("mean-field", "score", 2),
    Case("mixture", "local expectation", 1),
    Case("mixture", "score", 1),
    Case("hvm", "local expectation", 2),
    Case("hvm", "score", 2, 1),
]


def solve(case: Case, strategy: Any = None) -> Means:
    """Bound and gradient at one noise of g (and lambda), the mean over all discrete draws: exactly, and by the surrogate."""
    on, bound, key = target(), by_row(case.outer, case.inner), jax.random.key(3)
    params, static = eqx.partition(built(case.family, on), eqx.is_inexact_array)
    branches = eqx.combine(params, static).branches
    shape, draws = (1, bound.draws, branches), bound.draws * branches
    branch = jnp.broadcast_to(jnp.arange(branches), shape).reshape(-1)
    k_rows, k_draws = jax.random.split(key)
    k_common, k_own = jax.random.split(k_draws)
    rows, shared = on.minibatch(k_rows), jax.random.split(k_common, 1)[0]
    keys, x = keys_of(k_own, shape, split=False), X[rows["rows"]]
    inner_keys = jax.vmap(lambda k: jax.random.split(k, 2)[1])(keys.inner)  # of a product's second part
    joint = np.array(list(itertools.product(range(4), repeat=draws)))  # cells of one row in every draw
    choices = np.array(list(itertools.product(joint, repeat=BATCH)))  # (choices, rows, draws)

    def exact(p: Any) -> tuple[Array, Array]:
        outside, inside = eqx.combine(p, static).gather(rows).divided(frozenset("z"))
        g, context = outside.propose(shared)

        def of_draw(k: Array, k_inner: Array, b: Array, cell: Array) -> tuple[Array, Array]:
            _, context = inside.propose(k, b)
            z = jnp.tile(cell, (BATCH, 1))
            terms = inside.log_q({"z": z}, context, k_inner, case.inner).values()
            log_q = sum(t.reshape(BATCH, -1).sum(1) for t in terms)
            given = inside.conditionals(context)["z"]
            own = jax.vmap(log_p_of_row, (0, None, 0))(x, g["g"], z)
            return own - log_q, given.likelihood.log_prob(given.lam, z).sum(-1)

        over_cells = jax.vmap(of_draw, (None, None, None, 0))
        log_w, log_q = jax.vmap(over_cells, (0, 0, 0, None))(keys.draw, inner_keys, branch, CELLS)
        weight = jnp.exp(log_q[np.arange(draws), joint].sum(1))  # (choices of a row, rows)
        each = jnp.sum(weight * (logsumexp(log_w[np.arange(draws), joint], 1) - jnp.log(draws)))
        log_q_g = sum(jnp.sum(t) for t in outside.log_q(g, context, key).values())
        return jax.scipy.stats.norm.logpdf(g["g"], 0.2, 0.8) - log_q_g + len(X) / BATCH * each, log_q

    def found(p: Any, log_q: Array) -> Array:
        outside, inside = eqx.combine(p, static).divided(frozenset("z"))

        def at(choice: Array) -> Array:
            z = {"z": CELLS[choice].swapaxes(0, 1)}  # (draws, rows, units)
            forced = Forced(inside.sites, inside, jax.random.key_data(keys.draw), z, as_drawn)
            return surrogate(ProductProposal(on.sites, (outside, forced)), on, chosen, bound, key, 1)[0]

        weight = jnp.exp(sum(log_q[np.arange(draws), choices[:, n], n].sum(-1) for n in range(BATCH)))
        return jnp.sum(weight * jax.lax.map(at, jnp.asarray(choices), batch_size=64))

    chosen = {"z": STRATEGIES[case.strategy] if strategy is None else strategy, "g": hivi.Pathwise()}

    def both(p: Any) -> Means:
        (value, log_q), gradient = jax.value_and_grad(exact, has_aux=True)(p)
        estimate = jax.value_and_grad(found)(p, jax.lax.stop_gradient(log_q))
        return Means((value, flat(gradient)), (estimate[0], flat(estimate[1])))

    return quick(both)(params)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family} - {c.strategy}")
def test_gradient_has_the_right_mean(case):
    assert_agrees(solve(case), rounding=5e-5)


def test_partners_have_the_right_mean():
    """DisARM draws more than enumeration can force: the mean of many gradients, against that of local expectations."""
    on, bound, count = target(len(X), shared=False), by_row(3), 6000
    params, static = eqx.partition(built("mean-field", on), eqx.is_inexact_array)

    def gradients(chosen: Any, seed: int) -> np.ndarray:
        def one(k: Array) -> Array:
            loss = lambda p: surrogate(eqx.combine(p, static), on, {"z": chosen}, bound, k, 1)[0]  # noqa: E731
            return flat(jax.grad(loss)(params))

        return np.asarray(quick(jax.vmap(one))(jax.random.split(jax.random.key(seed), count)))

    found, right = gradients(hivi.DisARM(), 1), gradients(hivi.LocalExpectation(), 2)
    stderr = np.sqrt((found.var(0) + right.var(0)) / count)
    assert stderr.max() < 0.02, "not precise enough to judge"
    assert np.abs((found.mean(0) - right.mean(0)) / stderr).max() < 4
    assert np.abs(right.mean(0)).max() > 0.05, "no gradient to compare with"


def evidence(g: float = 0.4) -> float:
    """Log p(x), of all rows, at a given g."""
    every = jax.vmap(lambda x: logsumexp(jax.vmap(lambda z: log_p_of_row(x, jnp.array(g), z))(CELLS)))(X)
    return float(jnp.sum(every))


def values(on: hivi.Target, proposal: Any, bound: Any, count: int = 10_000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(5), count)
    return np.asarray(quick(jax.vmap(lambda k: log_weights(proposal, on, bound, k)))(keys))


@pytest.mark.parametrize("batch", [2, 3])
def test_it_rises_to_the_evidence(batch):
    """Row by row, in minibatches too: above the ELBO, above the bound of all rows together, below log p."""
    on = target(batch, shared=False)
    proposal = built("mean-field", on)
    rungs = [values(on, proposal, b) for b in (hivi.Elbo(), by_row(1), by_row(8), by_row(64))]
    means = [r.mean() for r in rungs]
    noise = max(r.std() for r in rungs) / np.sqrt(len(rungs[0]))
    assert noise < 0.05, "not precise enough to judge"
    assert abs(means[0] - means[1]) < 4 * noise
    assert means[1] + 0.2 < means[2] < means[3] < evidence() + 4 * noise
    assert means[3] > evidence() - 0.1
    if batch == len(X):
        together = values(on, proposal, hivi.ImportanceWeighted(8))
        assert together.mean() < means[2] - 0.02


def nested(x: Array) -> None:
    """Rows along the last of two plates, and continuous latents: log p(x) in closed form."""
    with numpyro.plate("rows", x.shape[1], dim=-1):
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        with numpyro.plate("sensors", x.shape[0], dim=-2):
            u = numpyro.sample("u", dist.Normal(shift, 0.5))
            numpyro.sample("x", dist.Normal(u, 0.5), obs=x)


@pytest.mark.parametrize("family", [hivi.MeanField(), hivi.FullRank()], ids=lambda f: type(f).__name__)
def test_rows_on_another_axis_and_continuous_latents(family):
    """Covariance of a row's data: 1 + (0.25 + 0.25) I. The full-rank family is exact, mean-field is not until it has draws."""
    x = jnp.array(np.random.default_rng(0).normal(size=(2, 5)), jnp.float32)
    on = hivi.from_numpyro(nested, x, subsample={"rows": 3})
    fit = hivi.fit(on, family, key=jax.random.key(0), steps=800, bound=by_row(4), progress=False)
    right = float(dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2) * 0.5 + 1.0).log_prob(x.T).sum())
    found = fit.elbo(jax.random.key(1), samples=2000, bound=by_row(64))
    assert found.stderr < 0.1
    assert abs(found.mean - right) < 4 * found.stderr + 0.05
    full = fit.elbo(jax.random.key(1), samples=2000, bound=hivi.Elbo())
    assert (full.mean < right - 0.3) == isinstance(family, hivi.MeanField)


def sums(x: Array) -> None:
    g = numpyro.sample("g", dist.Normal(0.0, 1.0))
    h = numpyro.sample("h", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(g + h, 0.5))
        numpyro.sample("x", dist.Normal(z, 0.3), obs=x)


OUTSIDE = {
    "one family": hivi.MeanField(),
    "a product": {"g": hivi.MeanField(), "h": hivi.MeanField(), "z": hivi.MeanField()},
}


@pytest.mark.parametrize("family", OUTSIDE)
def test_noise_outside_and_inside_the_plate_is_independent(family):
    """Against draws of another random generator: keys that meet would show as dependence of g and z."""
    x, count, outer = np.array([0.7]), 400_000, 2
    on = hivi.from_numpyro(sums, jnp.asarray(x))
    location, scale = 0.1, np.exp(-0.3)
    proposal = build_proposal(OUTSIDE[family], on.sites, jax.random.key(0))
    proposal = jax.tree.map(lambda lam: jnp.broadcast_to(jnp.array([location, -0.3]), lam.shape), proposal)
    rng = np.random.default_rng(0)
    g, h = (location + scale * rng.normal(size=count) for _ in "gh")
    z = location + scale * rng.normal(size=(outer, count))
    log = lambda v, m, s: -0.5 * ((v - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)  # noqa: E731
    rest = log(g, 0.0, 1.0) + log(h, 0.0, 1.0) - log(g, location, scale) - log(h, location, scale)
    rows = log(z, g + h, 0.5) + log(x, z, 0.3) - log(z, location, scale)
    right = rest + np.logaddexp(*rows) - np.log(outer)

    chosen = dict.fromkeys("ghz", hivi.Pathwise())
    keys = jax.random.split(jax.random.key(1), 20_000)
    bound = by_row(outer)
    for one in (
        lambda k: log_weights(proposal, on, bound, k),
        lambda k: surrogate(proposal, on, chosen, bound, k, 1)[0],
        lambda k: surrogate(proposal, on, chosen, bound, k, 3)[0],
    ):
        found = np.asarray(quick(jax.vmap(one))(keys))
        noise = np.hypot(found.std() / np.sqrt(len(found)), right.std() / np.sqrt(count))
        assert noise < 0.1, "not precise enough to judge"
        assert abs(found.mean() - right.mean()) < 4 * noise


@pytest.mark.parametrize("strategy", [hivi.Enumeration(), hivi.HierarchicalScore()], ids=lambda s: type(s).__name__)
def test_strategies_of_all_rows_are_refused(strategy):
    on = hivi.from_numpyro(model, X[:2], False)
    with pytest.raises(hivi.FitError, match=r"site 'z'.*row by row"):
        fitted(on, hivi.MeanField(), estimator={"z": strategy})
    assert fitted(on, hivi.MeanField()).strategies["z"] != "Enumeration"


GROUPS = np.array([0, 2, 1, 1, 2, 0, 2])


def effects(x: Array) -> None:
    """Latents of groups, met by data in another plate through their group's number."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("groups", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal((u + 2.0 * z)[GROUPS], scale), obs=x)


def test_rows_that_data_look_up():
    """Random effects: the log-weights of a group are sums over its data, wherever they are."""
    x = jnp.array([1.0, -1.0, 2.5, 2.2, -0.5, 0.8, -1.2])
    on = hivi.from_numpyro(effects, x)
    proposal = perturbed(build_proposal(hivi.MeanField(), on.sites, jax.random.key(0)), jax.random.key(1))
    parts = split(proposal, on, "groups")
    z, context = parts.propose(jax.random.key(2), jax.random.key(3), 0)
    found = parts.weights(on, on.terms(z), parts.proposal.log_q(z, context, jax.random.key(4)))
    q = log_q_of_sites(proposal, z)
    scale, u, b = jnp.exp(z["scale"]), z["u"], z["z"]
    right = dist.Bernoulli(0.4).log_prob(b) + dist.Normal(0.0, 1.0).log_prob(u) - q["z"] - q["u"]
    right = right.at[GROUPS].add(dist.Normal((u + 2.0 * b)[GROUPS], scale).log_prob(x))
    np.testing.assert_allclose(found.rows, right, rtol=2e-5)
    np.testing.assert_allclose(found.rest, dist.HalfNormal(1.0).log_prob(scale) + z["scale"] - q["scale"], rtol=2e-5)
    fit = hivi.fit(on, key=jax.random.key(0), steps=200, family=hivi.MeanField(), progress=False,
                   bound=hivi.ImportanceWeighted(8, plate="groups"))  # fmt: skip
    assert fit.elbo(jax.random.key(1)).mean > fit.elbo(jax.random.key(1), bound=hivi.Elbo()).mean + 0.05


def log_q_of_sites(proposal: Any, z: Any) -> dict[str, Array]:
    """Log q of each site, coordinate by coordinate."""
    terms = proposal.log_q(z, proposal.parameters(), jax.random.key(0))
    return {name[2:-1]: value for name, value in terms.items()}


def test_a_fit_is_saved_with_its_bound(tmp_path):
    fit = hivi.fit(target(), key=jax.random.key(0), steps=50, bound=by_row(4), progress=False)
    fit.save(tmp_path / "run")
    loaded = hivi.load(tmp_path / "run", target=target())
    assert loaded.bound == by_row(4)
    assert loaded.elbo(jax.random.key(1), samples=64) == fit.elbo(jax.random.key(1), samples=64)


# Bad input


def fitted(on: hivi.Target, family: Any = None, **options: Any) -> hivi.Fit:
    options = {"bound": by_row(2), **options}
    return hivi.fit(on, family, key=jax.random.key(0), steps=2, progress=False, **options)


def assigned(x: Array) -> None:
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z * k, 1.0), obs=x)


def coupled(x: Array) -> None:
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
    numpyro.factor("few", -((z.sum() - 1.0) ** 2))


def test_refusals():
    with pytest.raises(hivi.FitError, match=r"plate 'row' of ImportanceWeighted.*did you mean 'rows'"):
        fitted(target(), bound=hivi.ImportanceWeighted(2, plate="row"))
    with pytest.raises(hivi.FitError, match=r"term 'r.*several rows of the plate 'rows'"):
        fitted(hivi.from_numpyro(model, X, False), hivi.Hierarchical(prior=hivi.FullRank()))
    with pytest.raises(hivi.FitError, match=r"site 'g'.*mixture"):
        fitted(target(), {"z": hivi.MeanField(), "g": hivi.Mixture(2)})
    with pytest.raises(hivi.FamilyError, match=r"site 'z'.*StructuredProposal.*jointly with 'g'"):
        fitted(target(), hivi.Structured({"g": hivi.MeanField(), "z": hivi.MeanField()}))
    with pytest.raises(hivi.FitError, match=r"site 'k' outside the plate 'rows'"):
        fitted(hivi.from_numpyro(assigned, X, subsample={"rows": 2}))
    with pytest.raises(hivi.FitError, match=r"term 'few'.*several rows"):
        fitted(hivi.from_numpyro(coupled, X), hivi.MeanField())
    with pytest.raises(hivi.FitError, match=r"subsampled plate 'rows'.*plate='rows'"):
        fitted(target(), bound=hivi.ImportanceWeighted(2))


def test_trust_sees_what_minibatches_miss():
    """The tighter bound is taken row by row, where it was refused before."""

    def paired(x: Array) -> None:
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=x)

    on = hivi.from_numpyro(paired, jnp.linspace(-1.0, 1.0, 12), subsample={"rows": 6})
    fit = hivi.fit(on, hivi.MeanField(), key=jax.random.key(0), progress=False)
    found = hivi.trust(fit, key=jax.random.key(1), samples=200)
    assert found.tighter is not None
    assert any("its ELBO misses at least" in f for f in found.faults)
    assert found.tighter.mean - found.bound.mean > 5.0
