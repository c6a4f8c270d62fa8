"""What every test shares: the JAX set-up, run-time type checks, and the fixtures `x64` and `hivi_data`."""

from __future__ import annotations

import os
from importlib.metadata import version

# Before JAX (or a BLAS) is imported. Two CPU devices, so that code for several devices is tested everywhere;
# one BLAS thread per worker, since the suite already runs one worker per core.
_FLAGS = {"--xla_force_host_platform_device_count": "2"}
if os.environ.setdefault("HIVI_COMPILE", "quick") == "quick":
    # The tests compile much and compute little: half the time. HIVI_COMPILE=auto compiles as users do.
    _FLAGS["--xla_backend_optimization_level"] = "0"
    if version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
        _FLAGS |= {"--xla_cpu_use_fusion_emitters": "false", "--xla_cpu_parallel_codegen_split_count": "1"}
for _name, _value in _FLAGS.items():
    if _name not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_name}={_value}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")
os.environ["MPLBACKEND"] = "Agg"

import ctypes
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

# Check every annotation of hivi, shapes included, at run time. Must come before the first `import hivi`.
if os.environ.get("HIVI_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook("hivi", "beartype.beartype")

ROOT = Path(__file__).resolve().parent.parent
SLOW = Path(__file__).with_name("slow.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `slow.txt` names."""
    named = {line for line in SLOW.read_text().splitlines() if line and not line.startswith("#")}
    found = {item.nodeid: item for item in items}
    for name in named & found.keys():
        found[name].add_marker(pytest.mark.slow)
    files = {name.split("::")[0] for name in found}
    gone = sorted(name for name in named - found.keys() if name.split("::")[0] in files)
    partial = config.getoption("lf", False) or any("::" in argument for argument in config.args)
    if gone and not partial:
        raise pytest.UsageError(f"{SLOW.name} names tests that are gone: {gone}")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Look for garbage seldom: tracing makes many objects, and each search walks all that was imported."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


MAPPINGS, MEMORY = 25_000, 2e9
"""Of a process: Linux allows 65,530 mappings, and a compiler that gets no more ends the process; bytes of memory."""
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs before a long run has too many: each keeps memory, and some mappings of it."""
    yield
    maps, statm = Path("/proc/self/maps"), Path("/proc/self/statm")
    if next(_tests) % 20 or not maps.exists():
        return
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MEMORY or maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps what was freed in small pieces
            libc.malloc_trim(0)


@pytest.fixture
def x64() -> Iterator[None]:
    """Run the test in double precision.

    `jax.enable_x64` is the public context manager, not deprecated in JAX 0.10 nor in the documentation of the
    version after it; `jax.experimental.enable_x64` is gone.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def hivi_data() -> Path:
    """The folder of data sets: $HIVI_DATA, else `shared/data` beside the checkout; skips where there is none."""
    named = os.environ.get("HIVI_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"HIVI_DATA names {named}, which is not a folder")
        pytest.skip("no data sets: set HIVI_DATA to their folder, or put it at shared/data beside the checkout")
    return folder
