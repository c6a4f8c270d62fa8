"""A corpus that every machine has: the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from hivi.topics.base import Corpus
from hivi.topics.text import count_words

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}
SHORTEST = 20
"""Words of the shortest docstring that is a document."""
PATTERN = r"\b[a-z]{3,}\b"


@functools.cache
def python_docstrings() -> Corpus:
    """The docstrings of the standard library's modules, classes and functions: one of 20 words or more is one document.

    They are read from the source files, without importing them. Words are of three letters a to z or more, lower case, without
    English stop words, in at least 5 documents and fewer than 30 % of them. The same for the same release of Python; about five
    seconds, once per process.

    Raises:
        CorpusError: the library's source files are not installed.

    Example:
        >>> from hivi.topics.embedded import python_docstrings
        >>> corpus = python_docstrings()
        >>> corpus.name, corpus.n_documents > 1000
        ('python-docstrings', True)
    """
    return count_words(
        docstrings(Path(sysconfig.get_paths()["stdlib"])), "python-docstrings", 5, 0.3, "english", PATTERN
    )


def docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of the Python files of a folder, in the order of their paths and lines."""
    files = (p for p in sorted(folder.rglob("*.py")) if not SKIPPED.intersection(p.relative_to(folder).parts[:-1]))
    for path in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escapes, which are not ours
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        yield from _long_docstrings(tree)


def _long_docstrings(node: ast.AST) -> Iterator[str]:
    """Of a module, class or function, and of those defined in it: only statements can hold them, so no expression is visited."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text.split()) >= SHORTEST:
            yield text
    for part in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, part, ())
        for child in inner if isinstance(inner, list) else ():  # a lambda's body is an expression
            yield from _long_docstrings(child)
