"""What a deep exponential family is made of: layers, kinds of latents, priors, and its sites."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np
from numpyro.distributions import constraints

from hivi._errors import TargetError, message, nearest, require_positive
from hivi._space import Plate, Site, make_site

PLATE = "documents"
Observations: TypeAlias = Literal["poisson", "bernoulli"]
Latent: TypeAlias = Literal["poisson", "bernoulli", "gamma"]
Weights: TypeAlias = Literal["gamma", "normal"]
SUPPORTS = {
    "poisson": constraints.nonnegative_integer,
    "bernoulli": constraints.boolean,
    "gamma": constraints.positive,
}


@dataclasses.dataclass(frozen=True)
class Priors:
    """Hyperparameters of a deep exponential family; positive numbers.

    Attributes:
        topic_shape: shape of the Gamma prior of the words' weights; below 1 for sparse topics.
        layer_shape: shape of the Gamma prior of the weights between layers.
        level: mean of every latent a priori (rate, probability or mean), below 1 for Bernoulli latents; the rates of the
            weights' priors follow from it and from the corpus, so that the model expects documents of the length that it meets.
        gamma_shape: shape of Gamma latents; below 1 for sparse ones.
        floor: share of a document that comes from the corpus' own word frequencies, whatever its topics.
        layer_floor: least rate (or mean) of a latent, as a share of `level`.
        scale: standard deviation of Normal weights.
        topic_rate: rate of the Gamma prior of the words' weights; None derives it, as said at `level`.
        layer_rate: rate of the Gamma prior of the weights between layers; None derives it.
    """

    topic_shape: float = 0.03
    layer_shape: float = 0.3
    level: float = 0.3
    gamma_shape: float = 0.3
    floor: float = 0.01
    layer_floor: float = 0.15
    scale: float = 1.0
    topic_rate: float | None = None
    layer_rate: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                require_positive(f"Priors({field.name}=...)", value, error=TargetError)


def z_name(layer: int) -> str:
    """Name of a layer of latents; layer 1 is next to the words."""
    return f"z{layer}"


def w_name(layer: int) -> str:
    """Name of the weights from latent layer `layer + 1` down to layer `layer`, or to the words for 0."""
    return f"w{layer}"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a deep exponential family is made of, without its data.

    Attributes:
        layers: number of latents per layer, from the words up.
        latent: "poisson", "bernoulli" (sigmoid belief network) or "gamma" (sparse gamma).
        observations: "poisson" counts, or "bernoulli" presence of a word.
        weights: "gamma", or "normal" through a softplus link.
        priors: hyperparameters.
    """

    layers: tuple[int, ...] = (100, 30, 15)
    latent: Latent = "poisson"
    observations: Observations = "poisson"
    weights: Weights = "gamma"
    priors: Priors = dataclasses.field(default_factory=Priors)

    def __post_init__(self) -> None:
        if not len(self.layers) or not all(isinstance(k, int | np.integer) and k > 0 for k in self.layers):
            found, expected = repr(self.layers), "positive integers, from the words up"
            raise TargetError(message("deep exponential family, layers", found, expected, "correct them"))
        _one_of("latent", self.latent, tuple(SUPPORTS))
        _one_of("observations", self.observations, ("poisson", "bernoulli"))
        _one_of("weights", self.weights, ("gamma", "normal"))
        if self.latent == "bernoulli" and not self.priors.level < 1:
            found, cure = (
                f"{self.priors.level!r} with Bernoulli latents",
                "correct the number, or take latent='poisson'",
            )
            raise TargetError(message("Priors(level=...)", found, "a probability, below 1", cure))

    @property
    def depth(self) -> int:
        """Number of latent layers."""
        return len(self.layers)

    def signed(self, layer: int) -> bool:
        """Whether weights act through a logit, and may have either sign."""
        return layer > 0 and self.latent == "bernoulli"

    def sites(self, n_words: int, plate: Plate) -> tuple[Site, ...]:
        """Latents z1, z2, ... (documents x units) and weights w0, w1, ... (children x parents)."""
        out = []
        for number, units in enumerate(self.layers, 1):
            shape = (plate.size, units)
            out.append(make_site(z_name(number), shape, SUPPORTS[self.latent], ((PLATE, 0),), (plate, 0)))
        below = n_words
        for number, units in enumerate(self.layers):
            normal = self.weights == "normal" or self.signed(number)
            out.append(make_site(w_name(number), (below, units), constraints.real if normal else constraints.positive))
            if self.signed(number):
                out.append(make_site(f"b{number}", (below,), constraints.real))
            below = units
        return tuple(out)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        where, expected = f"deep exponential family, {name}", f"one of {list(known)}"
        raise TargetError(message(where, repr(value), expected, nearest(str(value), known, "choose one of them")))
