"""Other models of the same counts, under the same held-out protocol: unigram, LDA, and non-negative factors."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from sklearn.decomposition import NMF, LatentDirichletAllocation
from sklearn.exceptions import ConvergenceWarning

from hivi.topics.base import Corpus
from hivi.topics.coherence import Liveness, diversity, liveness, npmi
from hivi.topics.heldout import Scores, Split, log_scores, unigram


class PeerFit(NamedTuple):
    """What a model says of the test documents, given what it observed of them.

    Attributes:
        mixture: how much each test document has of each topic.
        topics: rates of the words of each, which predict held-out tokens.
        train_topics: the topics as learnt, to be looked at: those whose coherence is measured.
    """

    mixture: Float64[np.ndarray, "documents components"]
    topics: Float64[np.ndarray, "components words"]
    train_topics: Float64[np.ndarray, "topics words"]


Peer = Callable[[Corpus, Any], PeerFit]
"""(corpus of the training documents, sparse counts observed of the test documents) -> fit."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """A peer's figures.

    Attributes:
        fit: what it learnt.
        scores: of the test documents, for paired comparisons.
        perplexity: of the held-out tokens.
        npmi: coherence of each topic's ten top words in the training documents.
        diversity: share of different words among the 25 top words of all topics.
        liveness: which topics the test documents use, the unigram mixed in included.
        seconds: of fitting.
    """

    fit: PeerFit
    scores: Scores
    perplexity: float
    npmi: Float64[np.ndarray, " topics"]
    diversity: float
    liveness: Liveness
    seconds: float


def evaluate_peer(peer: Peer, corpus: Corpus, split: Split) -> Evaluation:
    """Fit a peer to the training documents, and score the held-out tokens of the others.

    Args:
        peer: such as `fit_unigram`, or `functools.partial(fit_lda, n_topics=20)`.
        corpus: all documents.
        split: of `make_split`.

    Example:
        >>> import functools, numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.heldout import make_split
        >>> from hivi.topics.peers import evaluate_peer, fit_lda, fit_unigram
        >>> rng = np.random.default_rng(0)
        >>> rates = np.kron(np.eye(2), np.ones((40, 15))) + 0.1
        >>> corpus = Corpus.from_matrix(rng.poisson(rates))
        >>> split = make_split(corpus, documents=0.2, tokens=0.3)
        >>> lda = evaluate_peer(functools.partial(fit_lda, n_topics=2), corpus, split)
        >>> lda.perplexity < evaluate_peer(fit_unigram, corpus, split).perplexity
        True
    """
    train = corpus.subset(split.train)
    start = time.perf_counter()
    fit = peer(train, split.observed)
    seconds = time.perf_counter() - start
    scores = log_scores(fit.mixture, fit.topics, split.heldout)
    words = fit.train_topics.shape[1]
    coherence, different = npmi(fit.train_topics, train, min(10, words)), diversity(fit.train_topics, min(25, words))
    live = liveness(fit.mixture, fit.topics)
    return Evaluation(fit, scores, scores.perplexity, coherence, different, live, seconds)


def fit_unigram(train: Corpus, observed: Any, add: float = 1.0) -> PeerFit:
    """The same frequencies of words for every document; see `heldout.unigram`.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.peers import fit_unigram
        >>> corpus = Corpus.from_matrix(np.array([[2, 0, 1], [3, 0, 1]]))
        >>> fit_unigram(corpus, corpus.rows([0])).topics
        array([[0.6, 0.1, 0.3]])
    """
    frequencies = unigram(train, add)[None]
    return PeerFit(np.ones((observed.shape[0], 1)), frequencies, frequencies)


def fit_lda(train: Corpus, observed: Any, n_topics: int = 50, seed: int = 0, iterations: int = 30) -> PeerFit:
    """Latent Dirichlet allocation by scikit-learn: batch variational Bayes, priors 1/K.

    Args:
        train: training documents, loaded at once.
        observed: sparse counts of the test documents, one row each.
        n_topics: K.
        seed: of the start.
        iterations: passes over the training documents.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.peers import fit_lda
        >>> corpus = Corpus.from_matrix(np.kron(np.eye(2), np.full((5, 3), 4)))
        >>> fit = fit_lda(corpus, corpus.rows([0, 9]), n_topics=2)
        >>> fit.mixture.argmax(axis=1)[0] != fit.mixture.argmax(axis=1)[1]
        np.True_

    Source: Blei, Ng and Jordan (2003); Hoffman, Blei and Bach (2010).
    """
    model = LatentDirichletAllocation(n_topics, learning_method="batch", max_iter=iterations, random_state=seed)
    model.fit(train.to_csr())
    topics = np.asarray(model.components_, np.float64)
    topics = topics / topics.sum(axis=1, keepdims=True)
    return PeerFit(np.asarray(model.transform(observed), np.float64), topics, topics)


def fit_nmf(
    train: Corpus, observed: Any, n_topics: int = 50, seed: int = 0, iterations: int = 200, share: float = 0.1
) -> PeerFit:
    """Non-negative factors of the counts by scikit-learn: least Kullback-Leibler divergence, multiplicative updates.

    Its rates can be 0, so that a word would be impossible; the training documents' unigram makes up `share` of every document
    as one topic more.

    Args:
        train: training documents, loaded at once.
        observed: sparse counts of the test documents, one row each.
        n_topics: K.
        seed: of the start.
        iterations: most of the updates.
        share: of the unigram, between 0 and 1.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.peers import fit_nmf
        >>> corpus = Corpus.from_matrix(np.kron(np.eye(2), np.full((5, 3), 4)))
        >>> fit = fit_nmf(corpus, corpus.rows([0, 9]), n_topics=2)
        >>> np.round((fit.mixture @ fit.topics)[0], 1)
        array([4.2, 4.2, 4.2, 0.2, 0.2, 0.2])

    Source: Lee and Seung (2001).
    """
    options = {"init": "nndsvda", "solver": "mu", "beta_loss": "kullback-leibler", "max_iter": iterations}
    model = NMF(n_topics, random_state=seed, **options)
    seen = np.flatnonzero(np.diff(observed.indptr))  # the others have the unigram alone
    mixture = np.zeros((observed.shape[0], n_topics))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # iterations are a budget
        model.fit(train.to_csr().astype(np.float64))
        if len(seen):
            mixture[seen] = model.transform(observed[seen].astype(np.float64))
    topics = np.asarray(model.components_, np.float64)
    rate = mixture @ topics.sum(axis=1)
    common = np.where(rate > 0, share / (1 - share) * rate, 1.0)
    return PeerFit(np.column_stack([mixture, common]), np.vstack([topics, unigram(train)]), topics)
