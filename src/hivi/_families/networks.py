"""What families with learned networks share: the default network, its checks, and data that no optimiser moves."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hivi._errors import FamilyError, message
from hivi._tree import Key


class Kept(eqx.Module):
    """An array inside a proposal that is data and no parameter: as bits, which no optimiser moves or decays."""

    bits: Int[Array, "*shape"]

    @classmethod
    def of(cls, value: Array) -> Kept:
        """The value in the default float type."""
        real = jnp.asarray(value, jnp.result_type(float))
        return cls(jax.lax.bitcast_convert_type(real, jnp.int64 if real.dtype.itemsize == 8 else jnp.int32))

    @property
    def value(self) -> Array:
        """The array."""
        return jax.lax.bitcast_convert_type(self.bits, jnp.float64 if self.bits.dtype.itemsize == 8 else jnp.float32)


def perceptron(inputs: int, outputs: int, hidden: int, key: Key) -> eqx.nn.MLP:
    """An MLP with two hidden layers whose output starts at zero."""
    network = eqx.nn.MLP(inputs, outputs, hidden, 2, activation=jax.nn.gelu, key=key)
    last: Any = network.layers[-1]
    zeros = jnp.zeros_like(last.weight), jnp.zeros_like(last.bias)
    return eqx.tree_at(lambda n: (n.layers[-1].weight, n.layers[-1].bias), network, zeros)


def check_width(where: str, network: Any, shape: tuple[int, ...], width: int) -> None:
    """Refuse a network that does not map an input of this shape to a vector of this width.

    Raises:
        FamilyError: naming both.
    """
    try:
        found = eqx.filter_eval_shape(network, jnp.zeros(shape)).shape
    except (TypeError, ValueError) as error:
        found = f"an error at an input of shape {shape} ({str(error).splitlines()[0]})"
    if found != (width,):
        cure = f"end it with a layer of {width} outputs; its input has shape {shape}"
        raise FamilyError(message(where, f"output {found}", f"a vector of {width} parameters", cure))
