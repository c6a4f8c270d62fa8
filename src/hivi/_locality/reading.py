"""Which values of a function's arguments say which coordinates meet: integers that index, and zeros of matrices.

Both make the scopes those of these very values, so that as few arguments as possible are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hivi._locality.axes import scopes
from hivi._locality.base import ALL, Loss, Scope
from hivi._locality.zeros import nonzero


class Reading(NamedTuple):
    """Scopes of a program's outputs, and what they rest on.

    Attributes:
        scopes: one per output.
        losses: where locality was given up.
        read: pairs (number of the argument, digest of what was read of it).
    """

    scopes: list[Scope]
    losses: list[Loss]
    read: tuple[tuple[int, str], ...] = ()


def closest(
    jaxpr: Any, sites: Sequence[str], leaves: Sequence[Any], consts: Sequence[Any], indexed: Collection[str]
) -> Reading:
    """The scopes of a program, where it helps some sites with the values of some of its arguments.

    Args:
        jaxpr: an open jaxpr: the sites, then the other arguments.
        sites: names of the latents.
        leaves: values or shapes of the other arguments.
        consts: values of its constants.
        indexed: the sites for which values are read.
    """
    seeds = [*sites, *[None] * len(leaves)]
    plain = Reading(*scopes(jaxpr, seeds, consts))
    if not indexed or all(_width(s, plain) == (0, 0) for s in indexed):
        return plain

    def read(some: Mapping[int, np.ndarray]) -> Reading:
        inputs = [*[None] * len(sites), *map(some.get, range(len(leaves)))]
        return Reading(*scopes(jaxpr, seeds, consts, inputs))

    known: dict[int, np.ndarray] = {}
    closer = plain
    for integers in (False, True):  # zeros alone are what more data have in common than all their integers
        some = {k: x for k, leaf in enumerate(leaves) if (x := _readable(leaf, integers)) is not None}
        tried = read(some) if some and len(some) > len(known) else closer
        if any(_width(s, tried) < _width(s, closer) for s in indexed):
            known, closer = some, tried
    gained = {s for s in indexed if _width(s, closer) < _width(s, plain)}
    if not gained:
        return plain
    for k in list(known):
        less = {j: x for j, x in known.items() if j != k}
        fewer = read(less)
        if all(_width(s, fewer) <= _width(s, closer) for s in gained):
            known, closer = less, fewer
    found = [
        old | {s: m for s, m in new.items() if s in gained}
        for old, new in zip(plain.scopes, closer.scopes, strict=True)
    ]
    losses = [x for x in plain.losses if x.site not in gained] + [x for x in closer.losses if x.site in gained]
    return Reading(found, losses, tuple((k, _digest(x)) for k, x in known.items()))


def unchanged(value: np.ndarray, digest: str) -> bool:
    """Whether an argument still says what was read of it: its integers, or where it is zero."""
    return digest in (_digest(value), _digest(value != 0))


def _digest(x: np.ndarray) -> str:
    """A fingerprint of integers, whatever their width."""
    kind = "zeros" if x.dtype.kind in "bf" else "integers"
    values = x != 0 if kind == "zeros" else x
    return f"{kind} {hashlib.sha256(np.ascontiguousarray(values, np.int64).tobytes()).hexdigest()}"


def _readable(leaf: Any, integers: bool) -> np.ndarray | None:
    """What is read of an argument: integers, where they are wanted, or where a matrix of mostly zeros is not zero."""
    here = isinstance(leaf, jax.Array | np.ndarray) and not isinstance(leaf, jax.core.Tracer)
    if not here or leaf.dtype.kind not in "iubf":
        return None
    if integers and leaf.dtype.kind in "iub":
        return np.asarray(leaf)
    return nonzero(leaf) if leaf.ndim > 1 else None


def _width(site: str, found: Reading) -> tuple[int, int]:
    """How much of a site the terms touch: places where locality was lost, and axes of which all is touched."""
    whole = sum(m.count(ALL) for scope in found.scopes for m in scope.get(site, ()))
    return sum(x.site == site for x in found.losses), whole
