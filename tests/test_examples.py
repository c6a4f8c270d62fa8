"""The examples run, and find what they are about."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import hivi

FOLDER = Path(__file__).resolve().parent.parent / "examples"
KEY = jax.random.key(0)


def example(name: str) -> ModuleType:
    """Import examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def columns(name: str) -> dict[str, np.ndarray]:
    """A csv file by column."""
    table = np.genfromtxt(FOLDER / f"{name}.csv", delimiter=",", names=True)
    return {column: table[column] for column in table.dtype.names}


@pytest.mark.slow
def test_poisson_latents() -> None:
    data = {k: np.array(v) for k, v in json.loads((FOLDER / "poisson_outbreaks.json").read_text()).items()}
    target = hivi.from_numpyro(example("poisson_outbreaks").model, **data)
    fit = hivi.fit(target, hivi.Hierarchical(prior=hivi.Flow(2)), key=KEY, steps=2000, progress=False)
    assert fit.strategies["undetected"] == "Difference"
    draws = fit.sample(KEY, 2000)
    assert draws["undetected"].shape == (2000, 12)
    assert 0.5 < float(draws["detection"].mean()) < 0.75
    hidden = np.asarray(draws["undetected"].mean(0))
    assert np.corrcoef(hidden, data["reported"])[0, 1] > 0.9


def test_bernoulli_indicators() -> None:
    """The two near copies exclude each other under the hierarchical family; exact inclusion comes from enumeration."""
    target = hivi.from_numpyro(example("variable_selection").model, **columns("variable_selection"))
    fit = hivi.fit(target, hivi.Hierarchical(prior=hivi.Flow(4)), key=KEY, steps=4000, progress=False)
    draws = np.asarray(fit.sample(KEY, 4000)["included"], float)
    assert np.mean(draws[:, 0] + draws[:, 1] >= 1) > 0.95
    assert np.mean(draws[:, 3]) < 0.3


@pytest.mark.slow
def test_continuous_hierarchy() -> None:
    target = hivi.from_numpyro(example("eight_schools").model, **columns("eight_schools"))
    flat = hivi.fit(target, hivi.MeanField(), key=KEY, steps=2000, progress=False)
    fit = hivi.fit(target, hivi.Hierarchical(prior=hivi.Flow(4)), key=KEY, steps=4000, progress=False)
    better, worse = fit.elbo(KEY), flat.elbo(KEY)
    assert better.mean - worse.mean > 5 * np.hypot(better.stderr, worse.stderr)
