"""How long the compiler may take: everything that hivi compiles goes through `compiled`.

On CPU, XLA at its usual setting compiles a small fit for ten seconds, to run it for one. At "quick" it takes a third of the time
and the program is two to seven times slower; at "medium" it takes two thirds, and the program is 1.1 to 1.4 times slower
(medians over seven targets). The numbers are the same up to rounding.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jaxlib.version

from hivi._errors import HiviError, message

Effort = Literal["quick", "medium", "full"]
EFFORTS: tuple[Effort, ...] = ("quick", "medium", "full")
FORCED = "HIVI_COMPILE"
"""Environment variable: one effort for everything, or "auto"."""
QUICK, FULL = 4e9, 2e11
"""Elementary operations of a whole run up to which, and from which, compiling quickly or fully pays."""
ROOM = 0.5
"""Share of the memory mappings that may be in use before a fit."""
MAPPINGS, ALLOWED = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
FLAG = "jax_disable_most_optimizations"
STEP = 5e5
"""Operations that the bookkeeping of a step costs as much as."""


_left = [0]
"""Mappings that were left when forgetting did not help."""


def make_room(share: float = ROOM) -> bool:
    """Forget the compiled programs of the whole process where it is about to run out of memory mappings.

    They are compiled again when needed.

    Each program keeps some of them, and Linux allows a process 65,530: after a few dozens of fits of different shapes the next
    compilation would fail, or crash. Called before whatever compiles much.

    Args:
        share: of the mappings allowed, from which on programs are forgotten.

    Returns:
        Whether programs were forgotten.
    """
    try:
        allowed = int(ALLOWED.read_text())
        used = MAPPINGS.read_bytes().count(b"\n")
    except (OSError, ValueError):  # another system
        return False
    if used < max(share * allowed, (_left[0] + allowed) / 2 if _left[0] else 0):
        return False
    jax.clear_caches()
    gc.collect()
    after = MAPPINGS.read_bytes().count(b"\n")
    _left[0] = after if after > share * allowed else 0  # others' mappings: forgetting again would not help
    return True


def effort_for(operations: float, steps: int) -> Effort:
    """The effort with which compiling and running together take least, for a loop of so many steps."""
    work = (operations + STEP) * steps
    return "quick" if work < QUICK else "full" if work > FULL else "medium"


def forced() -> Effort | None:
    """The effort that the environment asks for.

    Raises:
        HiviError: no such effort.
    """
    asked = os.environ.get(FORCED) or "auto"
    found = next((e for e in EFFORTS if e == asked), None)
    if found is None and asked != "auto":
        raise HiviError(
            message(f"environment variable {FORCED}", repr(asked), f"auto, {', '.join(EFFORTS)}", "correct it")
        )
    return found


def weighs() -> bool:
    """Whether the effort depends on the work: not where it is forced, nor on other devices than the CPU."""
    return forced() is None and jax.default_backend() == "cpu"


class Compiled:
    """A function compiled by `eqx.filter_jit`, anew for every effort that it is called with."""

    def __init__(self, fn: Callable[..., Any], effort: Effort) -> None:
        functools.update_wrapper(self, fn)
        self._fn, self._effort = fn, effort
        self._found: dict[Effort, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.at(self._effort)(*args, **kwargs)

    def at(self, effort: Effort) -> Any:
        """The function compiled with this effort."""
        chosen = forced() or effort
        if chosen not in self._found:
            options: dict[str, Any] = dict(_options(chosen, jax.default_backend()))
            given: dict[str, Any] = {"compiler_options": options} if options else {}
            self._found[chosen] = eqx.filter_jit(self._fn, **given)
        return self._found[chosen]


_lock = threading.Lock()
_hasty: list[bool] = []
"""What the flag was before each block of `hastily` that is open, in whatever thread."""


@contextlib.contextmanager
def hastily() -> Iterator[None]:
    """Operations that are compiled one by one in here take the least of the compiler's time; each runs once."""
    if forced() == "full" or jax.default_backend() != "cpu":
        yield
        return
    with _lock:
        _hasty.append(bool(jax.config.read(FLAG)) if not _hasty else _hasty[0])
        jax.config.update(FLAG, True)
    try:
        yield
    finally:
        with _lock:
            before = _hasty.pop()
            if not _hasty:
                jax.config.update(FLAG, before)


def compiled(fn: Callable[..., Any] | None = None, *, effort: Effort = "medium") -> Any:
    """`eqx.filter_jit` without the compiler's known faults, and with this effort."""
    return functools.partial(compiled, effort=effort) if fn is None else Compiled(fn, effort)


@functools.cache
def _options(effort: Effort, backend: str) -> tuple[tuple[str, Any], ...]:
    known = jaxlib.version.__version__
    # jaxlib 0.10.2 on CPU fuses large sums wrongly (jax-ml/jax#39103): densities of 20,000 draws came out wrong by 20 nats.
    out: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""} if known == "0.10.2" else {}
    if effort == "full" or backend != "cpu":
        return tuple(out.items())
    wanted = {"xla_backend_optimization_level": 0 if effort == "quick" else 1, "xla_cpu_use_fusion_emitters": False}
    return tuple((out | {n: v for n, v in wanted.items() if known.startswith("0.10.") or _understood(n, v)}).items())


def _understood(name: str, value: Any) -> bool:
    """Whether this version of the compiler has the option."""
    try:
        jax.jit(lambda x: x + 1).lower(0.0).compile(compiler_options={name: value})
    except Exception:  # the runtime's own error type is not public
        return False
    return True
