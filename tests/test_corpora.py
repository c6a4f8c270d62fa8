"""Corpora: every format read, every malformed line named, memory bounded, and back from disk."""

from __future__ import annotations

import gc
import gzip
import io
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from hivi._errors import CorpusError
from hivi.topics import assemble, formats, scan
from hivi.topics.base import Corpus
from hivi.topics.corpora import read_corpus, read_ldac, read_matrix_market, read_uci
from hivi.topics.embedded import python_docstrings
from hivi.topics.text import count_words, read_text_folder

BANNER = "%%MatrixMarket matrix coordinate integer general\n"


def counts(documents: int = 40, words: int = 23, seed: int = 0) -> np.ndarray:
    """Counts with an empty document and an unused word."""
    rng = np.random.default_rng(seed)
    table = rng.poisson(0.4, (documents, words)) * rng.integers(1, 2000, (documents, words))
    table[3], table[:, 5] = 0, 0
    return table


def uci(table: np.ndarray, order: np.ndarray | None = None) -> str:
    d, w = np.nonzero(table)
    order = np.arange(len(d)) if order is None else order
    lines = [f"{d[i] + 1} {w[i] + 1} {table[d[i], w[i]]}" for i in order]
    return "\n".join([str(table.shape[0]), str(table.shape[1]), str(len(d)), *lines]) + "\n"


def ldac(table: np.ndarray) -> str:
    rows = [[f"{w}:{row[w]}" for w in np.flatnonzero(row)] for row in table]
    return "".join(" ".join([str(len(row)), *row]) + "\n" for row in rows)


def market(table: np.ndarray) -> str:
    stream = io.BytesIO()
    scipy.io.mmwrite(stream, sp.coo_array(table), comment="counts", symmetry="general")
    return stream.getvalue().decode()


def write(path: Path, text: str | bytes, packed: bool = False) -> Path:
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in a small file."""
    monkeypatch.setattr(scan, "BLOCK_BYTES", 70)


# Reading


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("name", "text"), [("docword.x.txt", uci), ("x.ldac", ldac), ("x.mtx", market)], ids=["uci", "ldac", "mtx"]
)
def test_formats_agree(
    tmp_path: Path,
    name: str,
    text: Callable[[np.ndarray], str],
    packed: bool,
    on_disk: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scan, "BLOCK_BYTES", 700 if name == "x.ldac" else 70)
    table = counts()
    path = write(tmp_path / (f"{name}.gz" if packed else name), text(table), packed)
    words = [f"w{i}" for i in range(23)]
    corpus = read_corpus(path, vocab=words, folder=tmp_path / "disk" if on_disk else None)
    assert corpus.name == "x"
    assert corpus.vocabulary == tuple(words)
    np.testing.assert_array_equal(corpus.to_csr().toarray(), table)
    np.testing.assert_array_equal(corpus.lengths(), table.sum(1))
    np.testing.assert_array_equal(corpus.totals(), table.sum(0))
    assert corpus.n_tokens == table.sum()
    assert isinstance(corpus.counts, np.memmap) is on_disk
    if on_disk:
        np.testing.assert_array_equal(read_corpus(tmp_path / "disk").to_csr().toarray(), table)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("on_disk", [False, True])
def test_any_order_of_lines_gives_the_same(tmp_path: Path, on_disk: bool) -> None:
    table = counts()
    shuffled = np.random.default_rng(1).permutation(np.count_nonzero(table))
    path = write(tmp_path / "docword.x.txt", uci(table, shuffled))
    corpus = read_uci(path, folder=tmp_path / "disk" if on_disk else None)
    np.testing.assert_array_equal(corpus.to_csr().toarray(), table)
    assert np.all(np.diff(corpus.indices)[np.setdiff1d(np.arange(corpus.n_nonzeros - 1), corpus.indptr - 1)] > 0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_entries_given_twice_are_added_up(tmp_path: Path, on_disk: bool) -> None:
    folder = tmp_path / "disk" if on_disk else None
    text = "3\n4\n6\n1 2 5\n1 4 1\n1 2 2\n3 1 1\n3 1 1\n3 3 1\n"
    expected = [[0, 7, 0, 1], [0, 0, 0, 0], [2, 0, 1, 0]]
    corpus = read_uci(write(tmp_path / "docword.x.txt", text), folder=folder)
    assert corpus.to_csr().toarray().tolist() == expected
    assert (corpus.n_nonzeros, len(corpus.counts)) == (4, 4)
    if on_disk:
        assert Corpus.open(tmp_path / "disk").to_csr().toarray().tolist() == expected
        with pytest.raises(CorpusError):
            read_uci(write(tmp_path / "docword.broken.txt", "3\n4\n6\n1 2 5\n"), folder=folder)
        assert Corpus.open(tmp_path / "disk").to_csr().toarray().tolist() == expected, "what was there is lost"
        assert sorted(f.name for f in folder.iterdir()) == ["corpus.json", "counts.npy", "indices.npy", "indptr.npy"]
    assert read_ldac(write(tmp_path / "x.dat", "3 1:5 1:2 0:1\n0\n"), folder=folder).to_csr().toarray().tolist() == [
        [1, 7],
        [0, 0],
    ]


def test_matrix_market_of_reals_and_patterns(tmp_path: Path) -> None:
    real = "%%MatrixMarket matrix coordinate real general\n% a\n%\n2 3 3\n1 1 2.0\n2 3 1e1\n2 1 0.0\n"
    corpus = read_matrix_market(write(tmp_path / "a.mtx", real))
    assert corpus.to_csr().toarray().tolist() == [[2, 0, 0], [0, 0, 10]]
    assert corpus.n_nonzeros == 2
    pattern = "%%MatrixMarket matrix coordinate pattern general\n2 3 2\n1 1\n2 3\n"
    assert read_matrix_market(write(tmp_path / "b.mtx", pattern)).to_csr().toarray().tolist() == [[1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("text", ["2\r\n3\r\n1\r\n2 3 4\r\n", "\ufeff2\n3\n1\n2\t3  4 ", "2\n3\n1\n+2 03 4\n\n \n"])
def test_line_ends_blanks_and_marks(tmp_path: Path, text: str) -> None:
    assert read_uci(write(tmp_path / "docword.x.txt", text)).to_csr().toarray().tolist() == [[0, 0, 0], [0, 0, 4]]


def test_the_vocabulary_beside_a_file_is_used(tmp_path: Path) -> None:
    path = write(tmp_path / "docword.a.b.txt.gz", "1\n2\n1\n1 2 1\n", packed=True)
    assert read_uci(path).vocabulary is None
    assert read_uci(path).word(1) == "word 1"
    write(tmp_path / "vocab.a.b.txt", "Öl\nnaïve\n")
    assert read_corpus(tmp_path).vocabulary == ("Öl", "naïve")
    assert read_uci(path, vocab=["x", "y"]).word(1) == "y"
    assert read_uci(path).name == "a.b"


@pytest.mark.parametrize(
    ("text", "documents"), [("2\n3\n1\n2 3 4\n", 2), ("2 0:1 2:4\n", 1), ("0\n1 2:1\n", 2), (BANNER + "2 3 0\n", 2)]
)
def test_the_first_lines_tell_the_format(tmp_path: Path, text: str, documents: int) -> None:
    corpus = read_corpus(write(tmp_path / "counts", text))
    assert (corpus.n_documents, corpus.n_words) == (documents, 3)


# Malformed files: the line, and what is wrong

UCI_ERRORS = [
    ("", 1, "an empty file"),
    ("a\n3\n1\n1 1 1\n", 1, "number of documents 'a'"),
    ("2\n0\n1\n1 1 1\n", 2, "size of the vocabulary '0'"),
    ("2\n3\n", 3, "the end of the file"),
    ("1 1 1\n1 2 1\n", 1, "'1 1 1'"),
    ("2\n3\n1e3\n", 3, "'1e3'"),
    ("2\n3\n2\n1 1 1\n1 2\n", 5, "2 fields ('1 2')"),
    ("2\n3\n2\n1 1 1 1\n1 2\n", 4, "4 fields"),  # as many numbers as expected
    ("2\n3\n2\n1 1 1\n1 x 1\n", 5, "word 'x'"),
    ("2\n3\n2\n1 1 1\n1 1.5 1\n", 5, "word '1.5'"),
    ("2\n3\n2\n1 1 1\n1 2 1.0\n", 5, "count '1.0'"),
    ("2\n3\n2\n1 1 1\n0 2 1\n", 5, "document '0'"),
    ("2\n3\n2\n1 1 1\n3 2 1\n", 5, "document '3'"),
    ("2\n3\n2\n1 0 1\n2 2 1\n", 4, "word '0'; expected a whole number from 1 to 3"),
    ("2\n3\n2\n1 4 1\n2 2 1\n", 4, "word '4'"),
    ("2\n3\n2\n1 1 0\n2 2 1\n", 4, "count '0'"),
    ("2\n3\n2\n1 1 -2\n2 2 1\n", 4, "count '-2'"),
    ("2\n3\n1\n1 1 99999999999999999999999\n", 4, "count '9999"),
    ("2\n3\n1\n1 1 2147483648\n", 4, "count '2147483648'"),
    ("2\n3\n3\n1 1 1\n\n2 2 1\n2 3 1\n", 5, "an empty line"),
    ("2\n3\n3\n1 1 1\n2 2 1\n", 6, "the end of the file after 2 counts; expected 3"),
    ("2\n3\n1\n1 1 1\n2 2 1\n", 5, "another line; expected the end after 1 counts"),
    ("2\n3\n99999999999\n1 1 1\n2 2 1\n", 3, "99999999999 counts in the header"),
    ("2000000000\n3\n1\n1 1 1\n", 3, "2000000000 documents in the header"),
    ("2\n2000000000\n1\n1 1 1\n", 3, "2000000000 words in the header"),
    (b"2\n3\n2\n1 1 1\n2 \xff 1\n", 5, r"'\\xff'"),
    (b"2\n3\n2\n1 1 1\n2 2\x00 1\n", 5, r"word"),
]


@pytest.mark.parametrize("block", [8, 2**24])
@pytest.mark.parametrize(("text", "line", "found"), UCI_ERRORS)
def test_malformed_uci(
    tmp_path: Path, text: str | bytes, line: int, found: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scan,
        "BLOCK_BYTES",
        max(block, 32) if b"9999" in (text if isinstance(text, bytes) else text.encode()) else block,
    )
    path = write(tmp_path / "docword.x.txt", text)
    with pytest.raises(CorpusError) as caught:
        read_uci(path)
    assert str(caught.value).startswith(f"{path}, line {line}: found ")
    assert found in str(caught.value)
    assert re.search(r"; expected .+\. Cure: .+", str(caught.value))


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", 1, "an empty file"),
        ("1 0:1\n2 0:1\n", 2, "1 pairs word:count; expected 2"),
        ("1 0:1\n1 0:1 2:1\n", 2, "2 pairs"),
        ("1 0:1\n1 0 1\n", 2, "2 pairs"),
        ("1 0:1\n1 01\n", 2, "'01'; expected word:count"),
        ("1 0:1\n1:0 1\n", 2, "number of different words '1:0'"),
        ("1 0:1\n1 0:1:1\n", 2, "'0:1:1'"),
        ("1 0:1\n1 0:\n", 2, "count ''"),
        ("2 0: 1\n", 1, "count ''"),
        ("1 0:1\n1 -1:1\n", 2, "word '-1'"),
        ("1 0:1\n1 3:1\n", 2, "word '3'; expected a whole number from 0 to 2"),
        ("1 0:1\n1 2:0\n", 2, "count '0'"),
        ("1 0:1\n1 2:x\n", 2, "count 'x'"),
        ("1 0:1\n\n1 2:1\n", 2, "an empty line"),
        ("1 0:1\nx\n", 2, "number of different words 'x'"),
    ],
)
def test_malformed_ldac(tmp_path: Path, text: str, line: int, found: str) -> None:
    path = write(tmp_path / "x.ldac", text)
    with pytest.raises(CorpusError, match=re.escape(f"{path}, line {line}: found ")) as caught:
        read_ldac(path, vocab=["a", "b", "c"])
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("", 1, "an empty file"),
        ("2 3 1\n1 1 1\n", 1, "'2 3 1'"),
        ("%%MatrixMarket matrix array integer general\n1 1\n1\n", 1, "array"),
        ("%%MatrixMarket matrix coordinate integer symmetric\n1 1 1\n1 1 1\n", 1, "symmetric"),
        (BANNER + "% only this\n", 3, "the end of the file"),
        (BANNER + "2 3\n1 1 1\n", 2, "'2 3'"),
        (BANNER + "2 x 1\n1 1 1\n", 2, "size of the vocabulary 'x'"),
        (BANNER + "%\n2 3 2\n1 1 1\n3 1 1\n", 5, "document '3'"),
        (BANNER + "2 3 2\n1 1 1\n", 4, "the end of the file after 1 counts"),
        (BANNER.replace("integer", "real") + "2 3 2\n1 1 1\n1 2 1.5\n", 4, "count '1.5'"),
        (BANNER.replace("integer", "real") + "2 3 2\n1 1 1\n1 2 -1.0\n", 4, "count '-1.0'"),
        (BANNER.replace("integer", "real") + "2 3 2\n1 1 1\n1 2 nan\n", 4, "count 'nan'"),
        (BANNER.replace("integer", "real") + "2 3 2\n1 1 x\n1 2 1\n", 3, "count 'x'"),
        (BANNER.replace("integer", "real") + "2 3 2\n1 1\n1 2 1 1\n", 3, "2 fields"),
        (BANNER.replace("integer", "pattern") + "2 3 2\n1 1\n1 2 1\n", 4, "3 fields"),
    ],
)
def test_malformed_matrix_market(tmp_path: Path, text: str, line: int, found: str) -> None:
    path = write(tmp_path / "x.mtx", text)
    with pytest.raises(CorpusError, match=re.escape(f"{path}, line {line}: found ")) as caught:
        read_matrix_market(path)
    assert found in str(caught.value)


@pytest.mark.parametrize(("name", "text"), [("docword.x.txt", uci), ("x.ldac", ldac), ("x.mtx", market)])
def test_fast_and_slow_parsing_agree(
    tmp_path: Path, name: str, text: Callable[[np.ndarray], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files with a few bytes changed: the same counts, or the same message, whether or not the fast way is open."""
    rng, whole = np.random.default_rng(0), text(counts(4, 6)).encode()
    alphabet, refused = np.frombuffer(b"0123456789 \n\t\r:.-+x\x00\xff", np.uint8), 0
    for _ in range(300):
        raw = np.frombuffer(whole, np.uint8)
        for _ in range(rng.integers(1, 3)):
            at = rng.integers(40 if name == "x.mtx" else 6, len(raw))
            new = rng.choice(alphabet, rng.integers(0, 3))
            raw = np.concatenate([raw[:at], new, raw[at + rng.integers(0, 2) :]])
        path, outcomes = write(tmp_path / name, raw.tobytes()), []
        for fast in (True, False):
            with monkeypatch.context() as patch:
                if not fast:
                    patch.setattr(formats, "tokens", lambda text, colons=False: None)
                try:
                    outcomes.append(read_corpus(path).to_csr().toarray().tolist())
                except CorpusError as error:
                    outcomes.append(str(error))
        assert outcomes[0] == outcomes[1], raw.tobytes()
        refused += isinstance(outcomes[0], str)
    assert 30 < refused < 300


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(uci(counts()).encode())
    path = write(tmp_path / "docword.x.txt.gz", whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"line \d+: found a broken file"):
        read_uci(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    with pytest.raises(CorpusError, match=r"x.txt.gz, line \d+: found "):
        read_uci(write(path, bytes(flipped)))
    with pytest.raises(CorpusError, match="line 1: found a broken file"):
        read_uci(write(path, b"\x1f\x8b no gzip"))


def test_a_file_without_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "BLOCK_BYTES", 100)
    with pytest.raises(CorpusError, match="line 4: found a line of more than 1600 bytes"):
        read_uci(write(tmp_path / "docword.x.txt", "1\n1\n1\n" + "1 " * 1000))


def test_vocabularies_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "docword.x.txt", "1\n2\n1\n1 2 1\n")
    with pytest.raises(CorpusError, match=r"docword.x.txt: found a vocabulary of 3 words; expected 2"):
        read_uci(path, vocab=["a", "b", "c"])
    for text, line, found in [
        ("a\n\nb\n", 2, "an empty line"),
        (b"a\nb\xe9\n", 2, r"b\\xe9"),
        ("", 1, "an empty file"),
    ]:
        vocab = write(tmp_path / "words.txt", text)
        with pytest.raises(CorpusError, match=re.escape(f"{vocab}, line {line}: found ")) as caught:
            read_uci(path, vocab=vocab)
        assert found in str(caught.value)
    with pytest.raises(CorpusError, match="word '1'"):
        read_ldac(write(tmp_path / "x.ldac", "1 1:1\n"), vocab=["a"])


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nothing: found FileNotFoundError"):
        read_corpus(tmp_path / "nothing")
    with pytest.raises(CorpusError, match=r"line 1: found 'hello'; expected a UCI"):
        read_corpus(write(tmp_path / "hello", "hello\n"))
    sp.save_npz(tmp_path / "counts.npz", sp.eye_array(3, format="csr"))
    with pytest.raises(CorpusError, match=r"found an archive .*mmwrite"):
        read_corpus(tmp_path / "counts.npz")
    with pytest.raises(CorpusError, match=r"no \.txt file"):
        read_corpus(tmp_path)
    for name in ("a", "b"):
        write(tmp_path / f"docword.{name}.txt", "1\n1\n0\n")
    with pytest.raises(CorpusError, match="several corpora"):
        read_corpus(tmp_path)


# Corpus


def test_rows_and_subsets() -> None:
    table = counts()
    corpus = Corpus.from_matrix(table)
    for ids in ([], [5], [4, 5, 6], [39, 0, 0, 3], np.array([7, 2])):
        rows = corpus.rows(ids)
        assert rows.dtype == np.int32
        np.testing.assert_array_equal(rows.toarray(), table[np.asarray(ids, int)])
        np.testing.assert_array_equal(corpus.subset(ids).to_csr().toarray(), table[np.asarray(ids, int)])
    np.testing.assert_array_equal(corpus.rows(slice(3, 30, 2)).toarray(), table[3:30:2])
    with pytest.raises(CorpusError, match=r"40 to 40; expected numbers from 0 to 39"):
        corpus.rows([40])
    with pytest.raises(CorpusError, match=r"-1 to -1"):
        corpus.rows([-1])
    with pytest.raises(CorpusError, match="expected 0 to 22"):
        corpus.word(23)


def test_rows_are_copies() -> None:
    corpus = Corpus.from_matrix(counts())
    corpus.rows([0, 1]).data[:] = -1
    assert corpus.counts.min() > 0


@pytest.mark.parametrize("nonzeros", [1, 20, 10**6])
def test_blocks_cover_all_documents(nonzeros: int) -> None:
    corpus = Corpus.from_matrix(counts())
    blocks = list(corpus.blocks(nonzeros))
    assert [d for b in blocks for d in range(b.start, b.stop)] == list(range(40))
    for b in blocks:
        assert corpus.indptr[b.stop] - corpus.indptr[b.start] <= nonzeros or b.stop == b.start + 1


@pytest.mark.parametrize(
    "make", [np.asarray, sp.csr_array, sp.coo_array, sp.csc_matrix, lambda x: x.astype(float), lambda x: x.tolist()]
)
def test_from_matrix(make: Callable) -> None:
    table = counts()
    np.testing.assert_array_equal(Corpus.from_matrix(make(table)).to_csr().toarray(), table)


def test_from_matrix_adds_up_and_leaves_its_argument() -> None:
    matrix = sp.coo_array((np.array([1, 2, 0]), (np.array([0, 0, 1]), np.array([1, 1, 0]))), shape=(2, 2))
    assert Corpus.from_matrix(matrix).to_csr().toarray().tolist() == [[0, 3], [0, 0]]
    assert matrix.nnz == 3
    assert Corpus.from_matrix(matrix).n_nonzeros == 1


@pytest.mark.parametrize(
    ("matrix", "found"),
    [
        (np.array([[1.0, 0.5]]), "document 0, word 1: found 0.5"),
        (np.array([[1, 0], [0, -1]]), "document 1, word 1: found -1"),
        (np.array([[np.nan]]), "found nan"),
        (np.array([[2**31]]), "found 2147483648"),
        (np.array([1, 2]), "1 axes"),
        (np.array([["a"]]), "of <U1"),
        (np.zeros((2, 0)), "0 words"),
    ],
)
def test_from_matrix_refuses(matrix: np.ndarray, found: str) -> None:
    with pytest.raises(CorpusError, match=re.escape(found)):
        Corpus.from_matrix(matrix)


def test_arrays_must_belong_together() -> None:
    good = Corpus.from_matrix(counts())
    with pytest.raises(CorpusError, match="offsets"):
        Corpus(good.indptr, good.indices[1:], good.counts[1:], 23)
    with pytest.raises((CorpusError, TypeError), match="indptr"):  # or the run-time checks of types are first
        Corpus(good.indptr.astype(np.int32), good.indices, good.counts, 23)
    with pytest.raises(CorpusError, match="a vocabulary of 1 words; expected 23"):
        Corpus(good.indptr, good.indices, good.counts, 23, ("a",))


def test_saved_and_opened(tmp_path: Path) -> None:
    table = counts()
    corpus = Corpus.from_matrix(table, [f"ü{i}" for i in range(23)], name="näme")
    corpus.save(tmp_path / "a")
    back = read_corpus(tmp_path / "a")
    assert (back.name, back.vocabulary, back.n_words) == ("näme", corpus.vocabulary, 23)
    assert isinstance(back.indices, np.memmap)
    assert not back.counts.flags.writeable
    np.testing.assert_array_equal(back.to_csr().toarray(), table)
    back.save(tmp_path / "a")  # onto the files it is mapped from
    np.testing.assert_array_equal(Corpus.open(tmp_path / "a").to_csr().toarray(), table)
    part = back.subset([9, 1], tmp_path / "b")
    assert isinstance(part.counts, np.memmap)
    np.testing.assert_array_equal(part.to_csr().toarray(), table[[9, 1]])
    Corpus.from_matrix(np.zeros((2, 3), int)).save(tmp_path / "c")
    assert Corpus.open(tmp_path / "c").lengths().tolist() == [0, 0]


def test_a_broken_folder(tmp_path: Path) -> None:
    for break_it in (
        lambda f: (f / "corpus.json").unlink(),
        lambda f: (f / "corpus.json").write_text("{}"),
        lambda f: (f / "corpus.json").write_text("[]"),
        lambda f: (f / "counts.npy").unlink(),
        lambda f: (f / "counts.npy").write_bytes((f / "counts.npy").read_bytes()[:-4]),
        lambda f: np.save(f / "indices.npy", np.zeros(3, np.int32)),
        lambda f: np.save(f / "indptr.npy", np.zeros(3, np.int64)),
    ):
        Corpus.from_matrix(counts()).save(tmp_path)
        break_it(tmp_path)
        with pytest.raises(CorpusError, match=re.escape(str(tmp_path)) + "|offsets"):
            Corpus.open(tmp_path)
    corpus = Corpus.from_matrix(counts())
    corpus.save(tmp_path)
    np.save(tmp_path / "indices.npy", np.full(corpus.n_nonzeros, 99, np.int32))
    with pytest.raises(CorpusError, match="words 99 to 99; expected 0 to 22"):
        Corpus.open(tmp_path).rows([0])


def test_a_large_corpus_goes_to_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "IN_MEMORY", 10)
    monkeypatch.setattr(assemble.tempfile, "tempdir", str(tmp_path))
    path = write(tmp_path / "docword.x.txt", uci(counts()))
    corpus = read_uci(path)
    folders = list(tmp_path.glob("hivi-corpus-*"))
    assert isinstance(corpus.counts, np.memmap)
    assert len(folders) == 1
    np.testing.assert_array_equal(corpus.to_csr().toarray(), counts())
    del corpus
    gc.collect()
    assert not folders[0].exists()
    with pytest.raises(CorpusError):
        read_uci(write(path, uci(counts()) + "x\n"))
    assert not list(tmp_path.glob("hivi-corpus-*"))


# Texts


def test_texts(tmp_path: Path) -> None:
    texts = ["The Cat, the cat's DOG!", "A dog and a cat: 12 dogs.", "Émile's dog_house"]
    for i, text in enumerate(texts):
        write(tmp_path / (f"{i}.txt.gz" if i == 1 else f"{i}.txt"), text, packed=i == 1)
    corpus = read_text_folder(tmp_path, min_documents=1, max_share=1.0)
    assert corpus.vocabulary == ("cat", "dog", "dogs", "house", "émile")
    assert corpus.to_csr().toarray().tolist() == [[2, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]
    assert read_text_folder(tmp_path, min_documents=2, max_share=0.7).vocabulary == ("cat",)
    assert read_text_folder(tmp_path, 1, 1.0, stop_words=["dog"]).vocabulary == (
        "and",
        "cat",
        "dogs",
        "house",
        "the",
        "émile",
    )
    with pytest.raises(CorpusError, match="Cure: lower min_documents"):
        read_corpus(tmp_path)
    with pytest.raises(CorpusError, match="a vocabulary for texts"):
        read_corpus(tmp_path, vocab=["a"])
    write(tmp_path / "3.txt", b"fine\nnot \xff fine\n")
    with pytest.raises(CorpusError, match=r"3.txt, line 2: found bytes that are not UTF-8"):
        read_text_folder(tmp_path, 1, 1.0)


def test_count_words_keeps_documents_without_words() -> None:
    assert count_words(["the", "cat"], "x", 1, 1.0).lengths().tolist() == [0, 1]


def test_the_embedded_corpus() -> None:
    corpus = python_docstrings()
    lengths = corpus.lengths()
    assert corpus.n_documents >= 1000
    assert np.median(lengths) >= 15
    assert corpus.vocabulary == tuple(sorted(corpus.vocabulary))
    shares = np.bincount(corpus.indices, minlength=corpus.n_words)
    assert shares.min() >= 5
    assert shares.max() < 0.3 * corpus.n_documents
    assert all(re.fullmatch("[a-z]{3,}", word) for word in corpus.vocabulary)
    assert not {"the", "and", "with"} & set(corpus.vocabulary)
    assert {"socket", "thread", "file"} <= set(corpus.vocabulary)


# Size


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
def test_memory_stays_bounded(tmp_path: Path, ordered: bool) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "docword.big.txt"
    documents, each, words = 100_000, 50, 40_000
    with path.open("wb") as stream:
        stream.write(f"{documents}\n{words}\n{documents * each}\n".encode())
        for start in range(1, documents + 1, 10_000):
            d = np.repeat(np.arange(start, start + 10_000), each)
            d = d if ordered else rng.permutation(d)
            w, c = rng.integers(1, words + 1, len(d)), rng.integers(1, 9, len(d))
            stream.write("".join(f"{i} {j} {k}\n" for i, j, k in zip(d, w, c, strict=True)).encode())
    tracemalloc.start()
    tracemalloc.reset_peak()
    corpus = read_uci(path, folder=tmp_path / "disk")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = read_uci(path)
    # 5 million entries are 120 MB as three columns of 64 bits; a block of the file takes the same whatever its length.
    assert peak < 300e6
    assert corpus.n_tokens == whole.n_tokens
    np.testing.assert_array_equal(corpus.totals(), whole.totals())
    np.testing.assert_array_equal(corpus.indices[:1000], whole.indices[:1000])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("bbc", (2225, 2949, 182484, 267259)),
        ("reuters21578", (16969, 5469, 841731, 1258783)),
        ("wikipedia", (1000, 7701, 317325, 659313)),
    ],
)
def test_real_corpora(hivi_data: Path, name: str, sizes: tuple[int, ...]) -> None:
    corpus = read_corpus(hivi_data / "corpora" / name)
    assert (corpus.n_documents, corpus.n_words, corpus.n_nonzeros, corpus.n_tokens) == sizes
    assert len(corpus.vocabulary) == sizes[1]
