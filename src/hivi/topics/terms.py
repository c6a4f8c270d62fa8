"""The terms of a deep exponential family's log-joint, and what the engine is told about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array
from numpyro.distributions import Normal

from hivi._locality.base import ALL, Along
from hivi._space import Latents
from hivi.topics.architecture import Architecture, Observations, Priors, w_name, z_name
from hivi.topics.kernels import differences, layer_differences, log_factor, log_likelihood, rates

FEATURE_UPDATES, LEAST = 3, 1e-3
UNIFORM = 0.5
"""Share of the background that is spread evenly over the vocabulary: rare words occur in new company."""


def background(priors: Priors, frequencies: Any, length: Any) -> Any:
    """The rate of each word that no topic explains, (words,)."""
    return priors.floor * length * (UNIFORM / frequencies.shape[0] + (1 - UNIFORM) * frequencies)


@dataclasses.dataclass(frozen=True)
class Terms:
    """The terms of log p, and what the engine is told about them."""

    architecture: Architecture

    def closed(self, layer: int) -> bool:
        """Whether the weights below latent layer `layer + 1` have closed-form expectations: a Poisson child, Gamma weights."""
        a = self.architecture
        return a.weights == "gamma" and (layer == 0 or a.latent == "poisson")

    def weight(self, layer: int, z: Latents) -> Array:
        """Weights as they act: positive, or signed into a logit."""
        w = z[w_name(layer)]
        if self.architecture.signed(layer):
            return w
        return jnp.exp(w) if self.architecture.weights == "gamma" else jax.nn.softplus(w)

    def value(self, layer: int, z: Latents) -> Array:
        """Latents as floats in the model's own space."""
        v = z[z_name(layer)]
        return jnp.exp(v) if self.architecture.latent == "gamma" else v.astype(jnp.result_type(float))

    def floor(self, data: Any) -> Array:
        return background(self.architecture.priors, data["fixed"]["frequencies"], data["fixed"]["length"])

    def eta(self, layer: int, z: Latents) -> Array:
        """Natural or mean parameter of latent layer `layer` given the one above, (documents, units)."""
        priors = self.architecture.priors
        through = self.value(layer + 1, z) @ self.weight(layer, z).T
        return through + (z[f"b{layer}"] if self.architecture.signed(layer) else priors.layer_floor * priors.level)

    def terms(self, z: Latents, data: Any, rows: Any) -> dict[str, Array]:
        a, batch = self.architecture, data["rows"]
        w0, z1, floor = self.weight(0, z), self.value(1, z), self.floor(data)
        out = {
            "x.log": log_likelihood(a.observations, rates(w0, z1, floor, batch), batch),
            "x.rate": -z1 * jnp.sum(w0, 0),
            "x.floor": -jnp.full(z1.shape[0], jnp.sum(floor)),
        }
        for layer in range(1, a.depth + 1):
            out |= self._latent_terms(layer, z)
        for layer in range(a.depth):
            out |= self._weight_terms(layer, z, data)
        return out

    def _latent_terms(self, layer: int, z: Latents) -> dict[str, Array]:
        a, name, value = self.architecture, z_name(layer), self.value(layer, z)
        top = layer == a.depth
        if a.latent == "bernoulli":
            logit = np.log(a.priors.level) - np.log1p(-a.priors.level)
            eta = jnp.full(value.shape, logit) if top else self.eta(layer, z)
            return {f"{name}.logit": value * eta - jax.nn.softplus(eta)}
        eta = jnp.full(value.shape, a.priors.level) if top else self.eta(layer, z)
        if a.latent == "gamma":
            # Density of log z: the Jacobian is part of it.
            shape = a.priors.gamma_shape
            density = shape * (z[name] - jnp.log(eta)) + shape * np.log(shape) - gammaln(shape)
            return {f"{name}.log": density, f"{name}.rate": -shape * value / eta}
        out = {f"{name}.log": value * jnp.log(eta), f"{name}.factorial": -gammaln(value + 1.0)}
        if top:
            return out | {f"{name}.rate": -eta}
        parents = self.value(layer + 1, z) * jnp.sum(self.weight(layer, z), 0)
        return out | {
            f"{name}.rate": -parents,
            f"{name}.floor": jnp.full(value.shape, -a.priors.layer_floor * a.priors.level),
        }

    def _weight_terms(self, layer: int, z: Latents, data: Any) -> dict[str, Array]:
        a, name = self.architecture, w_name(layer)
        w, priors = z[name], a.priors
        if a.weights == "normal" or a.signed(layer):
            out = {f"{name}.prior": Normal(self._location(layer, data), priors.scale).log_prob(w)}
            if a.signed(layer):
                out[f"b{layer}.prior"] = Normal(-2.0, 1.0).log_prob(z[f"b{layer}"])
            return out
        words = layer == 0
        shape, given = (priors.topic_shape, priors.topic_rate) if words else (priors.layer_shape, priors.layer_rate)
        rate = shape / self.mean_weight(layer, data["fixed"]) if given is None else jnp.asarray(given)
        # Gamma density of e^w, in w: the Jacobian e^w is part of it.
        return {
            f"{name}.prior": shape * w + shape * jnp.log(rate) - gammaln(shape),
            f"{name}.prior rate": -rate * jnp.exp(w),
        }

    def _location(self, layer: int, data: Any) -> Array | float:
        if self.architecture.signed(layer):
            return 0.0
        mean = self.mean_weight(layer, data["fixed"])
        return mean + jnp.log(-jnp.expm1(-mean))  # softplus(location) = mean

    def mean_weight(self, layer: int, fixed: dict[str, Array]) -> Array:
        """Mean of a layer's weights at which the layer below has the mean that it should: observed, or `level`."""
        a = self.architecture
        units = a.layers[layer]
        if layer == 0:
            return (
                (1 - min(a.priors.floor, 0.5))
                * fixed["length"]
                / (a.priors.level * units * fixed["frequencies"].shape[0])
            )
        return jnp.asarray((1 - min(a.priors.layer_floor, 0.5)) / units)

    def starts(self, fixed: dict[str, Array]) -> dict[str, Array]:
        """Site -> mean at which a fit starts, one value per coordinate of a global site, one per unit of a local one."""
        a = self.architecture
        rng = np.random.default_rng(0)
        out = {z_name(k + 1): jnp.full(units, a.priors.level) for k, units in enumerate(a.layers)}
        below = fixed["frequencies"].shape[0]
        for layer, units in enumerate(a.layers):
            if a.signed(layer):
                out[f"b{layer}"] = jnp.full(below, -1.0)
                out[w_name(layer)] = jnp.asarray(rng.normal(0, 0.5, (below, units)), jnp.float32)
            else:
                noise = (
                    rng.gamma(1.0, 1.0, (below, units))
                    if layer == 0
                    else rng.gamma(0.3, 1 / 0.3, (below, units)) + 0.01
                )
                base = below * fixed["frequencies"][:, None] if layer == 0 else 1.0
                out[w_name(layer)] = self.mean_weight(layer, fixed) * base * jnp.asarray(noise, jnp.float32)
            below = units
        return out

    def features(self, weights: Latents, data: Any) -> Array:
        """Of each document: log of the first layer's values by a few multiplicative updates (Lee & Seung 2001), log length."""
        w0, batch, floor = self.weight(0, weights), data["rows"], self.floor(data)
        total, level = jnp.sum(w0, 0), self.architecture.priors.level
        documents = batch.constant.shape[0]
        z = jnp.full((documents, w0.shape[1]), level)
        for _ in range(FEATURE_UPDATES):
            rate, back = jax.vjp(lambda v: rates(w0, v, floor, batch), z)
            residual = batch.counts * jax.grad(lambda r: jnp.sum(log_factor(self.architecture.observations, r)))(rate)
            z = z * back(residual)[0] / total
        length = jnp.zeros(documents + 1).at[batch.document].add(jnp.sum(batch.counts, -1))[:-1]
        found = jnp.concatenate([jnp.log(z + LEAST), jnp.log1p(length)[:, None]], 1)
        return jax.lax.stop_gradient(found)

    def local_terms(self) -> list[str]:
        """Names of the terms with one element, or row, per document."""
        names = ["x.log", "x.rate", "x.floor"]
        for layer in range(1, self.architecture.depth + 1):
            names += [f"{z_name(layer)}.{part}" for part in ("log", "rate", "floor", "factorial", "logit")]
        return names

    def views(self) -> tuple[tuple[str, str], ...]:
        """Terms that are linear in e^w; the others are linear or convex in w."""
        depth, gamma = self.architecture.depth, self.architecture.latent == "gamma"
        names = ["x.rate", *(f"{w_name(k)}.prior rate" for k in range(depth))]
        names += [] if gamma else [f"{z_name(k)}.rate" for k in range(1, depth)]
        own = [(f"{z_name(k)}.rate", f"logmeanexp {z_name(k)}") for k in range(1, depth + 1)] if gamma else []
        return (*((name, "logmeanexp") for name in names), *own)

    def averaged(self) -> tuple[str, ...]:
        """Latents e^w whose rates are linear in them: a LogNormal's tail makes draws of the rate useless."""
        names = tuple(z_name(k) for k in range(1, self.architecture.depth + 1))
        return names if self.architecture.latent == "gamma" else ()

    def declared(self) -> dict[str, Any]:
        """Locality of the sparse term: document d touches row d of z1, and all topics."""
        return {"x.log": {"z1": frozenset({(Along(0), ALL)}), "w0": frozenset({(ALL, ALL)})}}

    def overrides(self, scale: float) -> dict[tuple[str, str], Callable[..., Array]]:
        """Closed-form differences of the terms in which a unit meets all its children."""
        a = self.architecture
        if a.latent == "gamma":
            return {}
        out: dict[tuple[str, str], Callable[..., Array]] = {("x.log", "z1"): Words(self, scale)}
        for layer in range(1, a.depth):
            part = "logit" if a.latent == "bernoulli" else "log"
            out[f"{z_name(layer)}.{part}", z_name(layer + 1)] = Children(self, scale, layer)
        return out


@dataclasses.dataclass(frozen=True)
class Words:
    """Differences of the words' term; equal ones are equal, so that equal targets share their compiled programs."""

    model: Terms
    scale: float

    def __call__(self, z: Latents, moved: Array, data: Any, rows: Any) -> Array:
        z1, to, model = self.model.value(1, z), moved.astype(jnp.result_type(float)), self.model
        kind, unit = model.architecture.observations, model.architecture.latent == "poisson"
        return self.scale * differences(kind, model.weight(0, z), z1, to, model.floor(data), data["rows"], unit)


@dataclasses.dataclass(frozen=True)
class Children:
    """Differences of a layer's term when its parents move."""

    model: Terms
    scale: float
    layer: int

    def __call__(self, z: Latents, moved: Array, data: Any, rows: Any) -> Array:
        model, layer = self.model, self.layer
        step = (moved - z[z_name(layer + 1)]).astype(jnp.result_type(float))
        kind: Observations = "bernoulli" if model.architecture.latent == "bernoulli" else "poisson"
        return self.scale * layer_differences(
            kind, model.weight(layer, z), model.value(layer, z), model.eta(layer, z), step
        )


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the documents for inference networks, (documents, topics + 1)."""

    model: Terms

    def __call__(self, weights: Latents, data: Any) -> Array:
        return self.model.features(weights, data)
