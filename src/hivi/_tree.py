"""Small PyTree helpers and type aliases."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxlib.version
from jaxtyping import Array, PRNGKeyArray

PyTree: TypeAlias = Any
Key: TypeAlias = PRNGKeyArray

# jaxlib 0.10.2 on CPU fuses large sums wrongly (jax-ml/jax#39103): densities of 20,000 draws came out wrong by 20 nats.
_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""} if jaxlib.version.__version__ == "0.10.2" else {}
compiled: Any = functools.partial(eqx.filter_jit, compiler_options=_OPTIONS) if _OPTIONS else eqx.filter_jit
"""`eqx.filter_jit` without the compiler's known faults; everything that hivi compiles goes through it."""


def value_zero(x: Array) -> Array:
    """A quantity with value 0 and the gradient of `x`."""
    return x - jax.lax.stop_gradient(x)


def held(tree: PyTree) -> PyTree:
    """The same values without a gradient; what is not an array of numbers stays as it is."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def finite(tree: PyTree) -> Array:
    """Whether every floating-point leaf is finite; a boolean scalar."""
    leaves = [x for x in jax.tree.leaves(tree) if eqx.is_inexact_array(x)]
    checks = [jnp.all(jnp.isfinite(x)) for x in leaves]
    return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def select(keep: Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the boolean scalar `keep` holds, else `old`, leaf by leaf; keys included."""
    return jax.tree.map(lambda a, b: jax.lax.select(keep, a, b) if eqx.is_array(a) else a, new, old)
