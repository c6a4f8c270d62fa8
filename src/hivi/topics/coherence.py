"""What topics are like: whether their words belong together, how they differ, and which are used."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Bool, Float, Float64, Int64, Real

from hivi._errors import CorpusError, message
from hivi.topics.base import Corpus

LEAST = 0.01
"""A topic is alive if it has more than this part of an equal share of the tokens."""


class Liveness(NamedTuple):
    """Which topics are used.

    Attributes:
        share: of the expected tokens that each topic makes; they add up to 1.
        alive: whether the share is more than a hundredth of 1/K.
        effective: number of topics that are used, exp(-Σ_k share_k log share_k): K if all are used equally.
    """

    share: Float64[np.ndarray, " topics"]
    alive: Bool[np.ndarray, " topics"]
    effective: float


def top_words(topics: Real[np.ndarray, "k v"], top: int = 10) -> Int64[np.ndarray, "k top"]:
    """The words of highest rate in each topic, highest first; of equals the first.

    Raises:
        CorpusError: the vocabulary has fewer words.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.coherence import top_words
        >>> top_words(np.array([[0.1, 0.5, 0.4], [0.3, 0.3, 0.4]]), top=2)
        array([[1, 2],
               [2, 0]])
    """
    if not 0 < top <= topics.shape[1]:
        expected = f"1 to {topics.shape[1]}, the size of the vocabulary"
        raise CorpusError(message("the topics' top words", str(top), expected, "ask for fewer"))
    return np.argsort(-np.asarray(topics, np.float64), axis=1, kind="stable")[:, :top].astype(np.int64)


def npmi(topics: Real[np.ndarray, "k v"], corpus: Corpus, top: int = 10) -> Float64[np.ndarray, " k"]:
    """Coherence of each topic: normalised pointwise mutual information, averaged over pairs of its top words.

    log(p_ij / (p_i p_j)) / -log p_ij, where p are shares of the documents in which words occur, and occur together. From -1,
    never together, over 0, independent, to 1, always together. A pair that never occurs together counts -1, and one of words
    that are in every document 0.

    Args:
        topics: rates of the words of each topic.
        corpus: the documents to look for words in; take those for training. It is read in blocks.
        top: words per topic, 2 or more.

    Raises:
        CorpusError: too many or too few words, or topics of another vocabulary.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.coherence import npmi
        >>> corpus = Corpus.from_matrix(np.array([[1, 2, 0, 0], [3, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
        >>> npmi(np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]), corpus, top=2)
        array([ 1., -1.])

    Source: Lau, Newman and Baldwin (2014), Machine Reading Tea Leaves, section 3.
    """
    if topics.shape[1] != corpus.n_words or top < 2 or not corpus.n_documents:
        found = f"topics over {topics.shape[1]} words, {top} words each, and {corpus}"
        raise CorpusError(
            message("the coherence", found, "topics over the corpus's words, 2 or more each", "correct them")
        )
    words = top_words(topics, top)
    together = _documents_together(words, corpus) / corpus.n_documents
    alone = np.diagonal(together, axis1=1, axis2=2)
    first, second = np.triu_indices(top, 1)
    p, independent = together[:, first, second], alone[:, first] * alone[:, second]
    value = np.full(p.shape, -1.0)
    value[p == 1] = 0.0
    inside = (p > 0) & (p < 1)
    value[inside] = np.log(p[inside] / independent[inside]) / -np.log(p[inside])
    return value.mean(axis=1)


def diversity(topics: Real[np.ndarray, "k v"], top: int = 25) -> float:
    """Share of the topics' top words that are different: 1 if no two topics share one, 1/K if all have the same.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.coherence import diversity
        >>> diversity(np.array([[3, 2, 1, 0], [0, 3, 2, 1]]), top=2)
        0.75

    Source: Dieng, Ruiz and Blei (2020), Topic Modeling in Embedding Spaces, section 6.
    """
    words = top_words(topics, top)
    return len(np.unique(words)) / words.size


def liveness(mixture: Real[np.ndarray, "n k"], topics: Real[np.ndarray, "k v"] | None = None) -> Liveness:
    """Which topics are used, by the tokens that each is expected to make in all documents.

    share_k ∝ Σ_d mixture_dk Σ_v topics_kv. Alive is a topic with more than a hundredth of an equal share: for K = 100, with
    more than 1e-4 of the tokens.

    Args:
        mixture: how much each document has of each topic, from 0.
        topics: rates of their words; without them, taken to add up to the same for each topic.

    Raises:
        CorpusError: no document has any topic.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.coherence import liveness
        >>> liveness(np.array([[1.0, 3.0, 0.0], [2.0, 0.0, 0.0]]))
        Liveness(share=array([0.5, 0.5, 0. ]), alive=array([ True,  True, False]), effective=2.0)
    """
    total = np.asarray(mixture, np.float64).sum(axis=0)
    if topics is not None:
        total = total * np.asarray(topics, np.float64).sum(axis=1)
    if not (np.all(np.isfinite(total)) and np.all(total >= 0) and total.sum() > 0):
        found, cure = f"totals {total[:5]} of the topics", "pass expected rates, not their logarithms"
        raise CorpusError(message("the mixture", found, "numbers from 0, and not all 0", cure))
    share = total / total.sum()
    used = share[share > 0]
    return Liveness(share, share > LEAST / len(share), float(np.exp(-np.sum(used * np.log(used)))))


def _documents_together(words: Int64[np.ndarray, "k top"], corpus: Corpus) -> Float[np.ndarray, "k top top"]:
    """In how many documents each two of a topic's words occur; on the diagonal, each word."""
    distinct, place = np.unique(words, return_inverse=True)
    place = place.reshape(words.shape)
    column = np.full(corpus.n_words, -1)
    column[distinct] = np.arange(len(distinct))
    counted = np.zeros((*words.shape, words.shape[1]))
    for block in corpus.blocks():
        rows = corpus.rows(block).tocoo()
        kept = column[rows.col] >= 0
        entries = (np.ones(np.count_nonzero(kept), np.int32), (rows.row[kept], column[rows.col[kept]]))
        occurs = sp.csc_array(entries, shape=(rows.shape[0], len(distinct)))
        for topic, columns in enumerate(place):
            own = occurs[:, columns]
            counted[topic] += (own.T @ own).toarray()
    return counted
