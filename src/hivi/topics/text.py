"""Texts to a corpus: words are found, stop words and rare ones left out, the rest counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

from hivi._errors import CorpusError, message
from hivi.topics.base import Corpus
from hivi.topics.scan import open_bytes, shown, wrong

StopWords = Literal["english"] | Sequence[str] | None
"""Words that are left out: scikit-learn's English ones, your own, or none."""

PATTERN = r"(?u)[^\W\d_]{3,}"
"""A word: three letters or more."""


def read_text_folder(
    folder: str | Path,
    min_documents: int = 5,
    max_share: float = 0.5,
    stop_words: StopWords = "english",
    pattern: str = PATTERN,
) -> Corpus:
    """Count the words of texts: one document per .txt or .txt.gz file, in the order of their paths.

    Args:
        folder: with the files, in it or in its folders.
        min_documents: words in fewer documents are left out.
        max_share: words in more than this share of the documents are left out, 0 to 1.
        stop_words: words that are left out: "english" for scikit-learn's, your own, or None.
        pattern: regular expression of a word, of lower-case text.

    Raises:
        CorpusError: no such files, a text that is not UTF-8, naming its line, or no word left.

    Example:
        >>> import pathlib, tempfile
        >>> from hivi.topics.text import read_text_folder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for i, text in enumerate(["The cat sees a dog.", "The dog sees me."]):
        ...         _ = pathlib.Path(folder, f"{i}.txt").write_text(text)
        ...     corpus = read_text_folder(folder, min_documents=1, max_share=1.0)
        >>> corpus.vocabulary, corpus.lengths()
        (('cat', 'dog', 'sees'), array([3, 2]))
    """
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.name.endswith((".txt", ".txt.gz")) and p.is_file())
    if not files:
        found = "no .txt file" if folder.is_dir() else "no such folder"
        raise CorpusError(
            message(str(folder), found, "a folder of texts, one .txt file per document", "correct the path")
        )
    return count_words(_texts(files), folder.name, min_documents, max_share, stop_words, pattern)


def count_words(
    texts: Iterable[str],
    name: str,
    min_documents: int = 5,
    max_share: float = 0.5,
    stop_words: StopWords = "english",
    pattern: str = PATTERN,
) -> Corpus:
    """The corpus of texts, which may be a stream; see `read_text_folder`.

    Raises:
        CorpusError: no word left.

    Example:
        >>> from hivi.topics.text import count_words
        >>> count_words(["green eggs", "green ham"], "two", min_documents=1, max_share=1.0).totals()
        array([1, 2, 1])
    """
    counter = CountVectorizer(token_pattern=pattern)
    # Left out here, not by CountVectorizer, which warns of stop words that are no words by the pattern.
    words, left_out = counter.build_analyzer(), set(ENGLISH_STOP_WORDS if stop_words == "english" else stop_words or ())
    counter = CountVectorizer(
        analyzer=lambda text: [word for word in words(text) if word not in left_out],
        min_df=min_documents,
        max_df=float(max_share),
    )
    try:
        counts = counter.fit_transform(texts)
    except CorpusError:
        raise
    except ValueError as error:
        expected = f"words in at least {min_documents} documents and at most {max_share:.0%} of them"
        cure = "lower min_documents, raise max_share, or add documents"
        raise CorpusError(message(f"corpus {name!r}", f"no such word ({error})", expected, cure)) from None
    return Corpus.from_matrix(counts, counter.get_feature_names_out().tolist(), name)


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        with open_bytes(path) as stream:
            try:
                raw = stream.read()
            except (OSError, EOFError) as error:
                cure = "fetch the file again"
                raise CorpusError(message(str(path), f"a broken file ({error})", "a whole file", cure)) from None
        try:
            yield raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            around = raw[max(0, error.start - 20) : error.start + 20]
            raise wrong(
                path, line, f"bytes that are not UTF-8 ({shown(around)})", "text in UTF-8", "convert it"
            ) from None
