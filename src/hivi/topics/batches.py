"""A corpus as the source of a streamed target: stratified minibatches in chunks of one document each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

from hivi._space import Plate
from hivi._target.base import Source
from hivi.topics.architecture import PLATE, Observations
from hivi.topics.kernels import Batch

CHUNKS = (16, 32, 64)
GRID = 1.1
"""Numbers of chunks lie on a grid of this ratio, so that two corpora often share a compilation."""


@runtime_checkable
class Documents(Protocol):
    """What a source needs of a corpus."""

    @property
    def indptr(self) -> np.ndarray:
        """Where each document's nonzeros start."""

    @property
    def n_words(self) -> int:
        """Size of the vocabulary."""

    @property
    def n_documents(self) -> int:
        """Number of documents."""

    def rows(self, ids: Any) -> sp.csr_array:
        """The counts of some documents."""


class Counts:
    """Documents in memory whose counts may be fractions, as estimators must accept them."""

    def __init__(self, counts: sp.csr_array):
        self.counts, self.indptr, self.n_words = counts, counts.indptr, counts.shape[1]

    @property
    def n_documents(self) -> int:
        return int(self.counts.shape[0])

    @property
    def n_tokens(self) -> int:
        """Sum of all counts, rounded."""
        return round(float(self.counts.sum()))

    def rows(self, ids: Any) -> sp.csr_array:
        return self.counts[np.asarray(ids)]


class CorpusSource(Source):
    """Documents of a corpus, a minibatch at a time; in memory there is one block of minibatches.

    Minibatches are stratified by length: documents are sorted by their number of words, and each run of neighbours is
    dealt out, one to each minibatch, at random. So all minibatches are of nearly one size, and each document is as likely
    in each of them.

    Args:
        corpus: the documents.
        batch: documents per minibatch, at most; fewer where that divides the corpus better.
        kind: Bernoulli data forget how often a word occurs.
        local: for documents whose own latents alone are wanted: every pass visits all of them, in order, and the plate has
            the size of a minibatch, whatever their number.
    """

    def __init__(self, corpus: Documents, batch: int, kind: Observations = "poisson", local: bool = False):
        self.corpus, self.kind, self.local = corpus, kind, local
        documents = corpus.n_documents
        steps = max(1, math.ceil(documents / batch) if local else round(documents / batch))
        size = batch if local else max(1, documents // steps)
        self.plate = Plate(PLATE, batch if local else documents, size)
        self._steps, self._blocks = steps, math.ceil(documents / size)
        words = np.diff(np.asarray(corpus.indptr))
        self._order = np.argsort(words, kind="stable")
        mean = words.mean() if documents else 1.0
        self.length = next((n for n in CHUNKS if mean <= 3 * n), CHUNKS[-1])
        self._capacity = self._most(np.sort(-(-words // self.length)))

    def _most(self, chunks: np.ndarray) -> int:
        """No minibatch has more chunks: the sum, over the runs of neighbours, of the largest in each."""
        documents, size = len(chunks), self.plate.batch
        left_out = max(documents - size * self._steps, 0)
        dealt = chunks[np.minimum(np.arange(1, size + 1) * self._steps - 1 + left_out, documents - 1)].sum()
        padded = np.concatenate([np.zeros(size * self._blocks - documents, chunks.dtype), chunks])
        in_blocks = padded.reshape(size, self._blocks).max(1).sum()
        needed = max(int(dealt), int(in_blocks), 1)
        return math.ceil(GRID ** math.ceil(math.log(needed, GRID) - 1e-9))

    @property
    def rows(self) -> int:
        return self.corpus.n_documents

    def passes(self, rng: np.random.Generator) -> list[np.ndarray]:
        if self.local:
            return self.blocks()
        batch, steps = self.plate.batch, self._steps
        left_out = rng.choice(self.plate.size, self.plate.size - batch * steps, replace=False)
        kept = self._order[~np.isin(self._order, left_out)] if len(left_out) else self._order
        dealt = rng.permuted(kept.reshape(batch, steps), axis=1)
        return [np.sort(dealt[:, k]) for k in range(steps)]

    def blocks(self) -> list[np.ndarray]:
        missing = self.plate.batch * self._blocks - self.rows
        dealt = np.concatenate([np.full(missing, -1), self._order]).reshape(self.plate.batch, self._blocks)
        return [np.concatenate([np.sort(ids[ids >= 0]), ids[ids < 0]]) for ids in dealt.T]

    def load(self, batches: Sequence[np.ndarray]) -> Batch:
        packed = [pack(self._counts(ids), self.length, self._capacity, self.kind) for ids in batches]
        stacked: Any = [np.stack(parts) for parts in zip(*packed, strict=True)]
        return Batch(*stacked)

    def _counts(self, ids: np.ndarray) -> sp.csr_array:
        """The documents with these numbers; -1 is an empty document (all of them stand at the end)."""
        real = ids[ids >= 0]
        found = self.corpus.rows(real) if len(real) else sp.csr_array((0, self.corpus.n_words), dtype=np.int32)
        missing = len(ids) - len(real)
        if missing:
            indptr = np.concatenate([found.indptr, np.full(missing, found.indptr[-1])])
            found = sp.csr_array((found.data, found.indices, indptr), shape=(len(ids), self.corpus.n_words))
        return found


_FACTORIALS = gammaln(np.arange(2**16) + 1.0)


def pack(counts: sp.csr_array, length: int, capacity: int, kind: Observations = "poisson") -> Batch:
    """Chunks of `length` nonzeros of one document each, as NumPy arrays."""
    per_document = np.diff(counts.indptr)
    chunks = -(-per_document // length)
    total = int(chunks.sum())
    words = np.zeros((capacity, length), np.int32)
    values = np.zeros((capacity, length), np.float32)
    document = np.full(capacity, len(per_document), np.int32)
    first = np.repeat((np.cumsum(chunks) - chunks) * length - counts.indptr[:-1], per_document)
    at = np.arange(counts.nnz) + first
    data = np.ones(counts.nnz, np.float32) if kind == "bernoulli" else counts.data.astype(np.float32)
    words.reshape(-1)[at] = counts.indices
    values.reshape(-1)[at] = data
    document[:total] = np.repeat(np.arange(len(per_document)), chunks)
    constant: Any = np.zeros(len(per_document))
    if kind == "poisson" and counts.nnz:
        whole = np.issubdtype(counts.data.dtype, np.integer) and counts.data.max() < 2**16
        each = _FACTORIALS[counts.data] if whole else gammaln(counts.data + 1.0)
        constant = -np.bincount(np.repeat(np.arange(len(per_document)), per_document), each, len(per_document))
    arrays: Any = (words, values, document, constant.astype(np.float32))
    return Batch(*arrays)
