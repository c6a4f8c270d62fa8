"""Minibatches over plates: which plates, and which axes of a model's arguments run along them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from hivi import _jaxprs
from hivi._errors import TargetError, message
from hivi._locality.axes import scopes
from hivi._locality.base import Along, Maps
from hivi._space import Plate, Site

Slices: TypeAlias = dict[int, tuple[tuple[int, str], ...]]
"""Argument number -> pairs (its axis, the plate that the axis runs along)."""

_INDEX = (
    "read every array that has one row per element of the plate by the plate's rows: "
    "`with numpyro.plate(name, N) as i: ... obs=y[i]`, or numpyro.subsample(y, event_dim=0)"
)


class Model(NamedTuple):
    """A model as slicing sees it.

    Attributes:
        read: (z, data, rows) -> an object with `terms` and `subsamples`, such as `statements.Reader`.
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


def choose(plates: Mapping[str, tuple[int, int | None]], requested: Mapping[str, Any]) -> tuple[Plate, ...]:
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
            raise TargetError(message(f"subsample: plate {name!r}", f"{batch!r}", expected, "give such a batch size"))
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


def plate_axes(term: Any, plates: Sequence[Plate]) -> dict[str, int]:
    """The axis of a term that runs along each of the plates that it lies in."""
    return {name: term.axis(dim) for name, dim in term.plates for p in plates if p.name == name}


def row_numbers(plates: Sequence[Plate]) -> dict[str, Any]:
    """Shapes of a minibatch's row numbers."""
    return {p.name: jax.ShapeDtypeStruct((p.batch,), jnp.result_type(int)) for p in plates}


def take(data: Sequence[Any], rows: Mapping[str, Any], slices: Slices) -> list[Any]:
    """The rows of a minibatch of those arguments that are sliced."""
    data = list(data)
    for k, pairs in slices.items():
        for axis, plate in pairs:
            data[k] = jnp.take(data[k], rows[plate], axis=axis)
    return data


def find_slices(model: Model) -> Slices:
    """Nothing where the model reads its own rows; else the axes of its arguments that run along the plates.

    Raises:
        TargetError: neither the model as it is, nor with sliced arguments, fits a minibatch.
    """
    problem = _problem(model, {})
    whole = _trace(model, (), {})
    unaware = [p for p in model.plates if not whole.subsamples and not any(p.name in s for s in whole.rows)]
    slices: Slices = {}
    if problem is not None:
        slices = _slice_arguments(model, whole, unaware, problem)
    small = _trace(model, unaware if slices else model.plates, slices)
    if list(_literals(small.jaxpr)) != list(_literals(whole.jaxpr)):
        found = "a model that computes with the number of its rows"
        cure = f"pass that number as a Python number; or {_INDEX}"
        raise TargetError(message(_where(model), found, "arithmetic that is the same for a minibatch", cure))
    return slices


def _slice_arguments(model: Model, whole: _Traced, unaware: Sequence[Plate], problem: str) -> Slices:
    if not unaware:
        found = f"a model that does not fit a minibatch ({problem})"
        raise TargetError(message(_where(model), found, "a model that reads all of its arrays by their rows", _INDEX))
    axes = [plate_axes(term, unaware) for term in whole.terms.values()]
    slices = _along_plates(whole.arguments, axes, [np.shape(x) for x in model.data], unaware)
    problem = _problem(model, slices) or ""
    if problem:
        sliced = ", ".join(model.names[k] for k in slices) or "none"
        found = f"a model that does not fit a minibatch ({problem}; arguments that could be sliced: {sliced})"
        raise TargetError(message(_where(model), found, "arguments with one row per element of the plate", _INDEX))
    return slices


def _where(model: Model) -> str:
    return f"subsampled plate{'s' * (len(model.plates) > 1)} {', '.join(repr(p.name) for p in model.plates)}"


def needs_value(error: Exception) -> bool:
    """Whether Python code asked for the value of something traced."""
    known = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)
    return isinstance(error, known) or (type(error) is TypeError and "concrete" in str(error))


def _problem(model: Model, slices: Slices) -> str | None:
    """The first line of the error that a minibatch makes; None where it fits."""

    def terms(z: Any, data: Any, rows: Any) -> list[Any]:
        return [t.array for t in model.read(z, take(data, rows, slices), rows).terms.values()]

    try:
        jax.eval_shape(terms, {s.name: s.example() for s in model.sites}, model.data, row_numbers(model.plates))
    except TargetError:
        raise
    except Exception as error:  # any code of the user may stumble over the shapes
        if needs_value(error):
            raise
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return None


class _Traced(NamedTuple):
    jaxpr: Any
    terms: Mapping[str, Any]
    subsamples: bool
    arguments: list[dict[int, Maps]]  # per term, how each argument runs along it
    rows: list[set[str]]  # per term, the plates whose row numbers it depends on


def _trace(model: Model, small: Sequence[Plate], slices: Slices) -> _Traced:
    """Trace the model with a minibatch of the `small` plates, and all rows of the others, as inputs."""
    batch = {p.name: p.batch for p in small}
    rows = {p.name: jax.ShapeDtypeStruct((batch.get(p.name, p.size),), jnp.result_type(int)) for p in model.plates}
    z, data, readers = {}, [], []
    for s in model.sites:
        local = s.local is not None and s.local[0].name in batch
        z[s.name] = jax.ShapeDtypeStruct(s.batch_shape if local else s.shape, s.dtype)
    for k, x in enumerate(model.data):
        along = dict(slices.get(k, ()))
        shape = tuple(batch[along[axis]] if axis in along else n for axis, n in enumerate(np.shape(x)))
        data.append(jax.ShapeDtypeStruct(shape, x.dtype))

    def flat(z: Any, data: Any, rows: Any) -> list[Any]:
        readers.append(model.read(z, data, rows))
        return [term.array for term in readers[-1].terms.values()]

    jaxpr, consts, _ = _jaxprs.trace(flat, z, data, rows)
    arguments, plates = [f"argument {k}" for k in range(len(data))], [f"plate {name}" for name in sorted(rows)]
    jaxpr = _jaxprs.inline(jaxpr)
    found, _ = scopes(jaxpr, [*([None] * (len(consts) + len(z))), *arguments, *plates])
    return _Traced(
        jaxpr,
        readers[-1].terms,
        readers[-1].subsamples,
        [{k: s[name] for k, name in enumerate(arguments) if name in s} for s in found],
        [{name for name in rows if f"plate {name}" in s} for s in found],
    )


def _along_plates(
    found: Sequence[Mapping[int, Maps]],
    axes: Sequence[Mapping[str, int]],
    shapes: Sequence[tuple[int, ...]],
    plates: Sequence[Plate],
) -> Slices:
    """Which axes of the arguments run along the plates, read from how the log-densities use them."""
    result: dict[int, set[tuple[int, str]]] = {}
    for scope, own in zip(found, axes, strict=True):
        for k, maps in scope.items():
            for plate in plates:
                along = Along(own.get(plate.name, -1))
                fits = [d for d, n in enumerate(shapes[k]) if n == plate.size and all(m[d] == along for m in maps)]
                result.setdefault(k, set()).update((d, plate.name) for d in fits)
    for scope, own in zip(found, axes, strict=True):
        for k, maps in scope.items():
            for d, name in result[k]:
                if any(m[d] != Along(own.get(name, -1)) for m in maps):
                    text = "an argument with one row per element that is also used outside the plate or across rows"
                    cure = f"{_INDEX}; or compute quantities of the whole data before the model"
                    raise TargetError(message(f"plate {name!r}", text, "rows used only in their own element", cure))
    return {k: tuple(sorted(pairs)) for k, pairs in result.items() if pairs}


def _literals(jaxpr: Any) -> Iterator[str]:
    """The numbers that a program computes with. They betray a model that uses the length of its data."""
    for eqn in jaxpr.eqns:
        # Added integers are how JAX wraps negative indices: there, lengths are harmless.
        every = eqn.primitive.name in ("mul", "div", "convert_element_type")
        for v in eqn.invars:
            if isinstance(v, jex.Literal) and (every or jnp.issubdtype(jnp.result_type(v.val), jnp.inexact)):
                yield str(v.val)
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(param, "eqns"):
                yield from _literals(getattr(param, "jaxpr", param))
