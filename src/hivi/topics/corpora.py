"""Readers of corpora: UCI bag of words, LDA-C, Matrix Market, folders of texts, and what `Corpus.save` wrote."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from hivi._errors import CorpusError, message
from hivi.topics.assemble import assemble
from hivi.topics.base import META, MOST, Corpus, check_vocabulary
from hivi.topics.formats import Entries, LdacFormat, TripleFormat, integer
from hivi.topics.scan import Block, blocks, header_lines, read_vocabulary, shown, wrong
from hivi.topics.text import read_text_folder

Vocabulary = str | Path | Sequence[str]
"""A file with one word per line, or the words."""
Format = Literal["uci", "ldac", "mtx", "text", "saved"]

REAL_BLOCK = 2**21
"""Bytes of a block of numbers with decimal points, which take more memory to parse."""
SHORTEST, PACKING = 5, 1040
"""Bytes of the shortest line but its end ("1 1 1"); most that gzip packs into one byte."""
SPARE, SPARSEST = 10**6, 1000
"""Documents (or words) that may be empty; and how many more for each count."""
COMMENTS = 10_000
"""Most lines of comments at the head of a Matrix Market file."""


def read_corpus(
    path: str | Path, vocab: Vocabulary | None = None, format: Format | None = None, folder: str | Path | None = None
) -> Corpus:
    r"""Read a corpus, whatever its format.

    Without `format` the name tells it: `docword*.txt`, `*.ldac`, `*.lda-c`, `*.dat`, `*.mtx` (each plain or .gz), a folder that
    `Corpus.save` wrote, one with a single `docword*.txt`, one of texts; or else the first lines do.

    Args:
        path: a file or folder.
        vocab: the words, or a file of them, one per line; not for texts, whose words are their own.
        format: "uci", "ldac", "mtx", "text" or "saved".
        folder: where to keep the counts on disk; see `read_uci`.

    Raises:
        CorpusError: no such format; or malformed, naming file, line, what was found and expected there.

    Example:
        >>> import pathlib, tempfile
        >>> from hivi.topics.corpora import read_corpus
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "two.ldac")
        ...     _ = file.write_text("2 0:1 4:2\n1 2:7\n")
        ...     read_corpus(file)
        Corpus('two': 2 documents, 5 words, 3 counts)
    """
    path = Path(path)
    format = _tell(path) if format is None else format
    if format == "uci":
        return read_uci(_docword(path), vocab, folder)
    if format == "ldac":
        return read_ldac(path, vocab, folder)
    if format == "mtx":
        return read_matrix_market(path, vocab, folder)
    if format == "text":
        if vocab is not None:
            cure = "leave the vocabulary out; it is found from the texts"
            raise CorpusError(message(str(path), "a vocabulary for texts", "texts alone", cure))
        corpus = read_text_folder(path)
    elif format == "saved":
        corpus, words = Corpus.open(path), _words(vocab, None)
        corpus = corpus if words is None else dataclasses.replace(corpus, vocabulary=words)
    else:
        raise CorpusError(message(str(path), f"format {format!r}", f"one of {get_args(Format)}", "choose one of them"))
    if folder is None:
        return corpus
    corpus.save(folder)
    return Corpus.open(folder)


def read_uci(docword: str | Path, vocab: Vocabulary | None = None, folder: str | Path | None = None) -> Corpus:
    r"""Read a UCI bag of words: three lines D, V, NNZ, then NNZ lines of document, word, count, numbered from 1.

    Args:
        docword: the file, plain or .gz.
        vocab: the words, or a file of them, one per line; without it, `vocab.NAME.txt` beside `docword.NAME.txt`, if there.
        folder: where to keep the counts on disk, as `Corpus.save` does. Without it they are kept in memory, or, if there are
            more than 20 million, in a temporary folder that goes when the corpus does.

    Raises:
        CorpusError: malformed, naming the line.

    Example:
        >>> import pathlib, tempfile
        >>> from hivi.topics.corpora import read_uci
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "docword.two.txt")
        ...     _ = file.write_text("2\n3\n2\n1 3 5\n2 1 1\n")
        ...     read_uci(file, vocab=["cat", "dog", "eel"])
        Corpus('two': 2 documents, 3 words, 2 counts)

    Source: Newman (2008), Bag of Words, UCI Machine Learning Repository.
    """
    path = Path(docword)
    head, sizes = Block(path, 1, b""), []
    names = ("number of documents", "size of the vocabulary", "number of lines after the header")
    lines = header_lines(path, 3)
    for at, name in enumerate(names):
        cure = "start the file with three lines: documents, words, and lines of counts"
        if at >= len(lines) or len(lines[at].split()) != 1:
            found = shown(lines[at]) if at < len(lines) else "the end of the file" if lines else "an empty file"
            raise wrong(path, at + 1, found, f"the {name} alone", cure)
        low, high = ((1, MOST), (1, MOST), (0, 10**15))[at]
        sizes.append(integer(head, at + 1, name, lines[at].strip(), low, high))
    n_documents, n_words, nonzeros = sizes
    return _triples(path, 3, TripleFormat(n_documents, n_words), nonzeros, _words(vocab, path), folder)


def read_matrix_market(path: str | Path, vocab: Vocabulary | None = None, folder: str | Path | None = None) -> Corpus:
    r"""Read a Matrix Market file of counts in coordinates: documents in rows, words in columns.

    Args:
        path: the file, plain or .gz: "coordinate", "general", of integers, of reals that are whole, or a pattern (all counts 1).
        vocab: the words, or a file of them, one per line.
        folder: where to keep the counts on disk; see `read_uci`.

    Raises:
        CorpusError: malformed, or of another kind, naming the line.

    Example:
        >>> import pathlib, tempfile
        >>> from hivi.topics.corpora import read_matrix_market
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "two.mtx")
        ...     _ = file.write_text("%%MatrixMarket matrix coordinate integer general\n2 3 1\n1 3 5\n")
        ...     read_matrix_market(file)
        Corpus('two': 2 documents, 3 words, 1 counts)

    Source: Boisvert, Pozo and Remington (1996), The Matrix Market Exchange Formats, NISTIR 5935.
    """
    path = Path(path)
    lines = header_lines(path, COMMENTS)
    banner = lines[0].lower().split() if lines else []
    kinds = {b"integer": (3, False), b"unsigned-integer": (3, False), b"real": (3, True), b"pattern": (2, False)}
    known = len(banner) == 5 and banner[3] in kinds
    if not known or [*banner[:3], banner[4]] != [b"%%matrixmarket", b"matrix", b"coordinate", b"general"]:
        cure = "write it by scipy.io.mmwrite(file, scipy.sparse.coo_array(counts), symmetry='general')"
        found = shown(lines[0]) if lines else "an empty file"
        raise wrong(path, 1, found, "%%MatrixMarket matrix coordinate integer general", cure)
    skip = next((i for i, line in enumerate(lines) if i and line.strip() and not line.startswith(b"%")), len(lines))
    fields = lines[skip].split() if skip < len(lines) else []
    if len(fields) != 3:
        found = shown(lines[skip]) if skip < len(lines) else "the end of the file, or too many comments"
        raise wrong(
            path, skip + 1, found, "three sizes: documents, words, counts", "write the sizes after the comments"
        )
    names, head = ("number of documents", "size of the vocabulary", "number of counts"), Block(path, 1, b"")
    ranges = ((1, MOST), (1, MOST), (0, 10**15))
    parts = zip(names, fields, ranges, strict=True)
    n_documents, n_words, nonzeros = (integer(head, skip + 1, name, text, *span) for name, text, span in parts)
    count, real = kinds[banner[3]]
    return _triples(
        path, skip + 1, TripleFormat(n_documents, n_words, count, real), nonzeros, _words(vocab, None), folder
    )


def read_ldac(path: str | Path, vocab: Vocabulary | None = None, folder: str | Path | None = None) -> Corpus:
    r"""Read LDA-C: a line per document, the number of its different words, then word:count for each, words numbered from 0.

    Args:
        path: the file, plain or .gz.
        vocab: the words, or a file of them, one per line; without it there are as many words as the largest number says.
        folder: where to keep the counts on disk; see `read_uci`.

    Raises:
        CorpusError: malformed, naming the line.

    Example:
        >>> import pathlib, tempfile
        >>> from hivi.topics.corpora import read_ldac
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "two.ldac")
        ...     _ = file.write_text("2 0:1 4:2\n1 2:7\n")
        ...     read_ldac(file).to_csr().toarray()
        array([[1, 0, 0, 0, 2],
               [0, 0, 7, 0, 0]], dtype=int32)

    Source: Blei, lda-c (2004).
    """
    path, words = Path(path), _words(vocab, None)
    documents = nonzeros = 0
    for block in blocks(path):
        documents += block.text.count(b"\n")
        nonzeros += block.text.count(b":")
    if not documents:
        raise wrong(path, 1, "an empty file", "a line per document", "check that it was written")
    reader = LdacFormat(MOST if words is None else len(words))

    def stream() -> Iterator[Entries]:
        for block in blocks(path):
            entries = reader.parse(block)
            yield entries._replace(documents=entries.documents + (block.line - 1))

    return assemble(stream, documents, None if words is None else len(words), nonzeros, words, _name(path), folder)


def _triples(
    path: Path,
    skip: int,
    reader: TripleFormat,
    nonzeros: int,
    words: tuple[str, ...] | None,
    folder: str | Path | None,
) -> Corpus:
    """The corpus of a file of `nonzeros` triples, one per line, after `skip` lines."""
    check_vocabulary(str(path), words, reader.n_words)
    room = path.stat().st_size * PACKING // SHORTEST  # before memory is taken for a header that is wrong
    if nonzeros > room:
        found, expected = f"{nonzeros} counts in the header", f"at most {room}, by the size of the file"
        raise wrong(path, skip, found, expected, "correct the header, or fetch the file again")
    for what, size in (("documents", reader.n_documents), ("words", reader.n_words)):
        if size > SPARE + SPARSEST * nonzeros:
            found, cure = f"{size} {what} in the header, and {nonzeros} counts", "correct the header"
            raise wrong(path, skip, found, f"fewer than {SPARSEST} {what} per count", cure)

    def stream() -> Iterator[Entries]:
        seen = 0
        for block in blocks(path, skip, REAL_BLOCK if reader.real else None):
            entries = reader.parse(block)
            if seen + len(entries.counts) > nonzeros:
                found, cure = "another line", "correct the header, or cut off what follows"
                raise wrong(
                    path, skip + 1 + nonzeros, found, f"the end after {nonzeros} counts, as the header says", cure
                )
            seen += len(entries.counts)
            yield entries
        if seen < nonzeros:
            found, cure = f"the end of the file after {seen} counts", "fetch the file again, or correct the header"
            raise wrong(path, skip + 1 + seen, found, f"{nonzeros} counts, as the header says", cure)

    return assemble(stream, reader.n_documents, reader.n_words, nonzeros, words, _name(path), folder)


def _words(vocab: Vocabulary | None, docword: Path | None) -> tuple[str, ...] | None:
    if vocab is None and docword is not None:
        sibling = docword.with_name(f"vocab.{_name(docword)}.txt")
        vocab = next((p for p in (sibling, sibling.with_name(f"{sibling.name}.gz")) if p.is_file()), None)
    return read_vocabulary(vocab)


def _name(path: Path) -> str:
    """`docword.NAME.txt.gz` -> NAME."""
    return re.sub(r"\.(txt|ldac|lda-c|dat|mtx)$", "", path.name.removesuffix(".gz")).removeprefix("docword.")


def _docword(path: Path) -> Path:
    return _docwords(path)[0] if path.is_dir() else path


def _docwords(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("docword*") if p.name.endswith((".txt", ".txt.gz")))


def _tell(path: Path) -> Format:
    """The format, from the name or else the first lines."""
    if path.is_dir():
        if (path / META).is_file():
            return "saved"
        if len(found := _docwords(path)) > 1:
            names = ", ".join(p.name for p in found)
            raise CorpusError(message(str(path), f"several corpora ({names})", "one", "give the path of one file"))
        return "uci" if found else "text"
    name = path.name.removesuffix(".gz")
    endings: dict[str, Format] = {".mtx": "mtx", ".ldac": "ldac", ".lda-c": "ldac", ".dat": "ldac"}
    if name.startswith("docword") and name.endswith(".txt"):
        return "uci"
    if Path(name).suffix in endings:
        return endings[Path(name).suffix]
    lines = header_lines(path, 2)
    if lines and lines[0].startswith(b"%%MatrixMarket"):
        return "mtx"
    if lines and re.fullmatch(rb"\d+(\s+\d+:\d+)*\s*", lines[0]) and b":" in b"".join(lines):
        return "ldac"
    if lines and all(re.fullmatch(rb"\s*\d+\s*", line) for line in lines):
        return "uci"
    found_line = shown(lines[0]) if lines else "an empty file"
    if lines and lines[0].startswith(b"PK\x03\x04"):  # a zip archive, such as scipy.sparse.save_npz makes
        cure = "write the matrix as text: scipy.io.mmwrite('NAME.mtx', scipy.sparse.load_npz(...))"
        raise wrong(path, 1, "an archive (.npz or .zip)", "a UCI bag of words, LDA-C, or Matrix Market file", cure)
    cure = "say which by format=, or rename the file: docword.NAME.txt, NAME.ldac, NAME.mtx"
    raise wrong(path, 1, found_line, "a UCI bag of words, LDA-C, or Matrix Market file", cure)
