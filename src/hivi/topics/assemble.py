"""Entries from a stream, in any order, to a corpus in memory or on disk, with bounded memory."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int64

from hivi._errors import CorpusError, message
from hivi.topics.base import MOST, Corpus, allocate, discard

IN_MEMORY = 2 * 10**7
"""A corpus with more counts is kept on disk."""

Stream = Callable[[], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]
"""Starts the stream of (documents, words, counts) from its beginning."""


def assemble(
    stream: Stream,
    n_documents: int,
    n_words: int | None,
    nonzeros: int,
    vocabulary: tuple[str, ...] | None,
    name: str,
    folder: str | Path | None,
) -> Corpus:
    """The corpus of a stream of entries; those of one document and word are added up.

    One pass where documents come in order, as they mostly do; else a second one scatters the entries to their places.

    Args:
        stream: starts the stream.
        n_documents: documents are below it.
        n_words: words are below it; None for the largest of the stream.
        nonzeros: how many entries the stream has.
        vocabulary: one word each.
        name: of the corpus.
        folder: where to write it. Without one it is kept in memory, or, with more than `IN_MEMORY` entries, in a temporary
            folder that goes when the corpus does.

    Raises:
        CorpusError: from the stream; or counts that add up to more than 32 bits.
    """
    temporary = None
    if folder is None and nonzeros > IN_MEMORY:
        folder = temporary = tempfile.mkdtemp(prefix="hivi-corpus-")
    try:
        indices, counts = allocate(nonzeros, folder)
        sizes, ordered, largest = _append(stream, indices, counts, n_documents)
        n_words = largest + 1 if n_words is None else n_words
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        if not ordered:
            _scatter(stream, indices, counts, indptr)
        raw = Corpus(indptr, indices, counts, n_words, vocabulary, name)
        indptr = _tidy(raw)
        corpus = dataclasses.replace(raw, indptr=indptr, indices=indices[: indptr[-1]], counts=counts[: indptr[-1]])
        if folder is not None:
            corpus = corpus.finish(folder)
    except BaseException:
        if folder is not None:
            discard(folder)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(corpus, shutil.rmtree, temporary, ignore_errors=True)
    return corpus


def _append(
    stream: Stream, indices: np.ndarray, counts: np.ndarray, n_documents: int
) -> tuple[Int64[np.ndarray, " documents"], bool, int]:
    """Entries of each document, whether documents came in order, and the largest word; writes the entries while they do."""
    sizes, ordered, largest = np.zeros(n_documents, np.int64), True, 0
    at = previous = 0
    for documents, words, number in stream():
        if not len(documents):
            continue
        ordered = ordered and documents[0] >= previous and not np.any(np.diff(documents) < 0)
        if ordered:
            s, previous = slice(at, at + len(documents)), documents[-1]
            indices[s], counts[s] = words, number
            at = s.stop
        low = int(documents.min())
        more = np.bincount(documents - low)
        sizes[low : low + len(more)] += more
        largest = max(largest, int(words.max()))
    return sizes, ordered, largest


def _scatter(stream: Stream, indices: np.ndarray, counts: np.ndarray, indptr: Int64[np.ndarray, " offsets"]) -> None:
    """Write each entry to the next free place of its document."""
    free = indptr[:-1].copy()
    for documents, words, number in stream():
        order = np.argsort(documents, kind="stable")
        ids, starts, sizes = np.unique(documents[order], return_index=True, return_counts=True)
        places = np.repeat(free[ids] - starts, sizes) + np.arange(len(order))
        indices[places], counts[places] = words[order], number[order]
        free[ids] += sizes


def _tidy(raw: Corpus) -> Int64[np.ndarray, " offsets"]:
    """Sort the words of each document, add up those given twice, drop zeros: in place; return where documents start then."""
    sizes, kept = np.diff(raw.indptr), 0
    for block in raw.blocks():
        ends = raw.indptr[block.start : block.stop + 1]
        s = slice(ends[0], ends[-1])
        indices, counts, indptr = np.array(raw.indices[s]), np.array(raw.counts[s]), ends - ends[0]
        rising = np.diff(indices, prepend=-1) > 0
        rising[indptr[:-1][indptr[:-1] < len(rising)]] = True
        if not (np.all(rising) and np.all(counts > 0)):
            rows = sp.csr_array((counts.astype(np.int64), indices, indptr), shape=(len(indptr) - 1, raw.n_words))
            rows.sum_duplicates()
            rows.eliminate_zeros()
            if rows.nnz and rows.data.max() > MOST:
                document = block.start + int(np.searchsorted(rows.indptr, rows.data.argmax(), side="right"))
                where, found = f"corpus {raw.name!r}, document {document}", f"a word {rows.data.max()} times"
                raise CorpusError(message(where, found, f"at most {MOST}", "split the document"))
            indices, counts = rows.indices, rows.data
            sizes[block] = np.diff(rows.indptr)
        # What is kept never overtakes what is read.
        t = slice(kept, kept + len(indices))
        if t != s or not np.all(rising):
            raw.indices[t], raw.counts[t] = indices, counts
        kept = t.stop
    return np.concatenate([[0], np.cumsum(sizes)])
