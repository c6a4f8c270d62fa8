"""Trained deep exponential families on disk: arrays in safetensors, all else in JSON; nothing runs on loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hivi._errors import CorpusError, HiviError, LoadError, message
from hivi._fit import store
from hivi.topics.base import check_vocabulary
from hivi.topics.model import Architecture, Priors
from hivi.topics.provenance import Provenance
from hivi.topics.trained import Trained

NAME = "topics"
FORMAT = 1
PLAIN = ("documents", "steps", "settled", "passes", "seed")


def save_model(estimator: Any, folder: str | Path, vocabulary: Iterable[str] | None = None) -> None:
    """Write a fitted `DeepExponentialFamily` to one file of a folder, made if there is none; an older one is replaced.

    Args:
        estimator: the fitted estimator.
        folder: where.
        vocabulary: the words, where the estimator does not know them.

    Raises:
        CorpusError: it knows them, or there are not as many.

    Example:
        >>> import tempfile, numpy as np
        >>> from hivi.topics.estimator import DeepExponentialFamily
        >>> X = np.kron(np.eye(2, dtype=int), np.full((20, 4), 3))
        >>> model = DeepExponentialFamily(layers=(2,), passes=2, warm_up=0, random_state=0).fit(X)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder)
        ...     again = DeepExponentialFamily.load(folder)
        >>> bool(np.array_equal(again.components_, model.components_))
        True
    """
    trained: Trained = estimator._trained
    words = _words(estimator, vocabulary)
    arrays = {f"state/{name}": array for name, array in trained.arrays.items()}
    arrays |= {f"statistics/{name}": np.asarray(array) for name, array in trained.statistics.items()}
    arrays |= {f"means/{k}": np.asarray(mean) for k, mean in enumerate(estimator.layer_means_)}
    arrays["bound"] = np.asarray(estimator.bound_history_)
    names = getattr(estimator, "feature_names_in_", None)
    meta = {
        "format": FORMAT,
        "parameters": {name: _plain(value) for name, value in estimator.get_params(deep=False).items()},
        "architecture": dataclasses.asdict(trained.architecture),
        "family": store.encode(trained.family),
        **{name: getattr(trained, name) for name in PLAIN},
        "converged": estimator.converged_,
        "vocabulary": words,
        "named": names is not None,
    }
    Provenance.remove(folder)  # of a model that was there before
    store.write(Path(folder), NAME, arrays, meta)


def _words(estimator: Any, vocabulary: Iterable[str] | None) -> tuple[str, ...] | None:
    known: tuple[str, ...] | None = estimator.vocabulary_
    if vocabulary is None:
        return known
    if known is not None:
        found, cure = f"a vocabulary for a model that knows its {len(known)} words", "leave it out"
        raise CorpusError(message("save(vocabulary=...)", found, "a model that was fitted without words", cure))
    words = tuple(map(str, vocabulary))
    check_vocabulary("save(vocabulary=...)", words, estimator.n_features_in_)
    return words


def load_model(folder: str | Path, cls: type) -> Any:
    """The estimator that `save_model` wrote; `DeepExponentialFamily.load` calls it.

    Args:
        folder: where.
        cls: class of the estimator.

    Raises:
        LoadError: there is none, or its file is damaged or of a newer version; names the file.
    """
    arrays, meta = store.read(Path(folder), NAME)
    path = Path(folder) / f"{NAME}.safetensors"
    if meta.get("format") != FORMAT:
        found = f"format {meta.get('format')!r}"
        raise LoadError(message(str(path), found, f"format {FORMAT}", "load it with the version that wrote it"))
    try:
        return _restored(cls, arrays, meta)
    except (HiviError, KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"a damaged file ({type(error).__name__}: {error})"
        raise LoadError(
            message(str(path), found, "a model that DeepExponentialFamily.save wrote", "fit again")
        ) from error


def _restored(cls: Any, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Any:
    raw = meta["architecture"]
    architecture = Architecture(**{**raw, "layers": tuple(raw["layers"]), "priors": Priors(**raw["priors"])})
    trained = Trained(
        architecture,
        store.decode(meta["family"]),
        _part(arrays, "statistics/"),
        _part(arrays, "state/"),
        **{name: meta[name] for name in PLAIN},
    )
    estimator = cls(**{name: _rich(value) for name, value in meta["parameters"].items()})
    estimator.n_features_in_ = len(trained.statistics["frequencies"])
    estimator.vocabulary_ = None if meta["vocabulary"] is None else tuple(meta["vocabulary"])
    if meta["named"]:
        estimator.feature_names_in_ = np.asarray(meta["vocabulary"], dtype=object)
    estimator.bound_history_, estimator.converged_ = arrays["bound"], meta.get("converged")
    estimator._set(trained, [arrays[f"means/{k}"] for k in range(architecture.depth)])
    return estimator


def _part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    """A parameter of the estimator as JSON."""
    if isinstance(value, Priors):
        return {"type": "Priors", **dataclasses.asdict(value)}
    if isinstance(value, np.random.RandomState | np.random.Generator):
        return None
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return store.encode(value)


def _rich(value: Any) -> Any:
    """What `_plain` made JSON of."""
    if isinstance(value, dict) and value.get("type") == "Priors":
        return Priors(**{name: number for name, number in value.items() if name != "type"})
    return tuple(value) if isinstance(value, list) else store.decode(value)
