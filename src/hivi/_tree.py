"""Small PyTree helpers and type aliases."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

PyTree: TypeAlias = Any
Key: TypeAlias = PRNGKeyArray
LARGE, ROWS = 2**16, 64


@jax.custom_jvp
def value_zero(x: Array) -> Array:
    """A quantity with value 0 and the gradient of `x`.

    As `x - stop_gradient(x)`, but the compiler sees that it is zero, and computes nothing for it.
    """
    # A choice that is never made: a plain zero would not be mapped where x is, and JAX then mistakes its gradient's shape.
    return jax.lax.select(jnp.array(False), x, jnp.zeros_like(x))


@value_zero.defjvp
def _value_zero(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return value_zero(primals[0]), tangents[0]


def held(tree: PyTree) -> PyTree:
    """The same values without a gradient; what is not an array of numbers stays as it is."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def sum_all(x: Array) -> Array:
    """The sum of all elements: of a large array by blocks of rows, which the CPU adds up while it computes the elements.

    A plain sum is, on CPU, a pass of its own over an array that was written first: three times the work of a cheap element.
    """
    if x.size < LARGE or x.shape[0] < ROWS:
        return jnp.sum(x)
    # The barrier keeps a sum of sums from becoming one pass for each of them; it is not for the gradient, which is a constant.
    values = jax.lax.optimization_barrier(jax.lax.stop_gradient(x))
    rows = jnp.pad(values, [(0, -x.shape[0] % ROWS), *[(0, 0)] * (x.ndim - 1)])
    blocks = jax.lax.optimization_barrier(jnp.sum(rows.reshape(ROWS, -1, *x.shape[1:]), 0))
    return jnp.sum(blocks) + jnp.sum(value_zero(x))


def finite(tree: PyTree) -> Array:
    """Whether every floating-point leaf is finite; a boolean scalar."""
    leaves = [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    checks = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def select(keep: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the boolean scalar `keep` holds, else `old`, leaf by leaf; keys included."""
    return jax.tree.map(lambda a, b: jax.lax.select(keep, a, b) if eqx.is_array(a) else a, new, old)


def structure(tree: PyTree) -> Hashable:
    """All of a tree but the values of its arrays, whose shapes and types count; equal for trees that are traced alike."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((x.shape, x.dtype) if eqx.is_array(x) else x for x in leaves)


def taken(x: Array, numbers: Array | None, axis: int = 0) -> Array:
    """Some rows of an array; all of them where no numbers are given."""
    return x if numbers is None else jnp.take(x, numbers, axis=axis)
