"""How long the compiler may take: the same numbers at every effort, one program for each, and nothing left behind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hivi
from cases import TARGETS
from hivi import _compile
from hivi._compile import EFFORTS, FORCED, compiled, effort_for, hastily
from hivi._estimators.cost import operations
from hivi._fit import run as running


def test_long_loops_are_compiled_well_and_short_ones_quickly():
    assert [effort_for(cost, steps) for cost, steps in ((1e4, 2000), (1e7, 2000), (1e9, 2000))] == list(EFFORTS)
    assert effort_for(1e4, 10**7) == "full"


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_only_the_cpu_has_options(backend):
    options = {e: dict(_compile._options(e, backend)) for e in EFFORTS}
    if backend == "gpu":
        assert not any(options.values())
    else:
        assert "xla_backend_optimization_level" not in options["full"]
        assert options["quick"]["xla_backend_optimization_level"] < options["usual"]["xla_backend_optimization_level"]


def test_an_option_that_the_compiler_lacks_is_left_out():
    assert _compile._understood("xla_backend_optimization_level", 1)
    assert not _compile._understood("xla_no_such_option", True)


def test_every_effort_gives_the_same_numbers_from_one_program_each(monkeypatch):
    monkeypatch.delenv(FORCED)
    traced = []

    def fn(x: Any) -> Any:
        traced.append(1)
        return jnp.sum(jnp.sin(x) @ x.T, 0)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(30, 30)), jnp.float32)
    program = compiled(fn)
    found = [program.at(e)(x) for e in EFFORTS for _ in range(2)]
    assert len(traced) == 3
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(program(x), program.at("usual")(x))
    assert len(traced) == 3


def test_the_environment_forces_one_effort(monkeypatch):
    program = compiled(lambda x: x + 1, effort="full")
    monkeypatch.setenv(FORCED, "quick")
    program(jnp.zeros(2))
    assert list(program._found) == ["quick"]
    monkeypatch.setenv(FORCED, "auto")
    program(jnp.zeros(2))
    assert list(program._found) == ["quick", "full"]


def test_haste_ends_also_with_an_error():
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)

    def fail() -> None:
        with hastily():
            assert jax.config.read(name)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert jax.config.read(name) == before


def test_a_fit_weighs_its_own_work(monkeypatch):
    """A small fit is compiled quickly, whatever it is asked for; its cost, counted roughly, is of the right size."""
    seen = []
    monkeypatch.setattr(running, "effort_for", lambda cost, steps: seen.append((cost, steps)) or "quick")
    for samples in (4, 40):
        hivi.fit(
            TARGETS["pair"](), hivi.MeanField(), key=jax.random.key(0), steps=10**6 if samples == 4 else 100,
            samples=samples, tolerance=1e9, progress=False,
        )  # fmt: skip
    (few, capped), (many, asked) = seen
    assert (capped, asked) == (running.USUAL_STEPS, 100)
    assert 4 < many / few < 12


def test_rough_operations_are_at_least_the_exact_ones():
    def fn(x: Any) -> Any:
        jnp.exp(x)  # of no use
        return x @ x

    x = jnp.ones((5, 5))
    assert operations(fn, x) == 250
    assert operations(fn, x, roughly=True) == 275
