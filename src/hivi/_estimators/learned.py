"""The learned baseline of neural variational inference (NVIL; Mnih & Gregor 2014): a network of what is known before the draw."""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from hivi._errors import FitError, require_count, require_positive
from hivi._estimators.base import AbstractBaseline, Average, nothing, others
from hivi._families.base import Conditional
from hivi._tree import Key, PyTree

DECAY = 0.95
SMALL = 1e-6


class Predicted(NamedTuple):
    """What the network said before a draw, and its input."""

    value: Array
    lam: Array


class Weights(NamedTuple):
    """Of a network with one hidden layer."""

    first: Array
    bias: Array
    second: Array
    last: Array


class Memory(eqx.Module):
    """The network's weights, its optimiser's moments, and the running mean and size of its input and of its target."""

    network: Weights
    moments: PyTree
    lam: Average
    signal: Average
    square: Average


class Learned(AbstractBaseline):
    """A small network of lambda that predicts every coordinate's signal, trained beside the fit by least squares.

    NVIL's network reads the data point, which decides q there; here lambda decides q, and is random in a hierarchy. Under
    mean-field lambda is no draw, and the network follows the signal like a moving average. With two draws or more, the mean
    of the others' residuals is added. NVIL also divides the signal by its running deviation: not done here, since that
    scales the gradient.

    Args:
        hidden: width of the hidden layer.
        rate: learning rate of its Adam.

    Example:
        >>> import hivi
        >>> hivi.Score(baseline=hivi.Learned(hidden=16)).remembers
        True
    """

    hidden: int = 32
    rate: float = 0.01
    remembers: ClassVar[bool] = True

    def __check_init__(self) -> None:
        require_count("Learned(hidden=...)", self.hidden, "correct the number", 1, FitError)
        require_positive("Learned(rate=...)", self.rate, error=FitError)

    def start(self, conditional: Conditional, key: Key) -> PyTree:
        lam = conditional.lam
        shape = lam.shape[:-1]
        first = jax.random.normal(key, (self.hidden, lam.size)) / math.sqrt(max(1, lam.size))
        # Nothing is known before the first step, so the network says nothing.
        network = Weights(first, jnp.zeros(self.hidden), jnp.zeros((*shape, self.hidden)), jnp.zeros(shape))
        moments = _adam(self.rate).init(network)
        return Memory(network, moments, nothing(lam.shape), nothing(shape), nothing(shape))

    def predict(self, memory: Memory, conditional: Conditional) -> Predicted:
        found = memory.signal.mean() + _deviation(memory) * _answer(memory.network, memory, conditional.lam)
        return Predicted(jax.lax.stop_gradient(found), jax.lax.stop_gradient(conditional.lam))

    def value(self, signal: Array, predicted: Predicted) -> Array:
        return predicted.value + others(signal - predicted.value)

    def learn(self, memory: Memory, signal: Array, predicted: Predicted) -> Memory:
        def flat(x: Array) -> Array:
            return x.reshape(-1, *x.shape[3:])

        targets, inputs = flat(signal), flat(predicted.lam)
        new = Memory(
            memory.network,
            memory.moments,
            memory.lam.after(jnp.mean(inputs, 0), DECAY),
            memory.signal.after(jnp.mean(targets, 0), DECAY),
            memory.square.after(jnp.mean((targets - memory.signal.mean()) ** 2, 0), DECAY),
        )

        def loss(network: Weights) -> Array:
            answers = jax.vmap(lambda x: _answer(network, new, x))(inputs)
            return jnp.mean(((targets - new.signal.mean()) / _deviation(new) - answers) ** 2)

        gradient = jax.grad(loss)(memory.network)
        updates, moments = _adam(self.rate).update(gradient, memory.moments)
        network = optax.apply_updates(memory.network, updates)
        return eqx.tree_at(lambda m: (m.network, m.moments), new, (network, moments))


@functools.lru_cache(maxsize=16)
def _adam(rate: float) -> Any:
    return optax.adam(rate)


def _deviation(memory: Memory) -> Array:
    return jnp.sqrt(memory.square.mean()) + SMALL


def _answer(network: Weights, memory: Memory, lam: Array) -> Array:
    """The network's standardised prediction, of the site's shape."""
    hidden = jnp.tanh(network.first @ jnp.ravel(lam - memory.lam.mean()) + network.bias)
    return network.second @ hidden + network.last
