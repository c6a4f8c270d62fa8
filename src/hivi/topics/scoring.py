"""A deep exponential family under the held-out protocol, and how much its topics are used."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float64, Int64

from hivi._tree import Key
from hivi.topics.batches import Counts
from hivi.topics.fitting import LOCAL_PASSES, Inference, TopicFit, infer
from hivi.topics.fitting import read as read_stream
from hivi.topics.fitting import strategies as choose
from hivi.topics.heldout import Scores, log_scores
from hivi.topics.show import unit_shares


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """What a model says of test documents, having seen a part of each.

    Attributes:
        inference: their latents, given the observed part.
        scores: of the held-out tokens.
        observed: tokens of the observed part, or different words for Bernoulli observations.
    """

    inference: Inference
    scores: Scores
    observed: Int64[np.ndarray, " documents"]

    @property
    def perplexity(self) -> float:
        """Of the held-out tokens, over the whole vocabulary."""
        return self.scores.perplexity

    @property
    def bounds(self) -> Float64[np.ndarray, " documents"]:
        """Bound on log p(observed part) of each document, in nats."""
        return np.asarray(self.inference.bound, np.float64)

    @property
    def nll(self) -> float:
        """Negative log-likelihood of the observed part by its bound: nats per token."""
        return float(-self.bounds.sum() / max(self.observed.sum(), 1))


def hold_out(
    fit: TopicFit, observed: Any, heldout: Any, *, key: Key, passes: int = LOCAL_PASSES, samples: int = 16
) -> HeldOut:
    """Document completion: latents from the observed part, p(w|d) ∝ Σ_k E[w0_vk] E[z1_dk] + floor_v for the rest.

    Args:
        fit: the trained model.
        observed: sparse counts of the test documents that it may see.
        heldout: sparse counts that it is scored by.
        key: a JAX random key.
        passes: gradient steps per document.
        samples: draws per document for the bound.
    """
    seen = sp.csr_array(observed)
    inference = infer(fit, Counts(seen), key=key, passes=passes, samples=samples)
    mixture, topics = predictive(fit, inference)
    each: Any = seen.sum(axis=1) if fit.architecture.observations == "poisson" else np.diff(seen.indptr)
    return HeldOut(inference, log_scores(mixture, topics, heldout), np.asarray(each).astype(np.int64))


def predictive(
    fit: TopicFit, inference: Inference
) -> tuple[Float64[np.ndarray, "documents components"], Float64[np.ndarray, "components words"]]:
    """The mixture of each document, and the topics: those of the model, and its floor as one more, which all have once."""
    z = np.asarray(inference.layers[0], np.float64)
    mixture = np.concatenate([z, np.ones((len(z), 1))], 1)
    return mixture, np.concatenate([fit.weights(0).T, fit.floor()[None]]).astype(np.float64)


def mean_latents(fit: TopicFit, *, key: Key, samples: int = 4) -> list[Float64[np.ndarray, " units"]]:
    """E[z] of each unit, on average over the training documents; one array per layer.

    Args:
        fit: a model as training left it, with its documents' parameters.
        key: a JAX random key.
        samples: draws per document, where posterior means have no closed form.
    """
    stream = fit.stream
    chosen = choose(stream.target, stream.proposal(stream.source.blocks()[0]))
    found = read_stream(stream, fit.architecture, chosen, key=key, samples=samples)
    return [np.asarray(z, np.float64).mean(axis=0) for z in found.layers]


def shares(fit: TopicFit, means: list[Float64[np.ndarray, " units"]]) -> list[Float64[np.ndarray, " units"]]:
    """Share of each unit in the tokens that its layer makes; see `show.unit_shares`."""
    return unit_shares([fit.weights(layer) for layer in range(fit.architecture.depth)], means)
