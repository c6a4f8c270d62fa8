"""Placement on several devices: a mesh axis named "samples" shards draws, one named like a plate shards its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from hivi import _jaxprs
from hivi._errors import FitError, message
from hivi._families.base import AbstractProposal
from hivi._locality.axes import scopes
from hivi._locality.base import Along, Maps
from hivi._space import Site
from hivi._target.base import Target

SAMPLES = "samples"
Split: TypeAlias = tuple[Array, int, str]
"""An array, one of its axes, and the plate that the axis runs along."""


def shard_samples(keys: Array, mesh: Mesh | None) -> Array:
    """Spread an array with a leading samples axis over the mesh axis "samples", if there is one."""
    if mesh is None or SAMPLES not in mesh.axis_names:
        return keys
    return jax.lax.with_sharding_constraint(keys, NamedSharding(mesh, PartitionSpec(SAMPLES)))


def check_mesh(mesh: Mesh, target: Target, samples: int) -> None:
    """Refuse a mesh whose axes do not divide what they shard.

    Raises:
        FitError: an axis that is neither "samples" nor a plate, or a size that is not a multiple of it.
    """
    sizes = plate_sizes(target)
    for name in mesh.axis_names:
        count = mesh.shape[name]
        if name != SAMPLES and name not in sizes:
            raise FitError(
                message(
                    f"mesh axis {name!r}", "no such plate", f'"samples" or one of {sorted(sizes)}', "rename the axis"
                )
            )
        size = samples if name == SAMPLES else sizes[name]
        if size % count:
            raise FitError(
                message(
                    f"mesh axis {name!r}",
                    f"{size} rows on {count} devices",
                    "a multiple of the number of devices",
                    "change `samples`, or pad the data and mask the padding",
                )
            )


def plate_sizes(target: Target) -> dict[str, int]:
    """Plate -> number of rows, from the sites and the subsampled plates."""
    sizes = {p.name: p.size for p in target.plates}
    for s in target.sites:
        sizes |= {name: s.shape[axis] for name, axis in _plates(s)}
    return sizes


def _plates(site: Site) -> list[tuple[str, int]]:
    """The plates of a site that are axes of its shape, which are counted from the first."""
    rank = len(site.shape)
    return [(name, axis % rank) for name, axis in site.plates if -rank <= axis < rank]


def distribute(proposal: AbstractProposal, target: Target, mesh: Mesh) -> tuple[AbstractProposal, Target]:
    """Put data and per-datum parameters on the devices of their plate, everything else on all.

    Plates are told apart by name, never by length. A parameter runs along the plates of its site, or along the plate whose
    rows a minibatch takes from it; an array that the model reads runs along a plate where every element of some factor
    reads its own row of it. An array whose rows cannot be followed lies on all devices; the compiler keeps every result the
    same wherever an array lies.
    """
    sizes = {name: size for name, size in plate_sizes(target).items() if name in mesh.axis_names}
    split = [*_parameter_axes(proposal, target, sizes), *_data_axes(target, sizes)] if sizes else []

    def place(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        spec: list[str | None] = [None] * x.ndim
        for array, axis, plate in split:
            if array is x and spec[axis] is None and plate not in spec:
                spec[axis] = plate
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, proposal), jax.tree.map(place, target)


def _parameter_axes(proposal: AbstractProposal, target: Target, sizes: Mapping[str, int]) -> Iterator[Split]:
    """Parameters that belong to a site of a plate, and those of which a minibatch takes rows."""
    lam = proposal.parameters()
    for s in target.sites:
        for name, axis in _plates(s):
            if s.name in lam and name in sizes:
                yield lam[s.name], axis, name
    every = {p.name: jax.ShapeDtypeStruct((p.size,), jnp.int32) for p in target.plates}
    arrays = eqx.filter(proposal, eqx.is_array)
    for name in every.keys() & sizes.keys():
        longer = every | {name: jax.ShapeDtypeStruct((sizes[name] + 1,), jnp.int32)}
        taken = eqx.filter_eval_shape(proposal.gather, longer)
        before, after = jax.tree.leaves(arrays), jax.tree.leaves(eqx.filter(taken, _shaped))
        if len(before) != len(after):
            continue  # an inference network: what it gives to a row is nobody's parameter
        for x, y in zip(before, after, strict=True):
            yield from ((x, axis, name) for axis, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m != n)


def _shaped(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _data_axes(target: Target, sizes: Mapping[str, int]) -> Iterator[Split]:
    """Arrays of the model, of which each element of a factor along a plate reads its own row."""
    program = target.factored.program
    inputs = [*target.factored.consts, *([None] * len(program.sites)), *jax.tree.leaves(target.data)]
    seeds = [None if x is None else str(k) for k, x in enumerate(inputs)]
    rows = sorted(p.name for p in target.plates)
    first = len(inputs)
    # Row numbers 0, 1, ... stand for those of a minibatch: element i of a factor then reads row i.
    batches = {p.name: p.batch for p in target.plates}
    fixed = _jaxprs.rebuild(program.jaxpr, invars=program.jaxpr.invars[:first], constvars=program.jaxpr.invars[first:])
    reads, _ = scopes(fixed, seeds, [np.arange(batches[name], dtype=np.int32) for name in rows])
    along, _ = scopes(program.jaxpr, [*([None] * first), *rows])
    for factor, read, own in zip(program.factors, reads, along, strict=True):
        plates = {(name, _axis(own[name], 0)) for name in rows if name in own}
        plates |= {(name, _axis(factor.maps(s.name), axis)) for s in target.sites for name, axis in _plates(s)}
        for k, maps in read.items():
            x = inputs[int(k)]
            for axis, (name, size) in itertools.product(range(jnp.ndim(x)), sizes.items()):
                found = _axis(maps, axis)
                if found is not None and (name, found) in plates and x.shape[axis] == size:
                    yield x, axis, name


def _axis(maps: Maps, axis: int) -> int | None:
    """The axis of a factor whose element i reads index i on this axis of its operand, and nothing else there."""
    entries = {m[axis] for m in maps}
    entry = entries.pop() if len(entries) == 1 else None
    return entry.axis if isinstance(entry, Along) and entry == Along(entry.axis) else None
