"""What the `hivi topics` commands read and write: corpora, and trained models with the story of their training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer

from hivi.topics.base import Corpus
from hivi.topics.corpora import read_corpus
from hivi.topics.embedded import python_docstrings
from hivi.topics.estimator import DeepExponentialFamily
from hivi.topics.provenance import Provenance
from hivi.topics.scan import read_vocabulary

EMBEDDED = "python-docstrings"


class Run(NamedTuple):
    """A trained model, and what it was trained on."""

    model: DeepExponentialFamily
    provenance: Provenance

    def save(self, folder: Path) -> None:
        """Write both to one folder."""
        self.model.save(folder)
        self.provenance.save(folder)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, or their numbers."""
        return self.provenance.vocabulary or tuple(str(v) for v in range(self.provenance.n_words))


def load_run(folder: Path) -> Run:
    """What `Run.save` wrote.

    Raises:
        LoadError: no such run.
    """
    return Run(DeepExponentialFamily.load(folder), Provenance.load(folder))


def load_corpus(name: str, vocab: Path | None, known: tuple[str, ...] | None = None) -> Corpus:
    """The embedded corpus, or that of a path.

    Args:
        name: `python-docstrings`, or a path.
        vocab: file of its words.
        known: words for a corpus that brings none of its own.

    Raises:
        typer.BadParameter: no such file.
        CorpusError: a malformed one.
    """
    if name == EMBEDDED and not Path(name).exists():
        if vocab is not None:
            raise typer.BadParameter(f"{EMBEDDED} has its own words; leave it out", param_hint="'--vocab'")
        return python_docstrings()
    if not Path(name).exists():
        text = f"there is no file or folder {name!r}; {EMBEDDED} is the corpus that comes with hivi"
        raise typer.BadParameter(text, param_hint="'CORPUS'")
    corpus = read_corpus(name, vocab if vocab is None else read_vocabulary(vocab))
    if corpus.vocabulary is None and known is not None and len(known) == corpus.n_words:
        return dataclasses.replace(corpus, vocabulary=known)
    return corpus


def parse_layers(text: str) -> tuple[int, ...]:
    """Sizes of the layers from `100,30,15`.

    Raises:
        typer.BadParameter: not positive whole numbers.
    """
    parts = text.replace("-", ",").split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise typer.BadParameter(
            f"{text!r} is not sizes of layers from the words up, such as 100,30,15", param_hint="'--layers'"
        )
    return tuple(int(p) for p in parts)


def take_share(documents: np.ndarray, text: str, seed: int) -> np.ndarray:
    """All documents, or a share of them, drawn by the seed.

    Raises:
        typer.BadParameter: neither `all` nor a number between 0 and 1.
    """
    if text == "all":
        return documents
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise typer.BadParameter(f"{text!r} is neither all nor a share such as 0.1", param_hint="'--documents'")
    number = max(1, round(share * len(documents)))
    return np.sort(np.random.default_rng(seed).permutation(documents)[:number])
