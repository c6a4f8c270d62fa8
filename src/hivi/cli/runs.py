"""What the `hivi topics` commands read and write: corpora, and trained models with the story of their training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer

from hivi._errors import LoadError, message
from hivi.topics.base import Corpus
from hivi.topics.corpora import read_corpus
from hivi.topics.embedded import python_docstrings
from hivi.topics.estimator import DeepExponentialFamily
from hivi.topics.provenance import ARRAYS, META, Provenance
from hivi.topics.scan import read_vocabulary

EMBEDDED = "python-docstrings"


class Run(NamedTuple):
    """A trained model, and what it was trained on, where that is known: not of one that was saved from Python."""

    model: DeepExponentialFamily
    provenance: Provenance | None
    folder: Path

    def save(self) -> None:
        """Write both to one folder."""
        self.model.save(self.folder)
        self.training.save(self.folder)

    @property
    def training(self) -> Provenance:
        """What it was trained on.

        Raises:
            LoadError: it was saved from Python.
        """
        if self.provenance is None:
            found = "a model that DeepExponentialFamily.save wrote, without its training documents"
            cure = "train by `hivi topics fit`, or call the model's completion_perplexity in Python"
            raise LoadError(message(str(self.folder), found, "a folder that `hivi topics fit` wrote", cure))
        return self.provenance

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words, or their numbers."""
        return self.model.vocabulary_ or tuple(str(v) for v in range(self.model.n_features_in_))

    @property
    def frequencies(self) -> np.ndarray:
        """Of the words in the training documents."""
        return np.asarray(self.model._trained.statistics["frequencies"], np.float64)

    def missing(self) -> list[str]:
        """What is not known of it, and what would make it known, in lines."""
        found = []
        if self.model.vocabulary_ is None:
            cure = "pass a vocabulary to DeepExponentialFamily.save, or --vocab to `hivi topics fit`"
            found.append(f"no vocabulary was saved, so words are shown by their numbers, from 0; {cure}")
        if self.provenance is None:
            found.append(
                "saved from Python: the number of its training documents, and which were kept out, is not known"
            )
        return found


def load_run(folder: Path) -> Run:
    """What `Run.save` or `DeepExponentialFamily.save` wrote.

    Raises:
        LoadError: no such run, or a broken one.
    """
    model = DeepExponentialFamily.load(folder)
    told = any((folder / name).exists() for name in (META, ARRAYS))
    return Run(model, Provenance.load(folder) if told else None, folder)


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
