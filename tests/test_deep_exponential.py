"""Deep exponential families: kernels, minibatches, densities, closed forms and learning, each against an independent answer.

Oracles: dense NumPy for the sparse kernels, scipy.stats for the log-joint, brute force for differences, and the conjugate
posterior for a natural step. Where the numbers allow it in double precision, so that nothing hides behind rounding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax import Array
from scipy import special, stats

from hivi._errors import TargetError
from hivi._estimators.base import Evaluation, Part
from hivi._estimators.surrogate import terms_by_view, viewed_terms
from hivi._fit.stream import with_rows
from hivi.topics import fitting, inference, kernels
from hivi.topics.base import Corpus
from hivi.topics.batches import CorpusSource, Counts, pack
from hivi.topics.heldout import make_split, perplexity, unigram
from hivi.topics.kernels import Batch, differences, layer_differences, log_likelihood, rates
from hivi.topics.model import Architecture, Priors, deep_exponential_family

DOCUMENTS, WORDS, TOPICS = 6, 7, 3
X = np.random.default_rng(0).poisson(0.9, (DOCUMENTS, WORDS)).astype(np.int64) + np.eye(
    DOCUMENTS, WORDS, dtype=np.int64
)
X[2] = 0  # an empty document
CORPUS = Corpus.from_matrix(X)
KINDS = ("poisson", "bernoulli")
LATENTS = ("poisson", "bernoulli", "gamma")


# Kernels against dense NumPy, in float64


def sparse(x: np.ndarray, kind: Any = "poisson", length: int = 2, spare: int = 3) -> Batch:
    """Packed in double precision: several chunks a document, chunks that are not full, and chunks of padding."""
    counts = sp.csr_array(x)
    chunks = int(np.sum(-(-np.diff(counts.indptr) // length)))
    return Batch(*(jnp.asarray(a, float if a.dtype == np.float32 else a.dtype)
                   for a in pack(counts, length, chunks + spare, kind)))  # fmt: skip


def dense(values: Any, batch: Batch, documents: int = DOCUMENTS) -> np.ndarray:
    """Values at nonzeros as a table, documents x words."""
    out = np.zeros((documents + 1, WORDS))
    real = np.asarray(batch.counts) > 0
    rows = np.broadcast_to(np.asarray(batch.document)[:, None], real.shape)
    np.add.at(out, (rows[real], np.asarray(batch.words)[real]), np.asarray(values)[real])
    assert not out[documents].any(), "a nonzero that belongs to no document"
    return out[:documents]


def parameters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, latents (0, 1, ...) and floor."""
    rng = np.random.default_rng(1)
    return (
        rng.gamma(1.0, 1.0, (WORDS, TOPICS)),
        rng.integers(0, 3, (DOCUMENTS, TOPICS)) * 1.0,
        rng.uniform(0.1, 0.3, WORDS),
    )


def log_factor(kind: str, rate: np.ndarray) -> np.ndarray:
    return np.log(rate) if kind == "poisson" else np.log(np.expm1(rate))


@pytest.mark.parametrize("kind", KINDS)
def test_rates_and_likelihood(kind, x64):
    weights, z, floor = parameters()
    batch, rate = sparse(X, kind), z @ weights.T + floor
    seen = np.minimum(X, 1) if kind == "bernoulli" else X
    np.testing.assert_allclose(dense(batch.counts, batch), seen)
    found = rates(jnp.asarray(weights), jnp.asarray(z), jnp.asarray(floor), batch)
    np.testing.assert_allclose(dense(found, batch), rate * (X > 0), rtol=1e-12)
    constant = -special.gammaln(seen + 1.0).sum(1)
    np.testing.assert_allclose(batch.constant, constant, rtol=1e-6)
    each = log_likelihood(kind, found, batch) - batch.constant
    np.testing.assert_allclose(each, (seen * log_factor(kind, rate)).sum(1), rtol=1e-12, atol=1e-12)
    assert each[2] == 0.0, "an empty document"


@pytest.mark.parametrize("limit", [10**6, 0], ids=["dense", "by word"])
def test_gradient_of_rates_on_both_paths(limit, monkeypatch, x64):
    """Residuals of padding are arbitrary here, and must not count."""
    monkeypatch.setattr(kernels, "DENSE", limit)
    weights, z, floor = parameters()
    batch = sparse(X)
    _, back = jax.vjp(lambda w, v: rates(w, v, jnp.asarray(floor), batch), jnp.asarray(weights), jnp.asarray(z))
    residual = jnp.asarray(np.random.default_rng(2).normal(size=batch.counts.shape))
    by_weights, by_z = back(residual)
    table = dense(residual, batch)
    np.testing.assert_allclose(by_weights, table.T @ z, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(by_z, table @ weights, rtol=1e-12, atol=1e-12)
    assert not np.asarray(by_z)[2].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("move", ["plus one", "flip"])
def test_differences_of_every_unit(kind, move, x64):
    weights, z, floor = parameters()
    z = np.minimum(z, 1) if move == "flip" else z
    moved = 1 - z if move == "flip" else z + 1
    batch, seen = sparse(X, kind), np.minimum(X, 1) if kind == "bernoulli" else X
    expected = np.zeros_like(z)
    for d, k in np.ndindex(z.shape):
        after = z.copy()
        after[d, k] = moved[d, k]
        change = log_factor(kind, after @ weights.T + floor) - log_factor(kind, z @ weights.T + floor)
        expected[d, k] = np.sum(seen * change)
    found = differences(kind, *map(jnp.asarray, (weights, z, moved, floor)), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_differences_between_layers(kind, x64):
    rng = np.random.default_rng(3)
    weights, parents, floor = rng.gamma(1.0, 1.0, (TOPICS, 2)), rng.integers(0, 2, (DOCUMENTS, 2)) * 1.0, 0.2
    child = rng.integers(0, 2, (DOCUMENTS, TOPICS)) * 1.0
    moved = parents + 1 if kind == "poisson" else 1 - parents

    def value(at: np.ndarray) -> np.ndarray:
        eta = at @ weights.T + floor
        each = child * np.log(eta) if kind == "poisson" else child * eta - np.logaddexp(0, eta)
        return each.sum(1)

    eta = parents @ weights.T + floor
    found = layer_differences(kind, *map(jnp.asarray, (weights, child, eta, moved - parents)))
    for k in range(2):
        at = parents.copy()
        at[:, k] = moved[:, k]
        np.testing.assert_allclose(found[:, k], value(at) - value(parents), rtol=1e-10, atol=1e-12)


# Minibatches


ELEVEN = Corpus.from_matrix(np.random.default_rng(4).poisson(np.linspace(0.1, 2, 11)[:, None], (11, 40)))


def test_a_pass_visits_every_document_once():
    """11 documents in 3 minibatches of 3: two are left out, each as likely; neighbours in length are dealt out."""
    source = CorpusSource(ELEVEN, 4)
    assert (source.plate.size, source.plate.batch) == (11, 3)
    words, rng = np.diff(ELEVEN.indptr), np.random.default_rng(0)
    seen, repeats = np.zeros((3, 11)), 3000
    for _ in range(repeats):
        batches = source.passes(rng)
        assert [len(b) for b in batches] == [3, 3, 3]
        kept = np.concatenate(batches)
        assert len(set(kept.tolist())) == 9
        strata = np.sort(words[kept]).reshape(3, 3)
        for b in batches:
            length = np.sort(words[b])
            assert np.all((strata[:, 0] <= length) & (length <= strata[:, -1])), "one document of each length class"
        for k, b in enumerate(batches):
            seen[k, b] += 1
    share = 3 / 11
    z_scores = (seen - repeats * share) / np.sqrt(repeats * share * (1 - share))
    assert np.abs(z_scores).max() < 4.5, "a document more likely in one minibatch than in another"
    exact = CorpusSource(CORPUS, 2)
    assert sorted(np.concatenate(exact.passes(rng)).tolist()) == list(range(DOCUMENTS))


def test_blocks_cover_all_rows_and_pad():
    source = CorpusSource(ELEVEN, 4)
    blocks = source.blocks()
    assert sorted(np.concatenate(blocks).tolist()) == [-1, *range(11)]
    assert [len(b) for b in blocks] == [3, 3, 3, 3]
    (short,) = [b for b in blocks if -1 in b]
    assert short[-1] == -1, "empty rows stand at the end"
    batch = Batch(*(np.asarray(a)[0] for a in source.load([short])))
    assert batch.constant[-1] == 0
    assert not np.any(batch.counts[batch.document >= 2]), "an empty row has no counts"
    local = CorpusSource(ELEVEN, 4, local=True)
    assert local.plate.scale == 1.0
    assert [b.tolist() for b in local.passes(np.random.default_rng(0))] == [b.tolist() for b in local.blocks()]


@pytest.mark.parametrize("seed", range(4))
def test_every_minibatch_fits(seed):
    """The number of chunks is bounded before the first pass, whatever is dealt out."""
    rng = np.random.default_rng(seed)
    documents, size = int(rng.integers(1, 40)), int(rng.integers(1, 15))
    x = rng.poisson(rng.gamma(0.5, 2.0, (documents, 1)), (documents, 200))
    for local in (False, True):
        source = CorpusSource(Counts(sp.csr_array(x)), min(size, documents), local=local)
        batches = [b for _ in range(20) for b in source.passes(rng)] + source.blocks()
        loaded = source.load(batches)
        assert len({a.shape for a in (source.load([b]).counts[0] for b in batches)}) == 1
        sums = loaded.counts.sum((1, 2))
        np.testing.assert_array_equal(sums, [x[b[b >= 0]].sum() for b in batches])


@pytest.mark.parametrize("kind", KINDS)
def test_packing_loses_nothing(kind):
    source = CorpusSource(CORPUS, DOCUMENTS, kind)
    batch = Batch(*(np.asarray(a)[0] for a in source.load([np.arange(DOCUMENTS)])))
    expected = np.minimum(X, 1) if kind == "bernoulli" else X
    np.testing.assert_array_equal(dense(batch.counts, batch), expected)
    np.testing.assert_allclose(batch.constant, -special.gammaln(expected + 1.0).sum(1), rtol=1e-6)
    halves = Counts(sp.csr_array(X / 2))
    packed = pack(halves.rows(np.arange(DOCUMENTS)), 2, 40)
    np.testing.assert_allclose(packed.constant, -special.gammaln(X / 2 + 1.0).sum(1), rtol=1e-6)


# The log-joint against scipy.stats


def softplus_inverse(x: np.ndarray) -> np.ndarray:
    return x + np.log(-np.expm1(-x))


def by_hand(a: Architecture, z: dict[str, np.ndarray], local: bool = False) -> np.ndarray:
    """log p(x, z) of every document, and with them that of the weights (last entry), in the engine's coordinates."""
    p, each, whole = a.priors, np.zeros(DOCUMENTS), 0.0
    seen = X if a.observations == "poisson" else np.minimum(X, 1)
    totals = seen.sum(0) + 0.5
    frequencies, length = totals / totals.sum(), seen.sum() / DOCUMENTS
    floor = p.floor * length * (0.5 / WORDS + 0.5 * frequencies)
    value = {k: np.exp(z[f"z{k}"]) if a.latent == "gamma" else z[f"z{k}"] * 1.0 for k in (1, 2)}
    weight = {}
    for k, units in enumerate(a.layers):
        w = z[f"w{k}"]
        mean = (1 - p.floor) * length / (p.level * units * WORDS) if k == 0 else (1 - p.layer_floor) / units
        signed = k > 0 and a.latent == "bernoulli"
        if signed or a.weights == "normal":
            location = 0.0 if signed else softplus_inverse(mean)
            whole += stats.norm.logpdf(w, location, p.scale).sum()
            weight[k] = w if signed else np.logaddexp(0, w)
        else:
            shape, rate = (p.topic_shape, p.topic_rate) if k == 0 else (p.layer_shape, p.layer_rate)
            scale = mean / shape if rate is None else 1 / rate
            whole += (stats.gamma.logpdf(np.exp(w), shape, scale=scale) + w).sum()
            weight[k] = np.exp(w)
        if signed:
            whole += stats.norm.logpdf(z[f"b{k}"], -2.0, 1.0).sum()
    rate = value[1] @ weight[0].T + floor
    each += (stats.poisson.logpmf(X, rate) if a.observations == "poisson"
             else np.where(X > 0, np.log(-np.expm1(-rate)), -rate)).sum(1)  # fmt: skip
    bias = z["b1"] if a.latent == "bernoulli" else p.layer_floor * p.level
    top = special.logit(p.level) if a.latent == "bernoulli" else p.level
    for k, eta in ((1, value[2] @ weight[1].T + bias), (2, np.full(value[2].shape, top))):
        if a.latent == "poisson":
            each += stats.poisson.logpmf(value[k], eta).sum(1)
        elif a.latent == "bernoulli":
            each += stats.bernoulli.logpmf(value[k], special.expit(eta)).sum(1)
        else:
            each += (stats.gamma.logpdf(value[k], p.gamma_shape, scale=eta / p.gamma_shape) + z[f"z{k}"]).sum(1)
    return np.append(each, whole)


def point(a: Architecture, documents: int = DOCUMENTS) -> dict[str, np.ndarray]:
    """A value of all latents in the engine's coordinates."""
    rng, out = np.random.default_rng(5), {}
    for k, units in enumerate(a.layers, 1):
        shape = (documents, units)
        draws = {
            "poisson": rng.poisson(0.8, shape),
            "bernoulli": rng.integers(0, 2, shape),
            "gamma": rng.normal(size=shape),
        }
        out[f"z{k}"] = draws[a.latent].astype(float if a.latent == "gamma" else np.int32)
    for k, (below, above) in enumerate(zip((WORDS, *a.layers), a.layers, strict=False)):
        out[f"w{k}"] = rng.normal(size=(below, above))
        if a.signed(k):
            out[f"b{k}"] = rng.normal(size=below)
    return out


def architecture(latent: Any, observations: Any = "poisson", weights: Any = "gamma") -> Architecture:
    return Architecture(
        (TOPICS, 2), latent, observations, weights, Priors(floor=0.1, topic_shape=0.4, scale=0.7, level=0.4)
    )


@pytest.mark.parametrize("weights", ["gamma", "normal"])
@pytest.mark.parametrize("observations", KINDS)
@pytest.mark.parametrize("latent", LATENTS)
def test_log_joint_is_the_models(latent, observations, weights, x64):
    a = architecture(latent, observations, weights)
    target, z = deep_exponential_family(CORPUS, a, batch=DOCUMENTS), point(a)
    found = target.log_joint(jax.tree.map(jnp.asarray, z))
    np.testing.assert_allclose(found, by_hand(a, z).sum(), rtol=1e-6)


def test_rates_of_priors_can_be_given(x64):
    """As in Ranganath et al. (2015): shape 0.1, rate 0.3."""
    priors = Priors(topic_shape=0.1, topic_rate=0.3, layer_shape=0.2, layer_rate=0.7)
    a = Architecture((TOPICS, 2), priors=priors)
    target, z = deep_exponential_family(CORPUS, a, batch=DOCUMENTS), point(a)
    found = target.log_joint(jax.tree.map(jnp.asarray, z))
    np.testing.assert_allclose(found, by_hand(a, z).sum(), rtol=1e-6)
    with pytest.raises(TargetError, match=r"Priors\(layer_rate=...\).*found 0"):
        Priors(layer_rate=0.0)


@pytest.mark.parametrize("latent", LATENTS)
def test_minibatches_average_to_the_whole(latent, x64):
    """N/B multiplies every document's terms once, and the weights' never."""
    a = architecture(latent)
    z, target = point(a), deep_exponential_family(CORPUS, a, batch=2)
    fn, found = jax.jit(lambda v, batch: with_rows(target, batch).log_joint(v)), []
    for ids in target.source.passes(np.random.default_rng(0)):
        mine = {n: jnp.asarray(v[ids] if n[0] == "z" else v) for n, v in z.items()}
        batch = jax.tree.map(lambda x: jnp.asarray(x[0]), target.source.load([ids]))
        found.append(float(fn(mine, batch)))
        np.testing.assert_allclose(found[-1], by_hand(a, z)[ids].sum() * 3 + by_hand(a, z)[-1], rtol=1e-6)
    assert len(found) == 3
    np.testing.assert_allclose(np.mean(found), by_hand(a, z).sum(), rtol=1e-6)


# Locality


def test_a_level_is_a_probability_where_latents_are_bernoulli():
    for level in (1.0, 3.0):
        with pytest.raises(TargetError, match=r"Priors\(level=.*Bernoulli"):
            Architecture((2,), latent="bernoulli", priors=Priors(level=level))
        Architecture((2,), latent="poisson", priors=Priors(level=level))
    Architecture((2,), latent="bernoulli", priors=Priors(level=0.99))


def moves(z: np.ndarray, latent: str) -> np.ndarray:
    return 1 - z if latent == "bernoulli" else z + 1


@pytest.mark.parametrize("observations", KINDS)
@pytest.mark.parametrize("latent", ["poisson", "bernoulli"])
def test_differences_are_those_of_the_log_joint(latent, observations, x64):
    """Closed forms and colours against moving one unit at a time, with weights drawn and with weights at two means."""
    a = architecture(latent, observations)
    target, z = deep_exponential_family(CORPUS, a, batch=2), jax.tree.map(jnp.asarray, point(a, 2))
    special = {"mean": {"w0": z["w0"] - 0.3}, "logmeanexp": {"w0": z["w0"] + 0.2}}
    rest = (target.data, target.all_rows())
    for views in ({}, special):

        def total(v: dict[str, Array], views: Any = views) -> Array:
            return target.factored.total(viewed_terms(target, terms_by_view(target, v, views), rest[1]))

        at = tuple(terms_by_view(target, z, views))
        look = Evaluation(z, (Part(1.0, target.factored, [], at, rest),))
        for site in ("z1", "z2"):
            cells = list(np.ndindex(z[site].shape))
            moved = jnp.asarray(moves(np.asarray(z[site]), latent))
            each = jnp.stack([z[site], *(z[site].at[c].set(moved[c]) for c in cells)])
            brute = jax.jit(jax.vmap(lambda v, site=site, total=total: total({**z, site: v})))(each)
            found = look.differences(site, moved[None])[0]
            np.testing.assert_allclose(found.ravel(), brute[1:] - brute[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("latent", LATENTS)
def test_signals_are_local_and_complete(latent, x64):
    """f of a unit changes by what log p changes when the unit moves, and not at all when another document does."""
    a = architecture(latent)
    target, z = deep_exponential_family(CORPUS, a, batch=2), jax.tree.map(jnp.asarray, point(a, 2))

    def both(v: dict[str, Array]) -> tuple[Array, ...]:
        terms = target.terms(v)
        return target.factored.total(terms), *(target.factored.signal(n, v[n].shape, terms) for n in ("z1", "z2"))

    fn = jax.jit(both)
    value, *signal = fn(z)
    for number, site in enumerate(("z1", "z2")):
        for cell in [(0, 1), (1, 0)]:
            other, *after = fn({**z, site: z[site].at[cell].set(moves(z[site][cell], latent))})
            np.testing.assert_allclose(after[number][cell] - signal[number][cell], other - value, rtol=1e-9, atol=1e-9)
            for old, new in zip(signal, after, strict=True):
                np.testing.assert_array_equal(new[1 - cell[0]], old[1 - cell[0]])
    for name, scope in [(f.name, dict(f.scope)) for f in target.factored.factors]:
        assert name.startswith(("x", "z")) or not {"z1", "z2"} & scope.keys(), name


# Learning


def planted(documents: int = 200, words: int = 30, topics: int = 3) -> Corpus:
    """Documents of about 30 words, most of them of one of several topics with words of their own."""
    rng = np.random.default_rng(6)
    table = np.zeros((topics, words))
    for k in range(topics):
        table[k, k * words // topics : (k + 1) * words // topics] = rng.dirichlet(np.full(words // topics, 2.0))
    share = rng.dirichlet(np.full(topics, 0.1), documents)
    return Corpus.from_matrix(np.stack([rng.multinomial(rng.integers(20, 40), p) for p in share @ table]))


@pytest.mark.slow
@pytest.mark.parametrize("latent", LATENTS)
def test_planted_topics_are_found(latent):
    """Held-out words are foreseen far better than by their frequencies (perplexity about 30; the truth, about 11)."""
    corpus = planted()
    split = make_split(corpus, documents=0.2, tokens=0.3)
    train = corpus.subset(split.train)
    fit = fitting.start(train, Architecture((6,), latent), key=jax.random.key(0), batch=40)
    fitting.train(fit, 30, rng=np.random.default_rng(0), warm_up=10)
    found = inference.infer(fit, Counts(split.observed), key=jax.random.key(1), passes=30)
    mixture = np.concatenate([found.layers[0], np.ones((len(split.test), 1))], 1)
    topics = np.concatenate([fit.weights().T, fit.floor()[None]])
    simplest = perplexity(np.ones((len(split.test), 1)), unigram(train)[None], split.heldout)
    assert perplexity(mixture, topics, split.heldout) < 0.55 * simplest
    assert np.isfinite(found.bound).all()
    assert found.bound.shape == (len(split.test),)
    assert np.mean(fit.elbo[-4:]) > np.mean(fit.elbo[40:44])
