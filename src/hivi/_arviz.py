"""ArviZ, imported where it is needed: it takes seconds."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def load_arviz() -> ModuleType:
    """The installed ArviZ.

    The first import of a day announces ArviZ's 1.0 and writes the date into the user's cache. Two processes that do so at once
    (two runs on a new machine, or two workers of a test suite) fall over each other: the slower finds its file gone. By
    then the date is written, and a second import does not write.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return importlib.import_module("arviz")
        except FileNotFoundError:
            return importlib.import_module("arviz")


def before_one(arviz: ModuleType) -> bool:
    """Whether this is ArviZ 0.x, which has InferenceData and takes log-weights with the other sign."""
    return int(arviz.__version__.split(".")[0]) < 1
