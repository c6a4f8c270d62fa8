"""What a model was trained on: enough to know, later, which documents are new to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from hivi._errors import CorpusError, LoadError, message
from hivi.topics.base import Corpus, check_same_words
from hivi.topics.heldout import split_documents

META, ARRAYS = "training.json", "training.npz"


class Unseen(NamedTuple):
    """Documents that a model may be tested on.

    Attributes:
        documents: their numbers, increasing.
        train: those it was trained on, where they are of the same corpus; else None.
        words: the choice in words.
    """

    documents: Int64[np.ndarray, " documents"]
    train: Int64[np.ndarray, " train"] | None
    words: str


@dataclasses.dataclass(frozen=True, eq=False)
class Provenance:
    """The corpus of a training run, and which of its documents were kept out.

    Attributes:
        name: of the corpus.
        vocabulary: its words, where they are known.
        n_words: how many.
        n_documents: documents, those kept out included.
        hold_out: share that was kept out, from 0.
        seed: of that split.
        signatures: a number for each document of the corpus: equal for equal ones.
        totals: how often each word occurs in the training documents.
    """

    name: str
    vocabulary: tuple[str, ...] | None
    n_words: int
    n_documents: int
    hold_out: float
    seed: int
    signatures: UInt64[np.ndarray, " documents"]
    totals: Int64[np.ndarray, " words"]

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents for training and those kept out."""
        if not self.hold_out:
            return np.arange(self.n_documents), np.zeros(0, np.int64)
        return split_documents(self.n_documents, self.hold_out, self.seed)

    def check_words(self, corpus: Corpus) -> None:
        """Refuse a corpus of other words.

        Raises:
            CorpusError: naming the first word that differs.
        """
        where = f"corpus {corpus.name!r}"
        cure = "count its words by the vocabulary that the model was trained with, in the same order"
        if corpus.n_words != self.n_words:
            expected = f"the {self.n_words} words of {self.name!r}, which the model was trained on"
            raise CorpusError(message(where, f"{corpus.n_words} words", expected, cure))
        if self.vocabulary is not None and corpus.vocabulary is not None:
            check_same_words(
                where, corpus.vocabulary, self.vocabulary, f"{self.name!r}, which the model was trained on"
            )

    def test_documents(self, corpus: Corpus) -> Unseen:
        """Documents of a corpus that the model has not been trained on.

        Of the training corpus, those that were kept out; of any other, all but those equal to a training document.

        Raises:
            CorpusError: other words, or no such document.
        """
        self.check_words(corpus)
        own = signatures(corpus)
        train, kept = self.split()
        if np.array_equal(own, self.signatures):
            if not len(kept):
                found = f"the {self.n_documents} documents that the model was trained on, and none kept out"
                cure = "train with --hold-out 0.1, or test on another corpus"
                raise CorpusError(message(f"corpus {corpus.name!r}", found, "documents new to the model", cure))
            words = f"the {len(kept)} of its {self.n_documents} documents that were kept out of training"
            return Unseen(kept, train, f"{words} (share {self.hold_out}, seed {self.seed})")
        new = np.flatnonzero(~np.isin(own, self.signatures[train]) | (np.diff(corpus.indptr) == 0))
        known = corpus.n_documents - len(new)
        if not len(new):
            found, cure = "no document that the model was not trained on", "test on other documents"
            raise CorpusError(message(f"corpus {corpus.name!r}", found, "documents new to the model", cure))
        without = f"; {known} equal to training documents are left out" if known else ""
        kind = f"{len(new)} documents, another corpus than {self.name!r} of the training" + without
        return Unseen(new, None, kind)

    def save(self, folder: str | Path) -> None:
        """Write two files to a folder, made if there is none."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / ARRAYS, signatures=self.signatures, totals=self.totals)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {n: v for n, v in fields.items() if not isinstance(v, np.ndarray)}
        (folder / META).write_text(json.dumps(plain), encoding="utf-8")

    @staticmethod
    def remove(folder: str | Path) -> None:
        """Remove what `save` wrote to a folder, if it did: of a model that is replaced."""
        for name in (META, ARRAYS):
            (Path(folder) / name).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | Path) -> Provenance:
        """Read what `save` wrote.

        Raises:
            LoadError: the folder has no such files, or broken ones.
        """
        folder = Path(folder)
        try:
            meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
            with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in ("signatures", "totals")}
            words = None if meta["vocabulary"] is None else tuple(map(str, meta["vocabulary"]))
            return cls(**{**meta, **found, "vocabulary": words})
        except (OSError, ValueError, KeyError, TypeError) as error:
            found_text = f"{type(error).__name__}: {error}"
            cure = "give the folder of a finished `hivi topics fit`"
            raise LoadError(message(str(folder), found_text, f"{META} and {ARRAYS} of a trained model", cure)) from None


def provenance(corpus: Corpus, hold_out: float, seed: int) -> Provenance:
    """Of a model that is trained on a corpus without the share `hold_out` of its documents.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.provenance import provenance
        >>> corpus = Corpus.from_matrix(np.diag(np.arange(1, 11)))
        >>> found = provenance(corpus, 0.2, seed=0)
        >>> found.test_documents(corpus).documents
        array([4, 6])
        >>> found.test_documents(corpus.subset([0, 4])).words
        "1 documents, another corpus than 'matrix' of the training; 1 equal to training documents are left out"
    """
    sizes = corpus.n_words, corpus.n_documents
    bare = Provenance(
        corpus.name, corpus.vocabulary, *sizes, hold_out, seed, signatures(corpus), np.zeros(sizes[0], np.int64)
    )
    totals = corpus.totals()
    if hold_out:
        _, kept = bare.split()
        rows = corpus.rows(kept)
        totals = totals - np.bincount(rows.indices, rows.data, corpus.n_words).astype(np.int64)
    return dataclasses.replace(bare, totals=totals)


def signatures(corpus: Corpus) -> UInt64[np.ndarray, " documents"]:
    """A number of 64 bits for each document, the same for the same counts; read in blocks."""
    found = [np.zeros(0, np.uint64)]
    for block in corpus.blocks():
        ends = corpus.indptr[block.start : block.stop + 1]
        s = slice(int(ends[0]), int(ends[-1]))
        pairs = (np.asarray(corpus.indices[s], np.uint64) << np.uint64(32)) | np.asarray(corpus.counts[s], np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_scatter(pairs), dtype=np.uint64)])
        found.append(np.diff(sums[ends - ends[0]]))
    return np.concatenate(found)


def _scatter(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's finaliser: near numbers to far ones."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)
