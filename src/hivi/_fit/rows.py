"""What a streamed fit keeps per row of its plate: variational parameters and the optimiser's moments, as one flat record."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._tree import PyTree

IN_MEMORY = 64 * 2**20
"""Bytes of records that stay in memory; more go to a file."""


class Records:
    """Flat records of float32, one per row; a row that was never written reads as the template.

    Beyond `IN_MEMORY` they live in a temporary file without a name, read and written row by row.
    """

    def __init__(self, rows: int, template: np.ndarray):
        self.rows, self.width = rows, len(template)
        self.template = template.astype(np.float32)
        self.seen = np.zeros(rows, bool)
        self._file: Any = None
        self._table: np.ndarray | None = None
        if rows * self.width * 4 <= IN_MEMORY:
            self._table = np.tile(self.template, (rows, 1))
        else:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the records
            weakref.finalize(self, self._file.close)

    def read(self, ids: np.ndarray) -> Float[np.ndarray, "ids width"]:
        """Records of rows; -1 reads as the template."""
        out = np.tile(self.template, (len(ids), 1))
        real = np.flatnonzero(ids >= 0)
        if self._table is not None:
            out[real] = self._table[ids[real]]
            return out
        size = 4 * self.width
        for k in real[self.seen[ids[real]]]:
            out[k] = np.frombuffer(os.pread(self._file.fileno(), size, int(ids[k]) * size), np.float32)
        return out

    def write(self, ids: np.ndarray, values: Float[np.ndarray, "ids width"]) -> None:
        """Replace records; rows numbered -1 are dropped."""
        real = np.flatnonzero(ids >= 0)
        self.seen[ids[real]] = True
        if self._table is not None:
            self._table[ids[real]] = values[real]
            return
        for k in real:
            os.pwrite(self._file.fileno(), values[k].astype(np.float32).tobytes(), int(ids[k]) * 4 * self.width)


class Layout(eqx.Module):
    """How a tree with a leading axis over rows lies in flat records."""

    treedef: Any = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    dtypes: tuple[Any, ...] = eqx.field(static=True)

    def pack(self, tree: PyTree) -> Float[Array, "rows width"]:
        """Tree -> records."""
        leaves = jax.tree.leaves(tree)
        if not leaves:
            return jnp.zeros((0, 0))
        return jnp.concatenate([x.reshape(x.shape[0], -1).astype(jnp.float32) for x in leaves], 1)

    def unpack(self, records: Float[Array, "rows width"]) -> PyTree:
        """Records -> tree."""
        out, start = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            stop = start + int(np.prod(shape))
            out.append(jnp.asarray(records[:, start:stop]).reshape(-1, *shape).astype(dtype))
            start = stop
        return jax.tree.unflatten(self.treedef, out)


def layout_of(tree: PyTree) -> Layout:
    """The layout of a tree whose arrays all have a leading axis over rows."""
    leaves, treedef = jax.tree.flatten(tree)
    return Layout(treedef, tuple(x.shape[1:] for x in leaves), tuple(x.dtype for x in leaves))
