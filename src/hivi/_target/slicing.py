"""Minibatches over plates: which plates, and which axes of the model's arguments run along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hivi._errors import TargetError, message
from hivi._locality.base import Along, AxisMap, Scope
from hivi._space import Plate, Site

Slices: TypeAlias = dict[int, tuple[tuple[int, str], ...]]
"""Argument number -> pairs (its axis, the plate that the axis runs along)."""

INDEX = (
    "make the model read the rows it is given: `with numpyro.plate(name, N) as i: ... obs=y[i]`, "
    "or numpyro.subsample(y, event_dim=0), for every array that has one row per element of the plate"
)


def choose(plates: Mapping[str, tuple[int, int | None]], requested: Mapping[str, int]) -> tuple[Plate, ...]:
    """The plates that are seen in minibatches.

    Args:
        plates: plate -> (size, `subsample_size` that the model declares).
        requested: plate -> batch size that the user asks for; it wins.

    Raises:
        TargetError: an unknown plate, or a batch that is empty or larger than its plate.
    """
    for name, batch in requested.items():
        if name not in plates:
            cure = "name a plate of the model; a plate made inside a scan body cannot be subsampled"
            raise TargetError(message(f"subsample: plate {name!r}", "no such plate", f"one of {sorted(plates)}", cure))
        if not isinstance(batch, int | np.integer) or not 1 <= batch <= plates[name][0]:
            expected = f"an integer from 1 to {plates[name][0]}, the size of the plate"
            raise TargetError(message(f"subsample: plate {name!r}", f"{batch!r}", expected, "give a smaller batch"))
    sizes = {name: int(requested.get(name, declared or size)) for name, (size, declared) in plates.items()}
    return tuple(Plate(name, size, sizes[name]) for name, (size, _) in plates.items() if sizes[name] < size)


def local_to(name: str, axes: Sequence[tuple[str, int]], plates: Sequence[Plate]) -> tuple[Plate, int] | None:
    """The subsampled plate that a latent lies in, with its axis.

    Raises:
        TargetError: it lies in two of them.
    """
    found = [(plate, axis) for label, axis in axes for plate in plates if plate.name == label]
    if len(found) > 1:
        names = " and ".join(repr(plate.name) for plate, _ in found)
        expected, cure = "at most one subsampled plate around a latent", "subsample one of them"
        raise TargetError(message(f"site {name!r}", f"a latent in the subsampled plates {names}", expected, cure))
    return found[0] if found else None


def _runs_along(
    found: Sequence[Scope],
    axes: Sequence[Mapping[str, int]],
    shapes: Mapping[str, tuple[int, ...]],
    plates: Sequence[Plate],
) -> Slices:
    """Which axes of the arguments run along the plates, read from how the log-densities use them.

    Args:
        found: per term, the maps of every argument (called by its number) that it depends on.
        axes: per term, subsampled plate -> axis of the term.
        shapes: argument -> shape.
        plates: the plates whose row numbers the model does not use.

    Raises:
        TargetError: an argument runs along a plate in one term and otherwise in another.
    """
    result: dict[str, set[tuple[int, str]]] = {}
    for scope, own in zip(found, axes, strict=True):
        for argument, maps in scope.items():
            for plate in plates:
                along = _along(maps, own.get(plate.name), shapes[argument], plate.size)
                result.setdefault(argument, set()).update((axis, plate.name) for axis in along)
    for scope, own in zip(found, axes, strict=True):
        for argument, maps in scope.items():
            for axis, name in result[argument]:
                if any(m[axis] != Along(own.get(name, -1)) for m in maps):
                    where, cure = f"plate {name!r}", f"{INDEX}; quantities of the whole data belong outside the model"
                    text = "an argument with one row per element that is also used outside the plate or across rows"
                    raise TargetError(message(where, text, "rows used only in their own element", cure))
    return {int(k): tuple(sorted(v)) for k, v in result.items() if v}


def _along(maps: frozenset[AxisMap], axis: int | None, shape: tuple[int, ...], size: int) -> list[int]:
    """Axes of an argument that run along this axis of a term, in every one of its maps."""
    if axis is None:
        return []
    return [k for k, n in enumerate(shape) if n == size and all(m[k] == Along(axis) for m in maps)]


def literals(jaxpr: Any) -> Iterator[str]:
    """The numbers written into a program. They tell a model that computes with the length of its data."""
    for eqn in jaxpr.eqns:
        yield from (str(v.val) for v in eqn.invars if isinstance(v, jex.Literal))
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(param, "eqns"):
                yield from literals(getattr(param, "jaxpr", param))


class Model(NamedTuple):
    """A model as slicing sees it.

    Attributes:
        read: (z, data, rows) -> an object with `terms` and `subsamples`, as `statements.Reader`.
        data: its array arguments.
        names: what messages call them.
        sites: its latents.
        plates: its subsampled plates.
    """

    read: Callable[[Mapping[str, Any], Sequence[Any], Mapping[str, Any]], Any]
    data: Sequence[Any]
    names: Sequence[str]
    sites: Sequence[Site]
    plates: Sequence[Plate]


def slices(model: Model) -> Slices:
    """Nothing, where the model reads its own rows; else the axes of its arguments that run along the plates.

    Raises:
        TargetError: neither the model as it is nor one with sliced arguments fits a minibatch.
    """
    problem = _problem(model, {})
    if problem is None:
        return {}
    where = f"subsampled plate{'s' * (len(plates) > 1)} {', '.join(repr(p.name) for p in plates)}"
    whole, scope, subsamples = _whole(model)
    unaware = [p for p in plates if not subsamples and not any(f"rows {p.name}" in s for s in scope)]
    found_text = f"a model that does not fit a minibatch ({problem})"
    if not unaware:
        raise TargetError(message(where, found_text, "a model that reads every array by its rows", minibatch.INDEX))
    arguments = [{k: maps for k, maps in s.items() if k.isdigit()} for s in scope]
    axes = [_axes(term, unaware) for term in found.reader.terms.values()]
    shapes = {str(k): x.shape for k, x in enumerate(model.data)}
    result = minibatch.slices(arguments, axes, shapes, unaware)
    problem = _problem(model, result)
    if problem is not None:
        sliced = ", ".join(model.names[k] for k in result) or "none"
        found_text = f"a model that does not fit a minibatch, its sliced arguments being {sliced} ({problem})"
        raise TargetError(message(where, found_text, "arguments with one row per element", minibatch.INDEX))
    small, _, _ = _whole(model, unaware, result)
    if list(minibatch.literals(small)) != list(minibatch.literals(whole)):
        found_text = "a model that computes with the number of rows of its arguments"
        cure = "pass that number as a Python number, or " + minibatch.INDEX
        raise TargetError(message(where, found_text, "arithmetic that is the same for a minibatch", cure))
    return result


def _problem(
    source: _Source, found: _Found, slices: minibatch.Slices
) -> str | None:
    """The first line of the error that a minibatch makes, None where it fits."""
    example = {s.name: s.example() for s in sites}
    try:
        jax.eval_shape(_terms(source, found, slices), example, model.data, _rows(plates))
    except TargetError:
        raise
    except Exception as error:  # any code of the user may run into the shapes
        if _needs_value(error):
            raise
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return None


def _whole(
    source: _Source,
    sites: Sequence[Site],
    plates: Sequence[Plate],
    small: Sequence[Plate] = (),
    slices: minibatch.Slices | None = None,
) -> tuple[Any, list[Any], bool]:
    """Trace the model with all rows (a minibatch of the `small` plates) as inputs.

    Returns:
        The program; per term, the arguments (by number) and rows that it depends on; whether it subsamples itself.
    """
    batch = {p.name: p.batch for p in small}
    rows = {p.name: jax.ShapeDtypeStruct((batch.get(p.name, p.size),), jnp.int32) for p in plates}
    z = {s.name: s.example() if s.local and s.local[0].name in batch else jax.ShapeDtypeStruct(s.shape, s.dtype) for s in sites}
    data = []
    for k, x in enumerate(model.data):
        along = dict((slices or {}).get(k, ()))
        shape = tuple(batch[along[axis]] if axis in along else n for axis, n in enumerate(x.shape))
        data.append(jax.ShapeDtypeStruct(shape, x.dtype))
    readers: list[Reader] = []

    def flat(z: Any, rows: Any, data: Any) -> list[Any]:
        readers.append(source.read(data, z=z, rows=rows))
        return [term.array for term in readers[-1].terms.values()]

    jaxpr, consts, _ = _jaxprs.trace(flat, z, rows, data)
    seeds = [None] * (len(consts) + len(z)) + [f"rows {name}" for name in sorted(rows)] + [str(k) for k in range(len(data))]
    jaxpr = _jaxprs.inline(jaxpr)
    return jaxpr, scopes(jaxpr, seeds)[0], readers[-1].subsamples


