"""Deep exponential families (Ranganath et al. 2015) as targets: local layers per document, global weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array
from numpyro.distributions import constraints

from hivi._errors import TargetError, message
from hivi._factored import factorise
from hivi._locality.base import ALL, Along
from hivi._space import Latents, Plate, Site, make_site
from hivi._target.base import Target
from hivi.topics.base import Corpus
from hivi.topics.batches import PLATE, CorpusSource, Documents
from hivi.topics.kernels import Observations, differences, layer_differences, log_factor, log_likelihood, rates

Latent: TypeAlias = Literal["poisson", "bernoulli", "gamma"]
Weights: TypeAlias = Literal["gamma", "normal"]
BATCH = 180
"""Documents per minibatch."""
BLOCK = 4096
FEATURE_UPDATES, LEAST = 3, 1e-3
UNIFORM = 0.5
"""Share of the background that is spread evenly over the vocabulary: rare words occur in new company."""
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
        level: mean of every latent a priori (rate, probability or mean); the rates of the weights' priors follow from it
            and from the corpus, so that the model expects documents of the length that it meets.
        gamma_shape: shape of Gamma latents; below 1 for sparse ones.
        floor: share of a document that comes from the corpus' own word frequencies, whatever its topics.
        layer_floor: least rate (or mean) of a latent, as a share of `level`.
        scale: standard deviation of Normal weights.
    """

    topic_shape: float = 0.03
    layer_shape: float = 0.3
    level: float = 0.3
    gamma_shape: float = 0.3
    floor: float = 0.01
    layer_floor: float = 0.15
    scale: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < np.inf:
                raise TargetError(
                    message(f"Priors({field.name}=...)", repr(value), "a positive number", "correct the number")
                )


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
        _check(
            "layers",
            self.layers,
            len(self.layers) > 0 and all(isinstance(k, int | np.integer) and k > 0 for k in self.layers),
            "positive integers, from the words up",
        )
        _check("latent", self.latent, self.latent in SUPPORTS, f"one of {list(SUPPORTS)}")
        _check("observations", self.observations, self.observations in ("poisson", "bernoulli"), "poisson or bernoulli")
        _check("weights", self.weights, self.weights in ("gamma", "normal"), "gamma or normal")

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


def _check(name: str, value: Any, fine: bool, expected: str) -> None:
    if not fine:
        raise TargetError(message(f"deep exponential family, {name}={value!r}", "not usable", expected, "correct it"))


def deep_exponential_family(corpus: Corpus, architecture: Architecture | None = None, *, batch: int = BATCH) -> Target:
    """The log-joint of a deep exponential family over a corpus, as a streamed target of the engine.

    With rates `eta_l = floor + w_l z_(l+1)`: x ~ Poisson(eta_0), z_l ~ Poisson(eta_l) (or Bernoulli(sigmoid(eta_l)), or
    Gamma with mean eta_l), the top layer with a fixed rate; w ~ Gamma, or softplus(w) with w ~ Normal. The sites are z1,
    z2, ... of shape (documents, units) and w0, w1, ... of shape (children, parents).

    Args:
        corpus: the documents.
        architecture: layers, kinds and priors; three Poisson layers if None.
        batch: documents per minibatch.

    Returns:
        A target for `hivi.fit`.

    Raises:
        TargetError: an empty corpus or a layer that is no positive number.

    Source: Ranganath, Tang, Charlin & Blei (2015), Deep Exponential Families, eq. 1-4.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.model import Architecture, deep_exponential_family
        >>> corpus = Corpus.from_matrix(np.array([[2, 0, 1], [0, 3, 0]]))
        >>> target = deep_exponential_family(corpus, Architecture(layers=(4, 2)))
        >>> [s.name for s in target.sites]
        ['z1', 'z2', 'w0', 'w1']
    """
    architecture = Architecture() if architecture is None else architecture
    if corpus.n_documents == 0 or corpus.n_tokens == 0:
        raise TargetError(message("corpus", "no words", "at least one document with a word", "check the file"))
    source = CorpusSource(corpus, min(batch, corpus.n_documents), architecture.observations)
    return build_target(architecture, source, corpus_statistics(corpus, architecture.observations))


def corpus_statistics(corpus: Documents, kind: Observations) -> dict[str, np.ndarray]:
    """Smoothed word frequencies and mean document length: what priors and starts are scaled by."""
    totals = np.zeros(corpus.n_words)
    for start in range(0, corpus.n_documents, BLOCK):
        found = corpus.rows(np.arange(start, min(start + BLOCK, corpus.n_documents)))
        weights = None if kind == "bernoulli" else found.data
        totals += np.bincount(found.indices, weights, minlength=corpus.n_words)
    frequencies = (totals + 0.5) / (totals.sum() + 0.5 * corpus.n_words)
    return {
        "frequencies": frequencies.astype(np.float32),
        "length": np.float32(max(totals.sum() / corpus.n_documents, 1e-3)),
    }


def build_target(architecture: Architecture, source: CorpusSource, statistics: dict[str, np.ndarray]) -> Target:
    """The target of documents from a source; `statistics` are those of the training corpus, also for new documents."""
    sites = architecture.sites(source.corpus.n_words, source.plate)
    fixed = {name: jnp.asarray(value) for name, value in statistics.items()}
    data = {"rows": jax.tree.map(lambda a: jnp.asarray(a[0]), source.load(source.blocks()[:1])), "fixed": fixed}
    model = _Model(architecture)
    examples = {s.name: s.example() for s in sites}
    rows = {PLATE: jnp.arange(source.plate.batch)}
    local = dict.fromkeys(model.local_terms(), source.plate.scale)
    factored = factorise(
        model.terms,
        examples,
        data,
        rows,
        scales=local,
        overrides=model.overrides(source.plate.scale),
        declared=model.declared(),
    )
    closed = tuple(w_name(k) for k in range(architecture.depth) if model.closed(k))
    return Target(
        "deep exponential family", sites, factored, data, (source.plate,), source=source, closed=closed, views=model.views(),
        starts=model.starts(fixed), features=model.features,
    )  # fmt: skip


def background(priors: Priors, frequencies: Any, length: Any) -> Any:
    """The rate of each word that no topic explains, (words,)."""
    return priors.floor * length * (UNIFORM / frequencies.shape[0] + (1 - UNIFORM) * frequencies)


@dataclasses.dataclass(frozen=True)
class _Model:
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
            logit = np.log(a.priors.level) - np.log1p(-a.priors.level) if a.priors.level < 1 else 0.0
            eta = jnp.full(value.shape, logit) if top else self.eta(layer, z)
            return {f"{name}.logit": value * eta - jax.nn.softplus(eta)}
        eta = jnp.full(value.shape, a.priors.level) if top else self.eta(layer, z)
        if a.latent == "gamma":
            shape = a.priors.gamma_shape
            log_z = z[name]  # density of log z: the Jacobian is part of it
            return {
                f"{name}.log": shape * (log_z - jnp.log(eta))
                + shape * np.log(shape)
                - gammaln(shape)
                - shape * value / eta
            }
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
            out = {f"{name}.prior": -0.5 * ((w - self._location(layer, data)) / priors.scale) ** 2}
            if a.signed(layer):
                out[f"b{layer}.prior"] = -0.5 * (z[f"b{layer}"] + 2.0) ** 2
            return out
        shape = priors.topic_shape if layer == 0 else priors.layer_shape
        rate = shape / self.mean_weight(layer, data["fixed"])
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
        depth = self.architecture.depth
        names = [
            "x.rate",
            *(f"{w_name(k)}.prior rate" for k in range(depth)),
            *(f"{z_name(k)}.rate" for k in range(1, depth)),
        ]
        return tuple((name, "logmeanexp") for name in names)

    def declared(self) -> dict[str, Any]:
        """Locality of the sparse term: document d touches row d of z1, and all topics."""
        return {"x.log": {"z1": frozenset({(Along(0), ALL)}), "w0": frozenset({(ALL, ALL)})}}

    def overrides(self, scale: float) -> dict[tuple[str, str], Callable[..., Array]]:
        """Closed-form differences of the terms in which a unit meets all its children."""
        a = self.architecture
        if a.latent == "gamma":
            return {}
        out: dict[tuple[str, str], Callable[..., Array]] = {("x.log", "z1"): functools.partial(self._words, scale)}
        for layer in range(1, a.depth):
            part = "logit" if a.latent == "bernoulli" else "log"
            out[f"{z_name(layer)}.{part}", z_name(layer + 1)] = functools.partial(self._children, scale, layer)
        return out

    def _words(self, scale: float, z: Latents, moved: Array, data: Any, rows: Any) -> Array:
        z1, to = self.value(1, z), moved.astype(jnp.result_type(float))
        return scale * differences(
            self.architecture.observations, self.weight(0, z), z1, to, self.floor(data), data["rows"]
        )

    def _children(self, scale: float, layer: int, z: Latents, moved: Array, data: Any, rows: Any) -> Array:
        parents = z[z_name(layer + 1)]
        step = (moved - parents).astype(jnp.result_type(float))
        kind = "bernoulli" if self.architecture.latent == "bernoulli" else "poisson"
        return scale * layer_differences(kind, self.weight(layer, z), self.value(layer, z), self.eta(layer, z), step)
