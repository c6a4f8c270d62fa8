"""Placement on several devices: a mesh axis named "samples" shards draws, one named like a plate shards its rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from hivi._errors import FitError, message
from hivi._families.base import AbstractProposal
from hivi._target.base import Target
from hivi._tree import PyTree

SAMPLES = "samples"


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
        sizes |= {name: s.shape[axis] for name, axis in s.plates if axis < len(s.shape)}
    return sizes


def distribute(proposal: AbstractProposal, target: Target, mesh: Mesh) -> tuple[AbstractProposal, Target]:
    """Put data and per-datum parameters on the devices of their plate, everything else on all.

    Arrays whose leading axis has the length of a sharded plate are split along it; the compiler keeps every result the
    same wherever an array lies.
    """
    sizes = plate_sizes(target)
    lengths = {sizes[n]: n for n in mesh.axis_names if n != SAMPLES}

    def put(tree: PyTree, split: Mapping[int, str]) -> PyTree:
        def place(x: Any) -> Any:
            if not eqx.is_array(x):
                return x
            axis = split.get(x.shape[0]) if x.ndim else None
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(axis) if axis else PartitionSpec()))

        return jax.tree.map(place, tree)

    return put(proposal, lengths), put(target, lengths)
