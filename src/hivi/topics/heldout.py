"""One held-out protocol for every model of words in documents: document completion.

A share of the documents is kept from training. Of each, a share of the tokens is held out; a model sees the others, and is
scored by the perplexity of those held out, over the whole vocabulary. A word may be both observed and held out: the unit is the
token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Float64, Int64, Real

from hivi._errors import CorpusError, message
from hivi._fit.result import Estimate
from hivi.topics.base import Corpus, as_counts

CHUNK = 2**23
"""Numbers held at a time while scoring."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A corpus in parts.

    Attributes:
        train: documents that global parameters are learnt from, increasing.
        test: the others, increasing.
        observed: counts of the test documents that a model may see.
        heldout: counts that it is scored by; with `observed` they add up to the documents.
    """

    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]
    observed: sp.csr_array
    heldout: sp.csr_array


class Scores(NamedTuple):
    """How well held-out tokens were foreseen, document by document.

    Attributes:
        log_likelihood: Σ_w h_dw log p(w|d), in nats.
        tokens: Σ_w h_dw.
    """

    log_likelihood: Float64[np.ndarray, " documents"]
    tokens: Int64[np.ndarray, " documents"]

    @property
    def perplexity(self) -> float:
        """exp(-Σ_dw h_dw log p(w|d) / Σ_dw h_dw); infinite where a word was held impossible."""
        return float(np.exp(-self.log_likelihood.sum() / self.tokens.sum()))


def split_documents(
    n_documents: int, share: float = 0.1, seed: int = 0
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " test"]]:
    """Documents for training and for testing, each increasing.

    Args:
        n_documents: how many there are.
        share: of them for testing, between 0 and 1; rounded to whole documents.
        seed: of NumPy's default generator.

    Raises:
        CorpusError: nothing would be left on one side.

    Example:
        >>> from hivi.topics.heldout import split_documents
        >>> split_documents(6, share=0.3)
        (array([0, 1, 4, 5]), array([2, 3]))
    """
    _check_share("documents", share)
    n = round(share * n_documents)
    if not 0 < n < n_documents:
        found, cure = f"{n} of {n_documents} documents for testing", "use more documents, or another share"
        raise CorpusError(message("the split", found, "documents on both sides", cure))
    order = np.random.default_rng(seed).permutation(n_documents)
    return np.sort(order[n:]), np.sort(order[:n])


def hold_out_tokens(counts: Any, share: float = 0.1, seed: int = 1) -> tuple[sp.csr_array, sp.csr_array]:
    """Hold out tokens of each document, drawn without replacement: a share, rounded, but at least one.

    Nothing is held out of documents of one token or none. The reverse split, by which a model sees a tenth and is scored by the
    rest, is `share=0.9`; then of a few tokens all may be held out, and nothing observed.

    Args:
        counts: sparse counts, documents in rows.
        share: of the tokens to hold out, between 0 and 1.
        seed: of NumPy's default generator.

    Returns:
        Observed and held-out counts (int64), which add up to `counts`.

    Raises:
        CorpusError: no such share, or no token to hold out.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> from hivi.topics.heldout import hold_out_tokens
        >>> observed, heldout = hold_out_tokens(sp.csr_array(np.array([[3, 0, 7], [1, 0, 0]])), share=0.5)
        >>> heldout.toarray(), observed.toarray()
        (array([[1, 0, 4],
               [0, 0, 0]]), array([[2, 0, 3],
               [1, 0, 0]]))
    """
    _check_share("tokens", share)
    whole = sp.csr_array(counts, dtype=np.int64, copy=True)
    whole.sum_duplicates()  # words in order, on which the draws depend
    heldout, rng = whole.copy(), np.random.default_rng(seed)
    for d in range(whole.shape[0]):
        s = slice(whole.indptr[d], whole.indptr[d + 1])
        n = int(whole.data[s].sum())
        k = 0 if n < 2 else max(1, round(share * n))
        heldout.data[s] = rng.multivariate_hypergeometric(whole.data[s], k) if k else 0
    observed = whole.copy()
    observed.data -= heldout.data
    if not heldout.data.any():
        found, cure = "no document of two tokens or more", "test with longer documents"
        raise CorpusError(message("the split", found, "tokens to hold out", cure))
    observed.eliminate_zeros()
    heldout.eliminate_zeros()
    return observed, heldout


def make_split(corpus: Corpus, documents: float = 0.1, tokens: float = 0.1, seed: int = 0) -> Split:
    """Split a corpus: documents for training and testing, and the tokens of the latter.

    Args:
        corpus: all documents; only those for testing are loaded.
        documents: share of the documents for testing.
        tokens: share of their tokens that is held out; 0.9 for the reverse split.
        seed: of the documents' split; the tokens' is `seed + 1`.

    Raises:
        CorpusError: a share that leaves nothing on one side.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.heldout import make_split
        >>> split = make_split(Corpus.from_matrix(np.ones((10, 5))), documents=0.2, tokens=0.4)
        >>> split.test, split.heldout.sum(axis=1)
        (array([4, 6]), array([2, 2]))
    """
    train, test = split_documents(corpus.n_documents, documents, seed)
    return Split(train, test, *hold_out_tokens(corpus.rows(test), tokens, seed + 1))


def log_scores(mixture: Real[np.ndarray, "n k"], topics: Real[np.ndarray, "k v"], heldout: Any) -> Scores:
    """Score each document: p(w|d) is row d of mixture @ topics, normalised over the whole vocabulary.

    Args:
        mixture: how much each document has of each topic, from 0; any scale.
        topics: rates of the words of each topic, from 0; any scale.
        heldout: sparse counts of the n documents.

    Raises:
        CorpusError: negative numbers or NaN, sizes that do not fit, or a document with held-out tokens and no rate at all.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> from hivi.topics.heldout import log_scores
        >>> heldout = sp.csr_array(np.array([[2, 0], [0, 1]]))
        >>> log_scores(np.eye(2), np.array([[1.0, 1.0], [1.0, 3.0]]), heldout)
        Scores(log_likelihood=array([-1.38629436, -0.28768207]), tokens=array([2, 1]))
    """
    counts = as_counts(heldout, np.int64)
    n, k, v = len(mixture), len(topics), topics.shape[1]
    if mixture.shape[1] != k or counts.shape != (n, v):
        found = f"mixture {mixture.shape}, topics {topics.shape} and held-out counts {counts.shape}"
        cure = "pass one row of the mixture per held-out document"
        raise CorpusError(message("the scores", found, "(n, K), (K, V) and (n, V)", cure))
    for name, array in (("mixture", mixture), ("topics", topics)):
        if not np.all(np.isfinite(array)) or np.min(array, initial=0) < 0:
            where, cure = f"the {name}", "pass expected rates, not their logarithms"
            raise CorpusError(message(where, "a number that is negative or not finite", "numbers from 0", cure))
    mixture, words = np.asarray(mixture, np.float64), np.ascontiguousarray(topics.T, np.float64)
    norm, tokens = mixture @ words.sum(0), np.asarray(counts.sum(axis=1)).astype(np.int64)
    if np.any((norm == 0) & (tokens > 0)):
        where = f"document {np.flatnonzero((norm == 0) & (tokens > 0))[0]} of the mixture"
        raise CorpusError(message(where, "no topic", "a positive rate", "give it the prior's mean"))
    scores = np.zeros(n)
    with np.errstate(divide="ignore"):  # log 0: the word was held impossible
        for rows, s in _chunks(counts.indptr, max(1, CHUNK // k)):
            rates = np.einsum("nk,nk->n", mixture[rows], words[counts.indices[s]])
            scores += np.bincount(rows, counts.data[s] * np.log(rates / norm[rows]), minlength=n)
    return Scores(scores, tokens)


def perplexity(mixture: Real[np.ndarray, "n k"], topics: Real[np.ndarray, "k v"], heldout: Any) -> float:
    """Perplexity of held-out tokens: exp(-Σ_dw h_dw log p(w|d) / Σ_dw h_dw), lower is better; see `log_scores`.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> from hivi.topics.heldout import perplexity
        >>> round(perplexity(np.ones((2, 1)), np.ones((1, 50)), sp.csr_array(np.ones((2, 50)))), 6)
        50.0
    """
    return log_scores(mixture, topics, heldout).perplexity


def paired_difference(a: Scores, b: Scores) -> Estimate:
    """How much better `a` foresaw the same held-out tokens than `b`: nats per token, positive if it did.

    Δ = Σ_d (a_d - b_d) / Σ_d n_d, and its standard error over documents, as of a ratio of means. exp(-Δ) is the ratio of the
    perplexities.

    Raises:
        CorpusError: scores of different held-out tokens.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.heldout import Scores, paired_difference
        >>> a, b = Scores(np.array([-3.0, -8.0]), np.array([2, 4])), Scores(np.array([-4.0, -9.0]), np.array([2, 4]))
        >>> print(paired_difference(a, b))
        0.3333 ± 0.1111

    Source: Cochran (1977), Sampling Techniques, section 6.3.
    """
    if not np.array_equal(a.tokens, b.tokens) or len(a.tokens) < 2:
        found = f"{a.tokens.sum()} tokens of {len(a.tokens)} documents and {b.tokens.sum()} of {len(b.tokens)}"
        cure = "score both models by the same split"
        raise CorpusError(message("the comparison", found, "the same tokens, of two documents or more", cure))
    difference, total, n = a.log_likelihood - b.log_likelihood, a.tokens.sum(), len(a.tokens)
    mean = difference.sum() / total
    residual = difference - mean * a.tokens
    return Estimate(float(mean), float(np.sqrt(n / (n - 1) * np.sum(residual**2)) / total))


def unigram(train: Corpus, add: float = 1.0) -> Float[np.ndarray, " words"]:
    """Frequencies of the words in a corpus, each counted `add` times more: the simplest model, and the scale of the others.

    Raises:
        CorpusError: `add` is negative, or nothing was counted.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.heldout import unigram
        >>> unigram(Corpus.from_matrix(np.array([[2, 0, 1], [3, 0, 1]])))
        array([0.6, 0.1, 0.3])
    """
    counts = train.totals() + add
    if add < 0 or not counts.sum() > 0:
        raise CorpusError(message("the unigram", f"{add} added to each count", "a positive total", "add 1.0"))
    return counts / counts.sum()


def _check_share(what: str, share: float) -> None:
    if not 0 < share < 1:
        raise CorpusError(message("the split", f"a share {share} of the {what}", "between 0 and 1", "use 0.1, or 0.9"))


def _chunks(indptr: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, slice]]:
    """The row of each of a few stored entries, and which these are."""
    for start in range(0, int(indptr[-1]), size):
        s = slice(start, min(start + size, int(indptr[-1])))
        yield np.searchsorted(indptr, np.arange(s.start, s.stop), side="right") - 1, s
