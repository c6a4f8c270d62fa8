"""A corpus as the source of a streamed target: stratified minibatches in chunks of one document each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

from hivi._space import Plate
from hivi._target.base import Source
from hivi.topics.base import Corpus
from hivi.topics.kernels import Batch, Observations

PLATE = "documents"
CHUNKS = (16, 32, 64)
SLACK = 1.05
"""Room for batches that are a little longer than those seen so far: a new size compiles anew."""


class CorpusSource(Source):
    """Documents of a corpus, a minibatch at a time; in memory there is one block of minibatches.

    Minibatches are stratified by length: documents are sorted by their number of words, and each run of neighbours is
    dealt out, one to each minibatch, at random. So all minibatches are of nearly one size, and each document is as likely
    in each of them.

    Args:
        corpus: the documents.
        batch: documents per minibatch, at most; fewer where that divides the corpus better.
        kind: Bernoulli data forget how often a word occurs.
    """

    def __init__(self, corpus: Corpus, batch: int, kind: Observations = "poisson"):
        self.corpus, self.kind = corpus, kind
        steps = max(1, round(corpus.n_documents / batch))
        self.plate = Plate(PLATE, corpus.n_documents, max(1, corpus.n_documents // steps))
        self._steps = steps
        words = np.diff(corpus.indptr)
        self._order = np.argsort(words, kind="stable")
        mean = words.mean() if len(words) else 1.0
        self.length = next((n for n in CHUNKS if mean <= 3 * n), CHUNKS[-1])
        self._capacity = 0

    def passes(self, rng: np.random.Generator) -> list[np.ndarray]:
        batch, steps = self.plate.batch, self._steps
        left_out = rng.choice(self.plate.size, self.plate.size - batch * steps, replace=False)
        kept = self._order[~np.isin(self._order, left_out)] if len(left_out) else self._order
        dealt = rng.permuted(kept.reshape(batch, steps), axis=1)
        return [np.sort(dealt[:, k]) for k in range(steps)]

    def blocks(self) -> list[np.ndarray]:
        batch = self.plate.batch
        full = -(-self.plate.size // batch) * batch
        rows = np.concatenate([np.arange(self.plate.size), np.full(full - self.plate.size, -1)])
        return list(rows.reshape(-1, batch))

    def load(self, batches: Sequence[np.ndarray]) -> Batch:
        loaded = [self._counts(ids) for ids in batches]
        needed = max(int(np.sum(-(-np.diff(x.indptr) // self.length))) for x in loaded)
        if needed > self._capacity:
            self._capacity = int(np.ceil(needed * SLACK))
        packed = [pack(x, self.length, self._capacity, self.kind) for x in loaded]
        return Batch(*(np.stack(parts) for parts in zip(*packed, strict=True)))

    def _counts(self, ids: np.ndarray) -> sp.csr_array:
        """The documents with these numbers; -1 is an empty document (all of them stand at the end)."""
        real = ids[ids >= 0]
        found = self.corpus.rows(real) if len(real) else sp.csr_array((0, self.corpus.n_words), dtype=np.int32)
        missing = len(ids) - len(real)
        if missing:
            indptr = np.concatenate([found.indptr, np.full(missing, found.indptr[-1])])
            found = sp.csr_array((found.data, found.indices, indptr), shape=(len(ids), self.corpus.n_words))
        return found


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
    constant = np.zeros(len(per_document))
    if kind == "poisson" and counts.nnz:
        table = gammaln(np.arange(int(counts.data.max()) + 1) + 1.0) if counts.data.max() < 2**16 else None
        each = table[counts.data] if table is not None else gammaln(counts.data + 1.0)
        constant = -np.bincount(np.repeat(np.arange(len(per_document)), per_document), each, len(per_document))
    return Batch(words, values, document, constant.astype(np.float32))
