"""Streamed fits: gradients against enumeration, proper weighting of rows, reproducibility, growing, inference networks.

Oracles: sums over every value of the discrete latents, and independent draws; where only Monte Carlo remains, standard errors,
with a gate on precision first.
"""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from optax.tree_utils import tree_get

import hivi
from cases import perturbed, quick, states, total
from hivi._errors import FitError
from hivi._estimators.expectation import Expectation
from hivi._estimators.surrogate import estimate, terms_by_view, viewed_terms
from hivi._families.amortised import Amortised
from hivi._families.base import AbstractProposal
from hivi._families.gamma import MeanFieldGamma
from hivi._families.product import ProductProposal, build_proposal
from hivi._families.rows import RowsProposal
from hivi._fit import rows as records
from hivi._fit.rowwise import row_bounds
from hivi._fit.stream import OUTLIER, Schedule, _free_adam, _tempered, conditioned, with_rows
from hivi._fit.streamed import of_a_batch
from hivi._fit.streaming import advance
from hivi._target.base import Target
from hivi.topics import fitting, inference, trained
from hivi.topics.base import Corpus
from hivi.topics.model import Architecture, Priors, deep_exponential_family
from test_proper_weighting import assert_mean_is_one, ratios
from test_unbiased import assert_agrees, flat, means

KEY = jax.random.key(0)
PRIORS = Priors(floor=0.2, topic_shape=0.4, level=0.4)
SHARED = hivi.Hierarchical(prior=hivi.Flow(layers=1), auxiliary=hivi.InverseFlow(layers=1), shared=True)


def corpus(documents: int, words: int, seed: int = 0, rate: float = 1.0) -> Corpus:
    x = np.random.default_rng(seed).poisson(rate, (documents, words))
    x[:, 0] += 1
    return Corpus.from_matrix(x)


def proposal_of(target: Target, family: Any, batch: bool = True, seed: int = 1) -> AbstractProposal:
    """Gamma weights and a family of the documents' latents, away from their start."""
    families = {"w0": MeanFieldGamma(), "z.*": family}
    built = build_proposal(families, of_a_batch(target.sites) if batch else target.sites, jax.random.key(0))
    built = built.near(target.starts)
    gamma, local = built.parts
    return ProductProposal(built.sites, (gamma, perturbed(local, jax.random.key(seed), 0.2)))


# Gradients


def assert_mean_zero(errors: np.ndarray, right: np.ndarray, precise: float = 0.05, limit: float = 4.5) -> None:
    """Differences from the exact gradient have mean zero: precise enough, then close enough."""
    stderr = errors.std(0, ddof=1) / np.sqrt(len(errors))
    assert np.linalg.norm(stderr) < precise * np.linalg.norm(right), "not precise enough to judge"
    assert (np.abs(errors.mean(0)) < limit * stderr + 1e-4 * np.abs(right).max()).all(), (errors.mean(0), stderr)


def expected(target: Target, local: AbstractProposal, grid: dict[str, Array], key: Array) -> Array:
    """The bound with every value of z summed at one lambda, and weights in closed form."""
    p = local.expecting(("w0",))
    drawn, context = p.propose(key)
    views, scales, given = p.views(), p.scales(), p.conditionals(context)

    def at(z: dict[str, Array]) -> tuple[Array, Array]:
        v = {**drawn, **z}
        log_p = target.factored.total(viewed_terms(target, terms_by_view(target, v, views), target.all_rows()))
        log_q = sum(jnp.sum(given[n].likelihood.log_prob(given[n].lam, z[n])) for n in z)
        return log_p - total(p.log_q(v, context, key), scales), log_q

    log_w, log_q = jax.vmap(at)(grid)
    return jnp.sum(jnp.exp(log_q) * log_w)


@pytest.mark.parametrize("strategy", [hivi.Difference(), hivi.Score()], ids=["difference", "score"])
def test_gradient_of_mean_field_is_right(strategy):
    """One document, two Poisson units, weights in closed form: against the sum over z = 0, ..., 30."""
    target = deep_exponential_family(corpus(1, 3), Architecture((2,), priors=PRIORS))
    params, static = eqx.partition(proposal_of(target, hivi.MeanField()), eqx.is_inexact_array)
    grid = states(tuple(s for s in target.sites if s.discrete), 31)
    chosen, samples = {"z1": strategy, "w0": Expectation()}, 2

    def of(p: Any, key: Array) -> Array:
        return estimate(eqx.combine(p, static), target, chosen, hivi.Elbo(), key, samples, target.all_rows())[0]

    def exact(p: Any) -> Array:
        return expected(target, eqx.combine(p, static), grid, jax.random.key(0))

    value, right = quick(jax.value_and_grad(exact))(params)
    values, found = quick(jax.vmap(jax.value_and_grad(of), (None, 0)))(
        params, jax.random.split(jax.random.key(2), 4000)
    )
    found = np.concatenate([np.asarray(x, float).reshape(4000, -1) for x in jax.tree.leaves(found)], 1)
    right = np.asarray(flat(right), float)
    assert_mean_zero(found - right, right, 0.1)
    assert abs(values.mean() - value) < 4.5 * values.std() / np.sqrt(4000)


def test_gradient_of_a_shared_hierarchy_is_right():
    """Two of four documents, one Poisson unit each: the sum over z at the same lambda, averaged over lambda."""
    target = deep_exponential_family(corpus(4, 3), Architecture((1,), priors=PRIORS), batch=2)
    params, static = eqx.partition(proposal_of(target, SHARED), eqx.is_inexact_array)
    grid = states(tuple(dataclasses.replace(s, shape=s.batch_shape) for s in target.sites if s.discrete), 14)
    chosen = {"z1": hivi.Difference(), "w0": Expectation()}

    def both(key: Array) -> tuple[Array, Array]:
        def of(p: Any) -> Array:
            return estimate(eqx.combine(p, static), target, chosen, hivi.Elbo(), key, 1, target.all_rows())[0]

        def exact(p: Any) -> Array:  # the same lambda: the keys that `estimate` gives to its only draw
            own = jax.random.split(jax.random.split(key, (1, 1, 1))[0, 0, 0])[0]
            return expected(target, eqx.combine(p, static), grid, own)

        right = flat(jax.grad(exact)(params))
        return flat(jax.grad(of)(params)) - right, right

    errors, right = (np.asarray(x, float) for x in quick(jax.vmap(both))(jax.random.split(jax.random.key(3), 2000)))
    assert (np.abs(right.mean(0)) > 0).all(), "every parameter matters, those that rows share too"
    assert_mean_zero(errors, right.mean(0), 0.1)


CHOSEN: dict[str, Any] = {"z1": hivi.Pathwise(), "w0": Expectation()}


@pytest.mark.parametrize("family", [hivi.MeanField(), SHARED], ids=["mean-field", "hierarchical"])
def test_rates_of_gamma_latents_at_their_means_given_lambda_have_the_same_expectation(family):
    """Value and gradient, against plain draws of the rates."""
    target = deep_exponential_family(corpus(2, 3), Architecture((2,), "gamma", priors=PRIORS))
    params, static = eqx.partition(proposal_of(target, family), eqx.is_inexact_array)
    plain = dataclasses.replace(target, averaged=())

    def both(key: Array) -> tuple[Array, Array]:
        def of(p: Any, t: Target) -> Array:
            return estimate(eqx.combine(p, static), t, CHOSEN, hivi.Elbo(), key, 1, target.all_rows())[0]

        out = [jax.value_and_grad(of)(params, t) for t in (target, plain)]
        return tuple(jnp.concatenate([v[None], flat(g)]) for v, g in out)

    ours, theirs = (np.asarray(x, float) for x in quick(jax.vmap(both))(jax.random.split(jax.random.key(3), 4000)))
    assert_mean_zero(ours - theirs, theirs.mean(0), 0.1)


def test_rates_of_a_hierarchy_over_sparse_gamma_latents_are_not_drawn():
    """LogNormal with a log sd of 1.8, which a shape of 0.3 asks for: draws of the rates made such fits diverge."""
    target = deep_exponential_family(corpus(2, 3), Architecture((2,), "gamma", priors=PRIORS))
    built = proposal_of(target, SHARED)
    lam = jnp.stack([jnp.full((2, 2), -1.0), jnp.full((2, 2), np.log(1.8))], -1)
    wide = eqx.tree_at(lambda p: p.parts[1], built, built.parts[1].grown({"z1": lam}))

    def noise(t: Target) -> float:
        one = quick(jax.vmap(lambda k: estimate(wide, t, CHOSEN, hivi.Elbo(), k, 1, target.all_rows())[0]))
        return float(np.var(one(jax.random.split(KEY, 2000))))

    assert noise(target) < 0.1 * noise(dataclasses.replace(target, averaged=()))


@pytest.mark.parametrize("kind", [pytest.param("exact", marks=pytest.mark.slow), "score"])
def test_gradient_of_shared_rows_is_exact(kind):
    """Bernoulli units of two of four documents, every value of z, at one continuous noise: equal to rounding."""
    target = deep_exponential_family(corpus(4, 3), Architecture((1,), "bernoulli", priors=PRIORS), batch=2)
    chosen: Any = {"z1": hivi.LocalExpectation() if kind == "exact" else hivi.Score(), "w0": hivi.Pathwise()}
    proposal = proposal_of(target, SHARED, batch=False)
    assert_agrees(means(target, proposal, chosen, hivi.Elbo(), 2 if kind == "score" else 1), 1e-4)


@pytest.mark.parametrize("inner", [0, 2])
def test_rows_with_shared_parameters_are_properly_weighted(inner):
    """E[g(z) exp(-log q)] = 1 over the 16 values of two documents' Bernoulli units."""
    target = deep_exponential_family(corpus(2, 3), Architecture((2,), "bernoulli", priors=PRIORS))
    local = proposal_of(target, SHARED).parts[1]
    assert isinstance(local, RowsProposal)
    assert not all(local.mask), "some parameters are shared"
    assert any(local.mask)
    assert_mean_is_one(ratios(local, lambda z: -4 * jnp.log(2.0), inner, 20_000))


def test_natural_gradients_are_fishers():
    """Inverse Fisher matrix times the gradient, less N/B, for the three kinds of q, as a parameter and as lambda's centre."""
    for latent, lam, fisher in (
        ("poisson", 0.7, [np.exp(0.7)]),
        ("bernoulli", 0.7, [1 / (2 + 2 * np.cosh(0.7))]),
        ("gamma", np.array([0.3, -0.4]), [np.exp(0.8), 2.0]),
    ):
        target = deep_exponential_family(corpus(6, 3), Architecture((2,), latent, priors=PRIORS), batch=2)
        p = build_proposal(
            {"w0": MeanFieldGamma(), "z1": hivi.MeanField()}, of_a_batch(target.sites), jax.random.key(0)
        )
        shape = p.parts[1].lam["z1"].shape
        p = eqx.tree_at(lambda q: q.parts[1].lam["z1"], p, jnp.broadcast_to(jnp.asarray(lam, jnp.float32), shape))
        gradient = jax.tree.map(jnp.ones_like, p)
        found = p.natural(gradient)
        np.testing.assert_allclose(
            found.parts[1].lam["z1"], np.broadcast_to(1 / np.array(fisher) / 3, shape), rtol=1e-5
        )
        np.testing.assert_array_equal(found.parts[0].shape["w0"], gradient.parts[0].shape["w0"])
        if latent != "gamma":
            grown = build_proposal({"w0": MeanFieldGamma(), "z1": SHARED}, of_a_batch(target.sites), jax.random.key(0))
            grown = eqx.tree_at(lambda q: q.parts[1], grown, grown.parts[1].grown({"z1": p.parts[1].lam["z1"]}))
            ones = jax.tree.map(lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else None, grown)
            moved = np.concatenate([np.ravel(x) for x in jax.tree.leaves(grown.natural(ones).parts[1])])
            assert np.isclose(moved[:, None], 1 / np.array(fisher) / 3, rtol=1e-4).sum() == 4, (
                "the location of each unit"
            )


# Fits


SMALL = corpus(14, 8, 4, 1.5)
ARCHITECTURE = Architecture((2,), priors=PRIORS)


def fitted(family: Any = None, passes: int = 4, seed: int = 0) -> fitting.TopicFit:
    fit = fitting.start(SMALL, ARCHITECTURE, family, key=jax.random.key(seed), batch=5)
    return fitting.train(fit, passes, rng=np.random.default_rng(seed), warm_up=2)


def everything(fit: fitting.TopicFit) -> list[np.ndarray]:
    """All that a fit has come to."""
    shared = [np.asarray(x) for x in jax.tree.leaves(fit.stream.state.shared)]
    return [*shared, fit.stream.records.read(np.arange(SMALL.n_documents)), fit.elbo]


@pytest.fixture(scope="module")
def mean_field() -> fitting.TopicFit:
    return fitted(passes=60)


def test_same_key_same_numbers_in_memory_and_in_a_file(monkeypatch):
    first, again = everything(fitted()), everything(fitted())
    monkeypatch.setattr(records, "IN_MEMORY", 0)
    on_disk = fitted()
    assert on_disk.stream.records._table is None
    for a, b, c in zip(first, again, everything(on_disk), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(on_disk.stream.records.read(np.array([3, -1]))[1], on_disk.stream.records.template)


def minibatch(fit: fitting.TopicFit, ids: np.ndarray) -> tuple[Target, AbstractProposal]:
    """The target and the proposal of some rows."""
    batch = jax.tree.map(lambda a: jnp.asarray(a[0]), fit.stream.source.load([ids]))
    return with_rows(fit.stream.target, batch), fit.stream.proposal(ids)


def bound_of(fit: fitting.TopicFit, samples: int = 64, repeats: int = 20) -> tuple[float, float]:
    """The bound over all rows and its standard error, from independent repeats."""
    chosen = tuple(fitting.strategies(fit.stream.target, fit.stream.proposal(fit.stream.source.blocks()[0])).items())
    blocks = [(ids, *minibatch(fit, ids)) for ids in fit.stream.source.blocks()]
    totals = []
    for r in range(repeats):
        found = [
            (ids, row_bounds(t, p, jax.random.key(1000 * r + k), chosen, hivi.Elbo(), samples))
            for k, (ids, t, p) in enumerate(blocks)
        ]
        totals.append(sum(float(np.asarray(each)[ids >= 0].sum()) for ids, (each, _) in found) + float(found[0][1][1]))
    return float(np.mean(totals)), float(np.std(totals, ddof=1) / np.sqrt(repeats))


@pytest.mark.parametrize("latent", ["poisson", "bernoulli", "gamma"])
def test_bounds_of_rows_add_up(latent):
    """N/B times the rows' share and what belongs to none: the bound; every document's share holds its own terms only."""
    architecture = Architecture((2, 2), latent, priors=PRIORS)
    fit = fitting.start(SMALL, architecture, key=jax.random.key(0), batch=5)
    target, proposal = minibatch(fit, ids := fit.stream.source.blocks()[0])
    chosen = fitting.strategies(target, proposal)
    lean = {n: s if isinstance(s, Expectation | hivi.Pathwise) else hivi.Score() for n, s in chosen.items()}
    each, rest = row_bounds(target, proposal, jax.random.key(1), tuple(chosen.items()), hivi.Elbo(), 4000)
    found = quick(lambda k: estimate(proposal, target, lean, hivi.Elbo(), k, 4000, target.all_rows())[1].bound)
    values = np.asarray(found(jax.random.key(2)), float)
    stderr = values.std() * np.sqrt(2 / len(values))
    (plate,) = target.plates
    assert stderr < 0.02 * abs(values.mean()), "not precise enough to judge"
    assert abs(plate.scale * float(each.sum()) + float(rest) - values.mean()) < 4 * stderr
    # Without the weights a document's share is a bound on the probability of its words, hence below zero.
    assert np.asarray(each)[ids >= 0].max() < 0
    other = eqx.tree_at(
        lambda t: t.data["rows"].counts, target,
        jnp.where(target.data["rows"].document[:, None] == 0, target.data["rows"].counts, 0.0),
    )  # fmt: skip
    alone, same = row_bounds(other, proposal, jax.random.key(1), tuple(chosen.items()), hivi.Elbo(), 4000)
    np.testing.assert_allclose(alone[0], each[0], rtol=1e-5)
    np.testing.assert_allclose(same, rest, rtol=1e-5)
    assert not np.isclose(alone[1], each[1])


@pytest.mark.slow
def test_growing_starts_at_the_mean_field_bound(mean_field):
    """A narrow lambda costs next to nothing, and further passes lose nothing."""
    before, error = bound_of(mean_field)
    grown = fitting.grow(mean_field, SHARED, key=jax.random.key(5))
    for a, b in zip(mean_field.weights(), grown.weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    at, error_at = bound_of(grown)
    assert max(error, error_at) < 1.0, "not precise enough to judge"
    assert abs(at - before) < 1.0 + 3 * (error + error_at)
    fitting.train(grown, 40, rng=np.random.default_rng(1))
    after, error_after = bound_of(grown)
    assert after > before - 2 * np.hypot(error, error_after), (before, after, error_after)


def test_a_mean_over_documents_holds_one_block(mean_field, monkeypatch):
    """Right, and of the size of a block of documents, not of all; `posterior_means` is the control."""
    stream = inference.opened(mean_field, corpus(70, 8), 16, key=jax.random.key(0))
    each = inference.posterior_means(stream, ARCHITECTURE, key=KEY)[0]
    assert each.shape == (70, 2)
    np.testing.assert_allclose(trained.unit_means(stream, ARCHITECTURE, KEY)[0], each.mean(0), rtol=1e-5)
    units, wide = 4000, Architecture((4000,))

    def latent_means(target: Any, proposal: Any, key: Any, a: Any, samples: int) -> dict[str, Array]:
        return {"z1": jnp.ones((16, units))}

    def peak(read: Any) -> float:
        """Of memory, in arrays of documents times units."""
        read()
        tracemalloc.start()
        read()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found / (70 * units * 4)

    for module in (inference, trained):
        monkeypatch.setattr(module, "latent_means", latent_means)
    assert peak(lambda: trained.unit_means(stream, wide, KEY)) < 0.8
    assert peak(lambda: inference.posterior_means(stream, wide, key=KEY)) > 1.0


def test_growing_keeps_what_adam_knows_of_lambda(mean_field):
    """Its moments and count; nothing of the scales, which mean-field has not."""
    grown = fitting.grow(mean_field, SHARED, key=jax.random.key(5))
    ids = np.arange(len(SMALL.lengths()))
    known, found = (f.stream.layout.unpack(jnp.asarray(f.stream.records.read(ids)))[1] for f in (mean_field, grown))
    for name in ("mu", "nu"):
        before = np.concatenate([x.reshape(len(ids), -1) for x in jax.tree.leaves(tree_get(known, name))], 1)
        after = [np.asarray(x) for x in jax.tree.leaves(tree_get(found, name))]
        assert np.abs(before).max() > 0
        np.testing.assert_array_equal(sorted(np.abs(x).max() for x in after), [0, np.abs(before).max()])
        np.testing.assert_array_equal(next(x for x in after if np.any(x)), before)
    np.testing.assert_array_equal(tree_get(found, "count"), tree_get(known, "count"))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(hivi.Hierarchical(hivi.Flow(1, kind="coupling"), shared=True), id="coupling"),
        pytest.param(hivi.Hierarchical(hivi.Hierarchical(hivi.MeanField())), id="two levels", marks=pytest.mark.slow),
        pytest.param(hivi.Hierarchical(hivi.Flow(1), dispersed=True, shared=True), id="free spread"),
    ],
)
def test_families_that_grow_infer_new_documents(family):
    """No moment is negative, and every answer finite."""
    fit = fitting.start(SMALL, ARCHITECTURE, fitting.flat(family), key=jax.random.key(0), batch=5)
    fitting.train(fit, 3, rng=np.random.default_rng(0))
    hvm = fitting.grow(fit, family, key=jax.random.key(5))
    moments = hvm.stream.layout.unpack(jnp.asarray(hvm.stream.records.read(np.arange(5))))[1]
    assert all(np.min(x, initial=0) >= 0 for x in jax.tree.leaves(tree_get(moments, "nu")))
    fitting.train(hvm, 2, rng=np.random.default_rng(0))
    found = inference.infer(hvm, corpus(9, 8, 3), key=KEY, passes=2)
    assert np.all(np.isfinite(found.bound))


def test_new_documents_of_a_hierarchy_start_at_their_mean_field_optimum(mean_field):
    """After the first half of the steps, and before the second, q is the mean-field one up to a narrow lambda."""
    new, hvm = corpus(9, 8, 3), fitting.grow(mean_field, SHARED, key=jax.random.key(5))
    flat, _ = inference.inferred(mean_field, new, key=KEY, passes=1)
    grown, _ = inference.inferred(hvm, new, key=KEY, passes=1)
    right, found = (inference.posterior_means(s, ARCHITECTURE, key=KEY) for s in (flat, grown))
    fresh = inference.posterior_means(inference.inferred(hvm, new, key=KEY, passes=0)[0], ARCHITECTURE, key=KEY)
    for a, b, c in zip(right, found, fresh, strict=True):
        np.testing.assert_allclose(b, a, rtol=0.1)
        assert np.abs(c / a - 1).max() > 0.2


def test_small_steps_leave_less_noise(mean_field):
    """What two fits of the same documents differ by, after as many steps of the usual size and after half of them small."""
    new = corpus(40, 8, 4)

    def spread(means: list[np.ndarray]) -> float:
        return float(np.mean(np.abs(np.log(means[0]) - np.log(means[1]))))

    def coarse(key: Any) -> np.ndarray:
        stream = inference.opened(mean_field, new, 64, key=key)
        return inference.posterior_means(inference._moved(stream, 120, 0.3)[0], ARCHITECTURE, key=KEY)[0]

    keys = jax.random.split(KEY)
    fine = [inference.infer(mean_field, new, key=k).layers[0] for k in keys]
    assert spread(fine) < 0.8 * spread([coarse(k) for k in keys])


# Inference networks


@pytest.fixture(scope="module")
def network() -> fitting.TopicFit:
    return fitted(fitting.amortised(ARCHITECTURE, hidden=8), passes=8)


@pytest.mark.slow
def test_a_network_fills_the_rows_parameters(network):
    """Its start is the estimate that the features are; after a fit, the encoder's output; nothing belongs to a row."""
    fresh = fitting.start(SMALL, ARCHITECTURE, network.family, key=jax.random.key(0), batch=5)
    for fit in (fresh, network):
        target, proposal = minibatch(fit, fit.stream.source.blocks()[0])
        local = next(p for p in proposal.parts if p.sites[0].local is not None)
        assert not any(jax.tree.leaves(local.owned()))
        features = target.features(proposal.centre(), target.data)
        filled = conditioned(target, proposal).parameters()["z1"]
        expected = jax.vmap(local.network)(features) + local.start + features[:, : local.skip]
        np.testing.assert_allclose(filled[..., 0], expected, rtol=1e-5, atol=1e-5)
        if fit is fresh:
            np.testing.assert_allclose(filled[..., 0], features[:, :2], rtol=1e-5, atol=1e-5)
        else:
            assert np.abs(filled[..., 0] - features[:, :2]).max() > 1e-3, "the network has moved"
    with pytest.raises(hivi.FamilyError, match="no data of its rows"):
        local.propose(jax.random.key(0))


def test_without_a_skip_the_start_is_near():
    target = fitting.start(SMALL, ARCHITECTURE, key=jax.random.key(0), batch=5).stream.target
    family = {"w0": MeanFieldGamma(), "z1": Amortised(features=3, hidden=4)}
    proposal = build_proposal(family, of_a_batch(target.sites), jax.random.key(0)).near(target.starts)
    rates = np.exp(conditioned(target, proposal).parameters()["z1"][..., 0])
    np.testing.assert_allclose(rates, 0.4, rtol=0.05)


@pytest.mark.slow
def test_unseen_documents_start_at_the_encoders_answer(network):
    """With no passes it stands as it is; with many the bound is no lower."""
    new = corpus(6, 8, 9, 1.5)
    found = inference.infer(network, new, key=jax.random.key(6), samples=400, passes=0)
    state = network.stream.state.shared
    source = inference.CorpusSource(new, 6, "poisson", local=True)
    target = inference.build_target(ARCHITECTURE, source, network.statistics)
    local = next(p for p in state.parts if p.sites[0].local is not None)
    features = target.features(network.stream.proposal(np.arange(5)).centre(), target.data)
    rates = np.exp(jax.vmap(local.network)(features) + local.start + features[:, :2])
    np.testing.assert_allclose(found.layers[0], rates, rtol=1e-4)
    refined = inference.infer(network, new, key=jax.random.key(6), samples=400, passes=300)
    assert refined.bound.sum() > found.bound.sum() - 0.5


def test_rows_alone_may_move(mean_field):
    """Without the shared parameters a pass leaves them as they are, and moves every row."""
    fit = fitted()
    before = everything(fit)
    chosen = fitting.strategies(fit.stream.target, fit.stream.proposal(fit.stream.source.blocks()[0]))
    advance(fit.stream, 2, strategies=chosen, schedule=Schedule(shared=False), rng=np.random.default_rng(3))
    after = everything(fit)
    for a, b in zip(before[:-2], after[:-2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.abs(before[-2] - after[-2]).max(1) > 0).all()


def test_a_strategy_with_a_memory_is_refused(mean_field):
    """It would start afresh at every step, since every step has other rows."""
    stream = mean_field.stream
    chosen = fitting.strategies(stream.target, stream.proposal(stream.source.blocks()[0]))
    chosen = {**chosen, "z1": hivi.Score(baseline=hivi.MovingAverage())}
    with pytest.raises(FitError, match=r"'z1' of a streamed target.*memory"):
        advance(stream, 1, strategies=chosen, schedule=Schedule(), rng=np.random.default_rng(0))


def test_strategies_are_chosen_once_for_all_of_one_structure(mean_field, network, monkeypatch):
    """To choose them takes as long as a pass over a small corpus."""
    calls: list[int] = []
    resolve = fitting.Auto.resolve
    monkeypatch.setattr(fitting, "_chosen", {})
    monkeypatch.setattr(fitting.Auto, "resolve", lambda *a: (calls.append(1), resolve(*a))[1])

    def chosen(fit: fitting.TopicFit, plug_in: bool = False) -> dict[str, Any]:
        return fitting.strategies(fit.stream.target, fit.stream.proposal(fit.stream.source.blocks()[0]), plug_in)

    first, warm, other = chosen(mean_field), chosen(mean_field, True), chosen(network)
    assert first == chosen(mean_field)
    assert warm != first
    assert len(calls) == 2
    assert first.keys() == other.keys()


def test_one_strange_minibatch_does_not_blind_adam() -> None:
    """Its gradient is shortened to three times the usual length; the others, and the first, stay as they are."""
    usual = {"a": jnp.full(3, 2.0), "b": jnp.full((2, 2), -1.0)}
    moments = _free_adam().init(usual)
    strange = jax.tree.map(lambda g: 1e6 * g, usual)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, _tempered(strange, moments), strange))
    for _ in range(20):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, _tempered(usual, moments), usual))
        moments = _free_adam().update(usual, moments)[1]
    for found, own in zip(*map(jax.tree.leaves, (_tempered(strange, moments), usual)), strict=True):
        np.testing.assert_allclose(found, OUTLIER * own, rtol=1e-4)
