"""Every example in a public docstring runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil

import pytest

import hivi

MODULES = [m.name for m in pkgutil.walk_packages(hivi.__path__, "hivi.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    if name == "hivi.interop.pymc" and importlib.util.find_spec("pymc") is None:
        pytest.skip("PyMC is not installed: pip install 'hivi[pymc]'")
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(recurse=True), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in finder.find(module, name):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", hivi.__all__)
def test_public_names_show_an_example_or_are_results(name: str) -> None:
    """What a user calls has an example; errors, results and abstract parts need none."""
    thing = getattr(hivi, name)
    results = ("Error", "Estimate", "Pointwise", "Fit", "Target", "Curvature", "Comparison", "Trust")
    strategies = ("Pathwise", "Score", "LocalExpectation", "Difference", "Expectation")
    auxiliaries = ("InverseFlow", "Linearised", "SemiImplicit", "Component")
    if name.endswith(results) or name in strategies + auxiliaries:
        assert inspect.getdoc(thing)
        return
    assert ">>>" in (inspect.getdoc(thing) or "")
