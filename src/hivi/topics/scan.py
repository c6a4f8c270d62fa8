"""Files of numbers, plain or .gz: blocks of whole lines with their line numbers, the numbers in them, vocabularies."""

from __future__ import annotations

import dataclasses
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from hivi._errors import CorpusError, message

BLOCK_BYTES = 2**22
"""Bytes that are parsed at a time."""
LONGEST = 16
"""A line may have so many blocks."""
DIGITS = 18
"""A number with more digits may not fit into 64 bits."""
COLON = ord(":")
BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Block:
    """A few whole lines of a file.

    Attributes:
        path: of the file.
        line: number of the first line, from 1.
        text: the lines.
    """

    path: Path
    line: int
    text: bytes


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The unsigned integers of a block.

    Attributes:
        values: all of them, in order.
        first: which of them starts each line, and their number.
        colon: whether a colon follows directly; empty where colons are not allowed.
    """

    values: Int64[np.ndarray, " tokens"]
    first: Int64[np.ndarray, " starts"]
    colon: Bool[np.ndarray, " marks"]


def wrong(path: Path, line: int, found: str, expected: str, cure: str) -> CorpusError:
    """An error that names the line."""
    return CorpusError(message(f"{path}, line {line}", found, expected, cure))


def shown(text: bytes) -> str:
    """A line for a message: short, whatever its bytes."""
    line = text.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    return repr(line if len(line) <= 60 else f"{line[:57]}...")


def open_bytes(path: Path) -> io.BufferedIOBase:
    """Open a file, unpacked if it is gzip's (whatever its name).

    Raises:
        CorpusError: no such file, or not readable.
    """
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if packed else path.open("rb")
    except OSError as error:
        found = f"{type(error).__name__} ({error.strerror or error})"
        raise CorpusError(message(str(path), found, "a readable file", "correct the path")) from None


def header_lines(path: Path, most: int) -> list[bytes]:
    """The first lines, without a byte-order mark; fewer if there are no more.

    Raises:
        CorpusError: the file is broken off or no gzip file.
    """
    with open_bytes(path) as stream:
        lines: list[bytes] = []
        while len(lines) < most and (line := _read(stream.readline, path, len(lines) + 1)):
            lines.append(line)
    if lines:
        lines[0] = lines[0].removeprefix(BOM)
    return lines


def blocks(path: Path, skip: int = 0, size: int | None = None) -> Iterator[Block]:
    """The file from line `skip + 1`, in blocks of whole lines; trailing empty lines are left out.

    Args:
        path: of the file.
        skip: lines that are passed over, so many at least the file has.
        size: bytes of a block.

    Raises:
        CorpusError: the file is broken off, is no gzip file, or has a line longer than a block.
    """
    size = BLOCK_BYTES if size is None else size
    with open_bytes(path) as stream:
        for line in range(skip):
            _read(stream.readline, path, line + 1)
        line, rest = skip + 1, b"" if skip else _read(stream.read, path, 1, len(BOM)).removeprefix(BOM)
        while more := _read(stream.read, path, line + rest.count(b"\n"), size):
            text = rest + more
            # Up to the end of the last line that is whole and not empty; empty ones wait, as they may be the file's last.
            body = len(text.rstrip())
            end = text.find(b"\n", body) + 1 or text.rfind(b"\n", 0, body) + 1
            if end:
                yield Block(path, line, text[:end])
                line += text.count(b"\n", 0, end)
            rest = text[end:]
            if len(rest) > LONGEST * size:
                cure = "check that it is a file of this format, with line ends"
                raise wrong(path, line, f"a line of more than {LONGEST * size} bytes", "short lines", cure)
        if rest.strip():
            yield Block(path, line, rest.rstrip() + b"\n")


def tokens(text: bytes, colons: bool = False) -> Tokens | None:
    """The numbers of some lines at once, or None where that takes a closer look, line by line.

    Args:
        text: whole lines, each with a line end.
        colons: a colon may separate numbers, beside blanks.
    """
    raw = np.frombuffer(text, np.uint8)
    digit = (raw - np.uint8(48)) < 10
    apart = (raw == 32) | (raw == 10) | (raw == 13) | (raw == 9)
    marks = raw == COLON if colons else np.zeros(0, bool)
    if np.count_nonzero(digit) + np.count_nonzero(apart) + np.count_nonzero(marks) != len(raw) or not len(raw):
        return None
    edges = np.flatnonzero(digit[1:] != digit[:-1]) + 1
    if digit[0]:
        edges = np.concatenate([[0], edges])
    if len(edges) % 2 or not len(edges):  # the last line has no end
        return None
    starts, ends = edges[::2], edges[1::2]
    if np.max(ends - starts) > DIGITS:
        return None
    # Every colon directly between two numbers?
    colon = marks[ends] if colons else np.zeros(0, bool)
    if colons and np.count_nonzero(marks) != np.count_nonzero(colon[:-1] & (ends[:-1] + 1 == starts[1:])):
        return None
    line_ends = np.flatnonzero(raw == 10)
    first = np.concatenate([[0], np.searchsorted(starts, line_ends)])
    values = np.fromstring(text.replace(b":", b" ") if colons else text, dtype=np.int64, sep=" ")
    return Tokens(values, first, colon)


def read_vocabulary(vocab: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """The words: of a file with one per line, or as they are given.

    Raises:
        CorpusError: an empty line, or bytes that are not UTF-8.
    """
    if vocab is None or not isinstance(vocab, str | Path):
        return None if vocab is None else tuple(vocab)
    path = Path(vocab)
    words: list[str] = []
    cure = "write the vocabulary as UTF-8, one word per line"
    for block in blocks(path):
        for at, line in enumerate(block.text.split(b"\n")[:-1], block.line):
            try:
                word = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                raise wrong(path, at, shown(line), "a word in UTF-8", cure) from None
            if not word:
                raise wrong(path, at, "an empty line", "a word", cure)
            words.append(word)
    if not words:
        raise wrong(path, 1, "an empty file", "a word", cure)
    return tuple(words)


def _read(method: Callable[[int], bytes], path: Path, line: int, size: int = BLOCK_BYTES) -> bytes:
    try:
        return method(size)
    except (OSError, EOFError, zlib.error) as error:
        found, cure = f"a broken file ({error})", "fetch it again, or unpack it to see how far it goes"
        expected = "a whole gzip file" if not isinstance(error, OSError) else "a readable file"
        raise wrong(path, line, found, expected, cure) from None
