"""A NumPyro model run again, with latents at given draws: its observations, their likelihoods, and predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions.distribution import Unit
from numpyro.infer import Predictive

from hivi._compile import compiled
from hivi._space import Latents
from hivi._target.base import AbstractOrigin, Observed
from hivi._target.densities import unwrap
from hivi._tree import Key, PyTree

Trace = dict[str, dict[str, Any]]


class NumPyroOrigin(AbstractOrigin):
    """A NumPyro model and its arguments, but for the arrays that are the target's data.

    Args:
        model: the model.
        rest: the leaves of its arguments, None where the data go.
        places: which leaves are data, in the order of the target's.
        treedef: the structure of (args, kwargs).
    """

    def __init__(self, model: Callable[..., Any], rest: Sequence[Any], places: Sequence[int], treedef: Any) -> None:
        self.model, self.rest, self.places, self.treedef = model, tuple(rest), tuple(places), treedef

    def observed(self, data: PyTree, draws: Latents) -> dict[str, Observed]:
        first = {name: value[0] for name, value in draws.items()}
        out = {}
        for name, site in _observations(self._trace(data, first)).items():
            value = np.asarray(site["value"])
            rank = value.ndim - site["fn"].event_dim
            plates = [(frame.name, rank + frame.dim) for frame in site["cond_indep_stack"]]
            out[name] = Observed(value, tuple((plate, axis) for plate, axis in plates if axis >= 0))
        return out

    def log_likelihood(self, data: PyTree, draws: Latents) -> dict[str, Array]:
        # As numpyro.infer.util.log_likelihood, but compiled, and without the terms of numpyro.factor.
        def one(z: Latents) -> dict[str, Array]:
            found = _observations(self._trace(data, z))
            return {name: jnp.asarray(site["fn"].log_prob(site["value"])) for name, site in found.items()}

        return compiled(lambda z: jax.lax.map(one, z))(draws)

    def predict(self, data: PyTree, draws: Latents, key: Key) -> dict[str, Array]:
        args, kwargs = self._arguments(data)
        free = handlers.uncondition(self.model)  # the arguments still hold the observations
        first = {name: value[0] for name, value in draws.items()}
        trace = self._trace(data, first)
        deterministic = [n for n, site in trace.items() if site["type"] == "deterministic" and jnp.size(site["value"])]
        wanted = [*_observations(trace), *deterministic]
        predictive = Predictive(free, draws, return_sites=wanted, condition_deterministic=True)
        return {n: x for n, x in predictive(key, *args, **kwargs).items() if n in wanted}

    def _arguments(self, data: PyTree) -> tuple[Any, Any]:
        leaves = list(self.rest)
        for place, value in zip(self.places, data, strict=True):
            leaves[place] = value
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        return args, kwargs

    def _trace(self, data: PyTree, z: Latents) -> Trace:
        args, kwargs = self._arguments(data)
        model = handlers.seed(handlers.substitute(self.model, data=z), jax.random.key(0))
        return dict(handlers.trace(model).get_trace(*args, **kwargs))


def _observations(trace: Trace) -> Trace:
    """The observed statements, without the terms of numpyro.factor."""
    return {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample" and site["is_observed"] and not isinstance(unwrap(site["fn"])[0], Unit)
    }
