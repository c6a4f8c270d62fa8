"""Blocks of lines to (document, word, count): fast where all is well, line by line to say what is not."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from hivi._errors import CorpusError
from hivi.topics.base import MOST
from hivi.topics.scan import DIGITS, Block, shown, tokens, wrong


class Entries(NamedTuple):
    """Counts as they stand in a file: documents and words from 0."""

    documents: Int64[np.ndarray, " entries"]
    words: Int64[np.ndarray, " entries"]
    counts: Int64[np.ndarray, " entries"]


@dataclasses.dataclass(frozen=True)
class TripleFormat:
    """Lines of document, word, count, both numbered from 1: UCI bag of words and Matrix Market.

    Attributes:
        n_documents: largest document.
        n_words: largest word.
        fields: 3, or 2 where the count is left out and is 1.
        real: the counts may be written as 2.0 or 2e0, and zero.
    """

    n_documents: int
    n_words: int
    fields: int = 3
    real: bool = False

    def parse(self, block: Block) -> Entries:
        """Entries of a block.

        Raises:
            CorpusError: naming the first bad line.
        """
        table = self._real(block) if self.real else self._integers(block)
        if table is not None:
            documents, words = table[:, 0], table[:, 1]
            counts = table[:, 2] if self.fields == 3 else np.ones(len(table), np.int64)
            least = 0 if self.real else 1
            bounds = ((documents, 1, self.n_documents), (words, 1, self.n_words), (counts, least, MOST))
            if all(low <= column.min() and column.max() <= high for column, low, high in bounds):
                return Entries(documents - 1, words - 1, counts)
        return self._slowly(block)

    def _integers(self, block: Block) -> Int64[np.ndarray, "lines fields"] | None:
        found = tokens(block.text)
        if found is None or not np.all(np.diff(found.first) == self.fields):
            return None
        return found.values.reshape(-1, self.fields)

    def _real(self, block: Block) -> Int64[np.ndarray, "lines fields"] | None:
        rows = [line.split() for line in block.text.split(b"\n")[:-1]]
        if any(len(row) != self.fields for row in rows):
            return None
        try:
            table = np.array(rows).astype(np.float64)
        except ValueError:
            return None
        whole = np.all(np.abs(table) <= MOST) and np.array_equal(table, np.floor(table))
        return table.astype(np.int64) if whole else None

    def _slowly(self, block: Block) -> Entries:
        rows = []
        for at, line in enumerate(block.text.split(b"\n")[:-1], block.line):
            fields = line.split()
            if len(fields) != self.fields:
                found = f"{len(fields)} fields ({shown(line)})" if fields else "an empty line"
                names = ("document", "word", "count")[: self.fields]
                cure = "one count per line, the fields separated by blanks"
                raise wrong(block.path, at, found, f"{self.fields}: {', '.join(names)}", cure)
            document = integer(block, at, "document", fields[0], 1, self.n_documents)
            word = integer(block, at, "word", fields[1], 1, self.n_words)
            count = self._count(block, at, fields[2]) if self.fields == 3 else 1
            rows.append((document - 1, word - 1, count))
        table = np.array(rows, np.int64).reshape(-1, 3)
        return Entries(table[:, 0], table[:, 1], table[:, 2])

    def _count(self, block: Block, at: int, text: bytes) -> int:
        if not self.real:
            return integer(block, at, "count", text, 1, MOST)
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not (0 <= value <= MOST and value == int(value)):
            raise _bad(block, at, "count", text, 0, MOST)
        return int(value)


@dataclasses.dataclass(frozen=True)
class LdacFormat:
    """Lines of LDA-C: how many different words, then word:count for each, words numbered from 0; one line per document.

    Attributes:
        n_words: words are below it.
    """

    n_words: int

    def parse(self, block: Block) -> Entries:
        """Entries of a block; its first line is document 0.

        Raises:
            CorpusError: naming the first bad line.
        """
        found = tokens(block.text, colons=True)
        if found is not None and len(found.first) > 1:
            sizes = np.diff(found.first)
            heads = found.first[:-1]
            place = np.arange(len(found.values)) - np.repeat(heads, sizes)
            if np.all(sizes >= 1) and np.array_equal(found.colon, place % 2 == 1):
                pairs = np.delete(found.values, heads).reshape(-1, 2) if np.all(sizes % 2 == 1) else None
                if pairs is not None and np.array_equal(found.values[heads], sizes // 2) and self._inside(pairs):
                    documents = np.repeat(np.arange(len(sizes)), sizes // 2)
                    return Entries(documents, pairs[:, 0], pairs[:, 1])
        return self._slowly(block)

    def _inside(self, pairs: Int64[np.ndarray, "pairs two"]) -> bool:
        if not len(pairs):
            return True
        words, counts = pairs[:, 0], pairs[:, 1]
        return bool(words.max() < self.n_words and counts.min() >= 1 and counts.max() <= MOST)

    def _slowly(self, block: Block) -> Entries:
        rows = []
        for document, line in enumerate(block.text.split(b"\n")[:-1]):
            at, fields = block.line + document, line.split()
            if not fields:
                cure = "write a document without words as 0, or delete the line"
                raise wrong(block.path, at, "an empty line", "the number of different words, then word:count", cure)
            size = integer(block, at, "number of different words", fields[0], 0, MOST)
            if len(fields) - 1 != size:
                found, cure = f"{len(fields) - 1} pairs word:count", "complete the line, or correct its first number"
                raise wrong(block.path, at, found, f"{size}, as the line's first number says", cure)
            for field in fields[1:]:
                parts = field.split(b":")
                if len(parts) != 2:
                    cure = "separate word and count by one colon, without blanks"
                    raise wrong(block.path, at, shown(field), "word:count, such as 17:2", cure)
                word = integer(block, at, "word", parts[0], 0, self.n_words - 1)
                rows.append((document, word, integer(block, at, "count", parts[1], 1, MOST)))
        table = np.array(rows, np.int64).reshape(-1, 3)
        return Entries(table[:, 0], table[:, 1], table[:, 2])


def integer(block: Block, at: int, name: str, text: bytes, low: int, high: int) -> int:
    """One field.

    Raises:
        CorpusError: no whole number, or out of range.
    """
    digits = text[1:] if text[:1] in (b"+", b"-") else text
    if not digits.isdigit() or len(digits.lstrip(b"0")) > DIGITS or not low <= int(text) <= high:
        raise _bad(block, at, name, text, low, high)
    return int(text)


def _bad(block: Block, at: int, name: str, text: bytes, low: int, high: int) -> CorpusError:
    cures = {
        "document": "correct it, or the number of documents in the header",
        "count": "write whole counts, without zeros",
    }
    cure = cures.get(name, "correct it")
    if name == "word":
        cure = f"number the words from {low}, and check the size of the vocabulary"
    return wrong(block.path, at, f"{name} {shown(text)}", f"a whole number from {low} to {high}", cure)
