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
from hivi._compile import EFFORTS, FLAG, FORCED, compiled, effort_for, forced, hastily
from hivi._estimators import cost
from hivi._estimators.cost import operations
from hivi._fit import run as running


def test_long_loops_are_compiled_well_and_short_ones_quickly():
    assert [effort_for(cost, steps) for cost, steps in ((1e4, 2000), (1e7, 2000), (1e9, 2000))] == list(EFFORTS)
    assert effort_for(1e4, 10**7) == "full"


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_only_the_cpu_has_options(backend):
    options = {e: dict(_compile._options(e, backend)) for e in EFFORTS}
    if backend == "gpu":  # but for the workaround, which no other device reads
        assert options["quick"] == options["medium"] == options["full"]
    else:
        assert "xla_backend_optimization_level" not in options["full"]
        assert options["quick"]["xla_backend_optimization_level"] < options["medium"]["xla_backend_optimization_level"]


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
    np.testing.assert_array_equal(program(x), program.at("medium")(x))
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
    before = jax.config.read(FLAG)

    def fail() -> None:
        with hastily():
            assert jax.config.read(FLAG)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert jax.config.read(FLAG) == before


def test_a_fit_weighs_its_own_work_once(monkeypatch):
    """Counted once for a target, a family and a number of samples; not at all where the effort is given."""
    counted, seen = [], []
    monkeypatch.setattr(cost, "operations", lambda *a, **k: counted.append(operations(*a, **k)) or counted[-1])
    monkeypatch.setattr(cost, "effort_for", lambda work, steps: seen.append(steps) or "quick")
    options: dict[str, Any] = {"key": jax.random.key(0), "tolerance": 1e9, "progress": False}

    def fit(samples: int, steps: int) -> hivi.Fit:
        return hivi.fit(TARGETS["pair"](), hivi.MeanField(), samples=samples, steps=steps, **options)

    fit(5, 100)
    assert not counted
    monkeypatch.setenv(FORCED, "auto")
    fit(5, 10**6)
    first = fit(5, 100)
    fit(50, 100)
    assert seen == [running.USUAL_STEPS, 100, 100]
    few, many = counted
    assert 4 < many / few < 12
    for key in (1, 2):
        first.elbo(jax.random.key(key))
    assert len(counted) == 3


def test_efforts_are_checked_and_loops_of_unknown_length_count(monkeypatch):
    monkeypatch.setenv(FORCED, "fast")
    with pytest.raises(hivi.HiviError, match=r"HIVI_COMPILE.*'fast'.*quick, medium, full"):
        forced()

    def loop(n: Any) -> Any:
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, jnp.ones((5, 5)))

    assert operations(loop, jnp.array(3), roughly=True) > 100 * 250


def test_haste_in_two_threads_ends_with_the_last(monkeypatch):
    before = jax.config.read(FLAG)
    first, second = hastily(), hastily()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert jax.config.read(FLAG)
    second.__exit__(None, None, None)
    assert jax.config.read(FLAG) == before


def test_rough_operations_are_at_least_the_exact_ones():
    def fn(x: Any) -> Any:
        jnp.exp(x)  # of no use
        return x @ x

    x = jnp.ones((5, 5))
    assert operations(fn, x) == 250
    assert operations(fn, x, roughly=True) == 275


def test_compiled_programs_are_forgotten_before_mappings_run_out(tmp_path, monkeypatch) -> None:
    allowed, used = tmp_path / "allowed", tmp_path / "used"
    allowed.write_text("10\n")
    used.write_text("x\n" * 4)
    monkeypatch.setattr(_compile, "ALLOWED", allowed)
    monkeypatch.setattr(_compile, "MAPPINGS", used)
    run = jax.jit(lambda x: x + 1)
    run(1.0)
    assert not _compile.make_room()
    assert run._cache_size() == 1
    used.write_text("x\n" * 5)
    assert _compile.make_room()
    assert run._cache_size() == 0
    assert run(1.0) == 2.0
    used.unlink()
    assert not _compile.make_room()
