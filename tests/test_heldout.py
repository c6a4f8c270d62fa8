"""The held-out protocol: the same splits for ever, scores by hand, peers in order; coherence against a slow count."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.sparse as sp

from hivi._errors import CorpusError
from hivi.topics import base, heldout
from hivi.topics.base import Corpus
from hivi.topics.coherence import diversity, liveness, npmi, top_words
from hivi.topics.corpora import read_corpus
from hivi.topics.heldout import (
    Scores,
    hold_out_tokens,
    log_scores,
    make_split,
    paired_difference,
    perplexity,
    split_documents,
    unigram,
)
from hivi.topics.peers import evaluate_peer, fit_lda, fit_nmf, fit_unigram


def topical(documents: int = 200, topics: int = 4, words: int = 60, length: int = 60, seed: int = 0) -> Corpus:
    """Counts of an LDA with sparse topics."""
    rng = np.random.default_rng(seed)
    phi = rng.dirichlet(np.full(words, 0.05), topics) + 1e-4
    theta = rng.dirichlet(np.full(topics, 0.2), documents)
    rates = theta @ (phi / phi.sum(1, keepdims=True))
    return Corpus.from_matrix(
        np.array([rng.multinomial(rng.poisson(length), p) for p in rates / rates.sum(1, keepdims=True)])
    )


@pytest.fixture
def reference(hivi_data: Path) -> ModuleType:
    """The protocol's first implementation, beside the data."""
    path = hivi_data / "corpora" / "heldout.py"
    if not path.is_file():
        pytest.skip(f"no {path} to compare with")
    spec = importlib.util.spec_from_file_location("reference_heldout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Splits


def test_the_split_of_documents_is_pinned() -> None:
    train, test = split_documents(20, 0.25, seed=0)
    assert test.tolist() == [2, 4, 6, 13, 19]
    assert sorted([*train, *test]) == list(range(20))
    assert split_documents(20, 0.1, seed=3)[1].tolist() == [12, 16]


def test_the_split_of_tokens_is_pinned() -> None:
    table = np.array([[5, 0, 3, 2], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 40, 0, 60]])
    observed, held = hold_out_tokens(sp.csr_array(table), 0.1, seed=1)
    assert held.toarray().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 3, 0, 7]]
    np.testing.assert_array_equal((observed + held).toarray(), table)
    assert hold_out_tokens(sp.csr_array(table), 0.9, seed=1)[1].toarray().tolist() == [
        [4, 0, 3, 2],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 36, 0, 54],
    ]


def test_a_split_counts_tokens() -> None:
    corpus = topical()
    for share in (0.1, 0.5, 0.9):
        split = make_split(corpus, documents=0.2, tokens=share, seed=5)
        n = corpus.lengths()[split.test]
        expected = [0 if k < 2 else max(1, round(share * k)) for k in n]
        np.testing.assert_array_equal(split.heldout.sum(axis=1), expected)
        np.testing.assert_array_equal((split.observed + split.heldout).toarray(), corpus.rows(split.test).toarray())
        assert split.heldout.data.min() > 0
        assert split.observed.dtype == np.int64


def test_tokens_are_drawn_without_preference() -> None:
    counts = sp.csr_array(np.tile([6, 0, 3, 1], (4000, 1)))
    _, held = hold_out_tokens(counts, 0.3, seed=2)
    mean, exact = held.toarray().mean(0), 3 * np.array([0.6, 0, 0.3, 0.1])
    error = held.toarray().std(0) / math.sqrt(4000)
    assert error.max() < 0.02
    assert np.all(np.abs(mean - exact) <= 4 * error)


def test_order_and_duplicates_of_entries_do_not_matter() -> None:
    table = np.array([[5, 2, 3], [4, 0, 9]])
    coo = sp.coo_array((np.array([9, 3, 2, 4, 1, 4]), (np.array([1, 0, 0, 1, 0, 0]), np.array([2, 2, 1, 0, 0, 0]))))
    for a, b in zip(hold_out_tokens(coo, 0.5), hold_out_tokens(sp.csr_array(table), 0.5), strict=True):
        np.testing.assert_array_equal(a.toarray(), b.toarray())


@pytest.mark.parametrize("share", [0.1, 0.9])
@pytest.mark.parametrize("name", ["bbc", "wikipedia"])
def test_splits_equal_the_reference(hivi_data: Path, reference: ModuleType, name: str, share: float) -> None:
    path = hivi_data / "corpora" / name
    if not path.is_dir():
        pytest.skip(f"no corpus at {path}")
    corpus = read_corpus(path)
    train, observed, held = reference.load(path / f"docword.{name}.txt.gz", tok_frac=share, seed=7)
    split = make_split(corpus, tokens=share, seed=7)
    for ours, theirs in ((corpus.rows(split.train), train), (split.observed, observed), (split.heldout, held)):
        assert ours.shape == theirs.shape
        assert (sp.csr_array(theirs) != ours).nnz == 0
    frequencies = unigram(corpus.subset(split.train))
    np.testing.assert_allclose(frequencies, reference.unigram(train), rtol=1e-13)
    rates = np.broadcast_to(frequencies, held.shape)
    np.testing.assert_allclose(
        perplexity(np.ones((held.shape[0], 1)), frequencies[None], split.heldout),
        reference.perplexity(rates, held),
        rtol=1e-12,
    )


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_shares_are_between_0_and_1(share: float) -> None:
    with pytest.raises(CorpusError, match="between 0 and 1"):
        split_documents(10, share)
    with pytest.raises(CorpusError, match="between 0 and 1"):
        hold_out_tokens(sp.csr_array(np.ones((2, 2))), share)


def test_a_split_must_leave_something() -> None:
    with pytest.raises(CorpusError, match="0 of 4 documents for testing"):
        split_documents(4, 0.1)
    with pytest.raises(CorpusError, match="no document of two tokens"):
        hold_out_tokens(sp.csr_array(np.eye(3)), 0.1)


# Scores


def test_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mixture, topics = rng.gamma(0.5, 1.0, (7, 3)), rng.gamma(0.5, 1.0, (3, 11))
    held = rng.poisson(0.7, (7, 11))
    held[2] = 0
    rates = mixture @ topics
    p = rates / rates.sum(1, keepdims=True)
    exact = (held * np.log(p)).sum(1)
    for chunk in (3, 2**23):
        monkeypatch.setattr(heldout, "CHUNK", chunk)
        scores = log_scores(mixture, topics, sp.csr_array(held))
        np.testing.assert_allclose(scores.log_likelihood, exact, rtol=1e-12)
        assert scores.tokens.tolist() == held.sum(1).tolist()
    assert scores.perplexity == pytest.approx(math.exp(-exact.sum() / held.sum()), rel=1e-12)
    # Any scale, in mixture and topics; single precision in, double inside.
    assert perplexity(mixture * 7, topics / 3, sp.csr_array(held)) == pytest.approx(scores.perplexity, rel=1e-12)
    single = perplexity(mixture.astype(np.float32), topics.astype(np.float32), sp.csr_array(held))
    assert single == pytest.approx(scores.perplexity, rel=1e-5)


def test_a_stored_zero_is_no_token() -> None:
    """Where it was held impossible, 0 log 0 would be NaN; the user's matrix stays as it was."""
    held = sp.csr_array(([1, 0], ([0, 0], [0, 1])), shape=(1, 2))
    assert perplexity(np.ones((1, 1)), np.array([[1.0, 0.0]]), held) == 1.0
    assert held.nnz == 2


def test_an_impossible_word_makes_the_perplexity_infinite() -> None:
    assert perplexity(np.ones((1, 1)), np.array([[1.0, 0.0]]), sp.csr_array(np.array([[0, 1]]))) == math.inf


@pytest.mark.parametrize(
    ("mixture", "topics", "found"),
    [
        (np.ones((2, 2)), np.array([[1.0, -1.0], [1, 1]]), "topics: found a number that is negative"),
        (np.array([[np.nan, 1], [1, 1]]), np.ones((2, 2)), "mixture: found a number"),
        (np.array([[1.0, 1], [0, 0]]), np.ones((2, 2)), "document 1 of the mixture: found no topic"),
        (np.ones((1, 2)), np.ones((2, 2)), r"mixture \(1, 2\)"),
        (np.ones((2, 2)), np.ones((2, 3)), r"topics \(2, 3\)"),
    ],
)
def test_scores_refuse(mixture: np.ndarray, topics: np.ndarray, found: str) -> None:
    with pytest.raises(CorpusError, match=found):
        log_scores(mixture, topics, sp.csr_array(np.ones((2, 2))))


def test_paired_differences() -> None:
    rng = np.random.default_rng(0)
    errors, estimates = [], []
    for _ in range(400):  # the standard error is the deviation of the estimate over new documents
        tokens = rng.integers(1, 30, 300)
        difference = tokens * 0.05 + rng.normal(0, np.sqrt(tokens))
        zero = Scores(np.zeros(300), tokens)
        mean, error = paired_difference(Scores(difference, tokens), zero)
        estimates.append(mean)
        errors.append(error)
    assert np.mean(estimates) == pytest.approx(0.05, abs=4 * np.mean(errors) / 20)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.15)
    assert paired_difference(zero, Scores(difference, tokens)).mean == pytest.approx(-mean)
    with pytest.raises(CorpusError, match="the same tokens"):
        paired_difference(zero, Scores(np.zeros(300), tokens + 1))


def test_unigram() -> None:
    corpus = Corpus.from_matrix(np.array([[2, 0, 1], [3, 0, 1]]))
    np.testing.assert_allclose(unigram(corpus), [0.6, 0.1, 0.3])
    np.testing.assert_allclose(unigram(corpus, add=0.0), [5 / 7, 0, 2 / 7])
    with pytest.raises(CorpusError, match="added to each count"):
        unigram(corpus, add=-1.0)


# Peers


@pytest.mark.parametrize("tokens", [0.1, 0.9])
def test_peers_find_topics(tokens: float) -> None:
    corpus = topical()
    split = make_split(corpus, documents=0.2, tokens=tokens)
    plain = evaluate_peer(fit_unigram, corpus, split)
    lda = evaluate_peer(functools.partial(fit_lda, n_topics=4), corpus, split)
    nmf = evaluate_peer(functools.partial(fit_nmf, n_topics=4), corpus, split)
    assert plain.perplexity == perplexity(np.ones((40, 1)), unigram(corpus.subset(split.train))[None], split.heldout)
    for peer in (lda, nmf):
        assert peer.perplexity < 0.75 * plain.perplexity
        better = paired_difference(peer.scores, plain.scores)
        assert better.mean > 4 * better.stderr
        assert peer.npmi.shape == (4,)
        assert peer.npmi.mean() > plain.npmi.mean()
    assert nmf.liveness.share[-1] == pytest.approx(0.1, abs=1e-9)
    assert lda.liveness.alive.all()
    assert (plain.diversity, plain.liveness.effective) == (1.0, 1.0)


def test_nmf_of_a_document_without_observations_is_the_unigram() -> None:
    corpus = topical(60)
    fit = fit_nmf(corpus, sp.csr_array(np.zeros((1, 60), np.int64)), n_topics=3)
    rates = (fit.mixture @ fit.topics)[0]
    np.testing.assert_allclose(rates / rates.sum(), unigram(corpus))


# Coherence


def test_npmi_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK", 50)
    corpus, rng = topical(80), np.random.default_rng(1)
    topics = rng.dirichlet(np.ones(60), 5)
    occurs = corpus.to_csr().toarray() > 0
    exact = []
    for words in top_words(topics, 6):
        values = []
        for i, j in itertools.combinations(words, 2):
            p, pi, pj = (occurs[:, i] & occurs[:, j]).mean(), occurs[:, i].mean(), occurs[:, j].mean()
            values.append(math.log(p / (pi * pj)) / -math.log(p) if p else -1.0)
        exact.append(np.mean(values))
    np.testing.assert_allclose(npmi(topics, corpus, top=6), exact, rtol=1e-12)


def test_npmi_at_its_ends() -> None:
    corpus = Corpus.from_matrix(np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]))
    topics = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1.0]])
    np.testing.assert_allclose(npmi(topics, corpus, top=2), [0, 1, -1], atol=1e-12)
    with pytest.raises(CorpusError, match="the coherence"):
        npmi(topics[:, :4], corpus)
    with pytest.raises(CorpusError, match="expected 1 to 5"):
        npmi(topics, corpus, top=6)


def test_diversity_and_liveness() -> None:
    assert diversity(np.tile(np.arange(50.0), (4, 1))) == 0.25
    live = liveness(np.array([[1.0, 1, 1e-4], [1, 1, 0]]))
    assert live.alive.tolist() == [True, True, False]
    assert live.effective == pytest.approx(2, abs=1e-3)
    scaled = liveness(np.array([[1.0, 1.0]]), np.array([[3.0, 0], [0.5, 0.5]]))
    np.testing.assert_allclose(scaled.share, [0.75, 0.25])
    with pytest.raises(CorpusError, match="not all 0"):
        liveness(np.zeros((2, 2)))
