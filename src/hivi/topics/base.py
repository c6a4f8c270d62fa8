"""A corpus: how often each word occurs in each document, in memory or on disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Int, Int32, Int64

from hivi._errors import CorpusError, message

Ids = Int[np.ndarray, " ids"] | Sequence[int]
"""Numbers of documents, from 0."""

BLOCK = 2**22
"""Counts are read so many at a time, unless one document has more."""
MOST = int(np.iinfo(np.int32).max)
"""Largest count, and largest vocabulary."""
META = "corpus.json"
ENTRIES, UNFINISHED = ("indices", "counts"), ".unfinished"
ARRAYS = {"indptr": np.int64, "indices": np.int32, "counts": np.int32}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Counts of words in documents, as compressed sparse rows.

    Document d has the words `indices[indptr[d]:indptr[d + 1]]`, increasing, and the same slice of `counts` says how often each
    occurs. The arrays may be `numpy.memmap`: then nothing is read from disk before it is asked for.

    Attributes:
        indptr: where each document starts; as many as documents, and one more.
        indices: the words, from 0.
        counts: how often, at least 1.
        n_words: size of the vocabulary; words that occur nowhere included.
        vocabulary: the words themselves, where they are known.
        name: of the corpus, for tables and messages.

    Raises:
        CorpusError: the arrays do not belong together.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> corpus = Corpus.from_matrix(np.array([[2, 0, 1], [0, 3, 0]]), vocabulary=("cat", "dog", "eel"))
        >>> corpus
        Corpus('matrix': 2 documents, 3 words, 3 counts)
        >>> corpus.lengths(), corpus.word(1)
        (array([3, 3]), 'dog')
    """

    indptr: Int64[np.ndarray, " offsets"]
    indices: Int32[np.ndarray, " nonzeros"]
    counts: Int32[np.ndarray, " nonzeros"]
    n_words: int
    vocabulary: tuple[str, ...] | None = None
    name: str = "corpus"

    def __post_init__(self) -> None:
        where = f"corpus {self.name!r}"
        for name, dtype in ARRAYS.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                found, cure = f"{name} of type {array.dtype}, {array.ndim} axes", "build it with Corpus.from_matrix"
                raise CorpusError(message(where, found, f"one axis of {np.dtype(dtype)}", cure))
        sizes = (len(self.indices), len(self.counts), int(self.indptr[-1]) if len(self.indptr) else -1)
        if len(set(sizes)) > 1 or self.indptr[0] != 0 or np.any(np.diff(self.indptr) < 0):
            found = f"{sizes[0]} indices, {sizes[1]} counts, and offsets that end at {sizes[2]}"
            expected = "offsets that rise from 0 to the number of indices and counts"
            raise CorpusError(message(where, found, expected, "build it with Corpus.from_matrix"))
        if not 0 < self.n_words <= MOST:
            raise CorpusError(message(where, f"{self.n_words} words", f"1 to {MOST}", "give the vocabulary's size"))
        check_vocabulary(where, self.vocabulary, self.n_words)

    def __repr__(self) -> str:
        sizes = f"{self.n_documents} documents, {self.n_words} words, {self.n_nonzeros} counts"
        return f"Corpus({self.name!r}: {sizes})"

    @property
    def n_documents(self) -> int:
        """How many documents; empty ones included."""
        return len(self.indptr) - 1

    @property
    def n_nonzeros(self) -> int:
        """How many (document, word) pairs occur."""
        return len(self.indices)

    @functools.cached_property
    def n_tokens(self) -> int:
        """Sum of all counts."""
        return int(self.lengths().sum())

    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of each document."""
        return self._lengths

    def totals(self) -> Int64[np.ndarray, " words"]:
        """Tokens of each word."""
        total = np.zeros(self.n_words, np.float64)  # exact to 2**53
        for documents in self.blocks():
            s = slice(self.indptr[documents.start], self.indptr[documents.stop])
            total += np.bincount(self.indices[s], self.counts[s], minlength=self.n_words)
        return total.astype(np.int64)

    def blocks(self, nonzeros: int = BLOCK) -> Iterator[slice]:
        """Slices of documents with at most so many counts each, unless it is one document."""
        start = 0
        while start < self.n_documents:
            stop = int(np.searchsorted(self.indptr, self.indptr[start] + nonzeros, side="right")) - 1
            stop = min(max(stop, start + 1), self.n_documents)
            yield slice(start, stop)
            start = stop

    def rows(self, ids: Ids | slice) -> sp.csr_array:
        """Counts of these documents alone, in this order, as a sparse array of int32; only they are loaded.

        Args:
            ids: numbers of documents from 0, repeats allowed; or a slice.

        Raises:
            CorpusError: no such document, or the words on disk are none of the vocabulary's.

        Example:
            >>> import numpy as np
            >>> from hivi.topics.base import Corpus
            >>> Corpus.from_matrix(np.array([[2, 0], [0, 3], [1, 1]])).rows([2, 0]).toarray()
            array([[1, 1],
                   [2, 0]], dtype=int32)
        """
        if isinstance(ids, slice):
            ids = np.arange(*ids.indices(self.n_documents))
        ids = self._checked(ids)
        offsets = np.concatenate([[0], np.cumsum(self.indptr[ids + 1] - self.indptr[ids])])
        if len(ids) and np.all(np.diff(ids) == 1):
            at: slice | np.ndarray = slice(self.indptr[ids[0]], self.indptr[ids[-1] + 1])
        else:
            at = np.repeat(self.indptr[ids] - offsets[:-1], np.diff(offsets)) + np.arange(offsets[-1])
        indices, counts = np.array(self.indices[at]), np.array(self.counts[at])
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n_words:
            found, cure = f"words {indices.min()} to {indices.max()}", "read the corpus again from its source"
            raise CorpusError(message(f"corpus {self.name!r}", found, f"0 to {self.n_words - 1}", cure))
        small = np.int32 if offsets[-1] <= MOST else np.int64
        rows = sp.csr_array((counts, indices, offsets.astype(small)), shape=(len(ids), self.n_words))
        rows.has_canonical_format = True
        return rows

    def to_csr(self) -> sp.csr_array:
        """All counts as one sparse array of int32, in memory."""
        return self.rows(slice(None))

    def subset(self, ids: Ids, folder: str | Path | None = None) -> Corpus:
        """The corpus of these documents, in this order.

        Args:
            ids: numbers of documents, from 0.
            folder: where to write it; in memory without one.

        Raises:
            CorpusError: no such document.

        Example:
            >>> import numpy as np
            >>> from hivi.topics.base import Corpus
            >>> Corpus.from_matrix(np.array([[2, 0], [0, 3], [1, 1]])).subset([1, 2]).n_tokens
            5
        """
        ids = self._checked(ids)
        indptr = np.concatenate([[0], np.cumsum(self.indptr[ids + 1] - self.indptr[ids])])
        indices, counts = allocate(int(indptr[-1]), folder)
        part = dataclasses.replace(self, indptr=indptr, indices=indices, counts=counts)
        for block in part.blocks():
            rows, s = self.rows(ids[block]), slice(indptr[block.start], indptr[block.stop])
            indices[s], counts[s] = rows.indices, rows.data
        return part if folder is None else part.finish(folder)

    @classmethod
    def from_matrix(cls, X: Any, vocabulary: Sequence[str] | None = None, name: str = "matrix") -> Corpus:
        """Take the counts from a sparse or dense matrix, documents in rows.

        Args:
            X: whole numbers from 0, of any type; entries given twice are added up, zeros are dropped. It is not changed.
            vocabulary: one word per column.
            name: of the corpus.

        Raises:
            CorpusError: an entry is no count, naming its document and word.

        Example:
            >>> import numpy as np
            >>> from hivi.topics.base import Corpus
            >>> Corpus.from_matrix(np.array([[0, 0], [4.0, 0]])).counts
            array([4], dtype=int32)
        """
        where, wanted = f"matrix {name!r}", "a matrix of counts, documents in rows and words in columns"
        matrix = X if sp.issparse(X) else np.asarray(X)
        if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
            found = f"{matrix.ndim} axes of {matrix.dtype}"
            raise CorpusError(message(where, found, wanted, "pass a SciPy sparse array or a NumPy array"))
        coo = sp.coo_array(matrix)
        with np.errstate(invalid="ignore"):
            wrong = np.flatnonzero(~((coo.data >= 0) & (coo.data <= MOST) & (coo.data == np.floor(coo.data))))
        if len(wrong):
            i = int(wrong[0])
            at = f"{where}, document {coo.row[i]}, word {coo.col[i]}"
            cure = "pass raw counts, not frequencies or tf-idf"
            raise CorpusError(message(at, str(coo.data[i]), f"a whole number from 0 to {MOST}", cure))
        csr = sp.csr_array((coo.data.astype(np.int64), (coo.row, coo.col)), shape=matrix.shape)
        csr.sum_duplicates()
        csr.eliminate_zeros()
        if csr.nnz and csr.data.max() > MOST:
            raise CorpusError(
                message(where, f"{csr.data.max()} of a word in one document", f"at most {MOST}", "split it")
            )
        words = None if vocabulary is None else tuple(vocabulary)
        arrays = csr.indptr.astype(np.int64), csr.indices.astype(np.int32), csr.data.astype(np.int32)
        return cls(*arrays, n_words=int(matrix.shape[1]), vocabulary=words, name=name)

    def word(self, i: int) -> str:
        """The i-th word, or "word i" where the vocabulary is not known."""
        if not 0 <= i < self.n_words:
            where, expected = f"corpus {self.name!r}", f"0 to {self.n_words - 1}"
            raise CorpusError(message(where, f"word {i}", expected, "words are counted from 0"))
        return f"word {i}" if self.vocabulary is None else self.vocabulary[i]

    def save(self, folder: str | Path) -> None:
        """Write it as raw NumPy arrays and a JSON file, which `Corpus.open` reads.

        Example:
            >>> import tempfile, numpy as np
            >>> from hivi.topics.base import Corpus
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     Corpus.from_matrix(np.array([[2, 0], [0, 3]]), name="two").save(folder)
            ...     Corpus.open(folder)
            Corpus('two': 2 documents, 2 words, 2 counts)
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("indices", "counts"):
            # Into a new file, then renamed: the old one may be what this corpus is mapped from.
            with (folder / f"{name}.npy.part").open("wb") as stream:
                np.save(stream, getattr(self, name), allow_pickle=False)
            os.replace(folder / f"{name}.npy.part", folder / f"{name}.npy")
        self._write_meta(folder)

    def finish(self, folder: str | Path) -> Corpus:
        """The same corpus read-only from `folder`, where `allocate` put its indices and counts."""
        for array in (self.indices, self.counts):
            if isinstance(array, np.memmap):
                array.flush()
        (Path(folder) / META).unlink(missing_ok=True)  # until all is in place, there is no corpus
        for name in ENTRIES:
            (Path(folder) / f"{name}{UNFINISHED}").replace(Path(folder) / f"{name}.npy")
        self._write_meta(Path(folder))
        return Corpus.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """A corpus that `save` wrote; its counts stay on disk until they are asked for.

        Raises:
            CorpusError: the folder holds no such corpus, or an incomplete one.
        """
        folder, cure = Path(folder), "save the corpus again with Corpus.save"
        wanted = f"a folder that Corpus.save wrote: {META} and {', '.join(f'{a}.npy' for a in ARRAYS)}"
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            indptr, indices, counts = (_mapped(folder / f"{name}.npy") for name in ARRAYS)
            n_words, name, nonzeros = int(meta["n_words"]), str(meta["name"]), int(meta["n_nonzeros"])
            words = None if meta["vocabulary"] is None else tuple(map(str, meta["vocabulary"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            found = f"{type(error).__name__}: {error}"
            raise CorpusError(message(str(folder), found, wanted, cure)) from None
        # Files may be longer: the reader of a text file does not know beforehand how many entries will be added up.
        if len(indices) < nonzeros or len(counts) < nonzeros:
            raise CorpusError(
                message(str(folder), f"{min(len(indices), len(counts))} counts", f"{nonzeros}, as {META} says", cure)
            )
        return cls(indptr, indices[:nonzeros], counts[:nonzeros], n_words, words, name)

    @functools.cached_property
    def _lengths(self) -> Int64[np.ndarray, " documents"]:
        lengths = np.zeros(self.n_documents, np.int64)
        for documents in self.blocks():
            ends = self.indptr[documents.start : documents.stop + 1]
            sums = np.concatenate([[0], np.cumsum(self.counts[ends[0] : ends[-1]], dtype=np.int64)])
            lengths[documents] = np.diff(sums[ends - ends[0]])
        lengths.flags.writeable = False
        return lengths

    def _checked(self, ids: Ids) -> Int64[np.ndarray, " ids"]:
        array, where = np.asarray(ids), f"documents of corpus {self.name!r}"
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            found = f"{array.ndim} axes of {array.dtype}"
            raise CorpusError(
                message(where, found, "a list of numbers", "turn a mask into numbers by numpy.flatnonzero")
            )
        if len(array) and not 0 <= array.min() <= array.max() < self.n_documents:
            found, expected = f"{array.min()} to {array.max()}", f"numbers from 0 to {self.n_documents - 1}"
            raise CorpusError(message(where, found, expected, "count documents from 0"))
        return array.astype(np.int64)

    def _write_meta(self, folder: Path) -> None:
        np.save(folder / "indptr.npy", self.indptr, allow_pickle=False)
        meta = {
            "n_words": self.n_words,
            "n_nonzeros": self.n_nonzeros,
            "name": self.name,
            "vocabulary": self.vocabulary,
        }
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")


def as_counts(X: Any, dtype: Any = None) -> sp.csr_array:
    """Rows with each word once, in order, and no stored zeros; the matrix itself is not changed.

    Example:
        >>> import scipy.sparse as sp
        >>> from hivi.topics.base import as_counts
        >>> given = sp.csr_array(([2, 0, 1], ([0, 0, 0], [1, 2, 1])), shape=(1, 3))  # a zero, and a word given twice
        >>> as_counts(given).data, given.nnz
        (array([3]), 2)
    """
    rows = sp.csr_array(X, dtype=dtype)
    if not rows.has_canonical_format or not rows.data.all():
        rows = rows.copy()  # else its arrays may be those of X
        rows.sum_duplicates()
        rows.eliminate_zeros()
    return rows


def allocate(nonzeros: int, folder: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Writable indices and counts: in memory, or in new files of a folder, where `Corpus.finish` puts them in place."""
    if folder is None:
        return np.empty(nonzeros, np.int32), np.empty(nonzeros, np.int32)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name in ENTRIES:
        (folder / f"{name}{UNFINISHED}").unlink(missing_ok=True)  # whoever has an old one mapped keeps it
        made.append(np.lib.format.open_memmap(folder / f"{name}{UNFINISHED}", "w+", np.int32, (nonzeros,)))
    return made[0], made[1]


def discard(folder: str | Path) -> None:
    """Remove what `allocate` made and `Corpus.finish` did not put in place; a corpus that was there before stays."""
    for name in ENTRIES:
        (Path(folder) / f"{name}{UNFINISHED}").unlink(missing_ok=True)


def check_vocabulary(where: str, vocabulary: Sequence[str] | None, n_words: int) -> None:
    """One word for each column.

    Raises:
        CorpusError: more or fewer.
    """
    if vocabulary is not None and len(vocabulary) != n_words:
        cure = "pass the vocabulary that belongs to these counts, one word per line, or none"
        raise CorpusError(message(where, f"a vocabulary of {len(vocabulary)} words", f"{n_words}", cure))


def check_same_words(where: str, words: Sequence[str], own: Sequence[str], of: str) -> None:
    """The words of a corpus are those of the one that a model knows, in the same order.

    Raises:
        CorpusError: naming the first word that differs.
    """
    for number, (mine, other) in enumerate(zip(own, words, strict=True), 1):
        if mine != other:
            cure = "count its words by the vocabulary that the model was trained with, in the same order"
            raise CorpusError(
                message(where, f"{other!r} as word {number} of its vocabulary", f"{mine!r}, as in {of}", cure)
            )


def _mapped(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    # indptr is small and read at every step; a mapping of nothing cannot be made
    return np.array(array) if path.stem == "indptr" or array.size == 0 else array
