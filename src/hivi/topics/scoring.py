"""A deep exponential family under the held-out protocol, and how much its topics are used."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from hivi.topics.base import as_counts
from hivi.topics.batches import Counts
from hivi.topics.fitting import TopicFit
from hivi.topics.heldout import Scores, log_scores
from hivi.topics.inference import Inference
from hivi.topics.show import unit_shares
from hivi.topics.trained import Trained, infer


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


def hold_out(trained: Trained, observed: Any, heldout: Any, *, passes: int | None = None, samples: int = 16) -> HeldOut:
    """Document completion: latents from the observed part, p(w|d) ∝ Σ_k E[w0_vk] E[z1_dk] + floor_v for the rest.

    Args:
        trained: the model.
        observed: sparse counts of the test documents that it may see.
        heldout: sparse counts that it is scored by.
        passes: gradient steps per document; None as `hivi.topics.infer` takes it.
        samples: draws per document for the bound.
    """
    seen = as_counts(observed)
    inference = infer(trained, Counts(seen), passes=passes, samples=samples)
    mixture, topics = predictive(trained.fit, inference)
    each: Any = seen.sum(axis=1) if trained.architecture.observations == "poisson" else np.diff(seen.indptr)
    return HeldOut(inference, log_scores(mixture, topics, heldout), np.asarray(each).astype(np.int64))


def predictive(
    fit: TopicFit, inference: Inference
) -> tuple[Float64[np.ndarray, "documents components"], Float64[np.ndarray, "components words"]]:
    """The mixture of each document, and the topics: those of the model, and its floor as one more, which all have once."""
    z = np.asarray(inference.layers[0], np.float64)
    mixture = np.concatenate([z, np.ones((len(z), 1))], 1)
    return mixture, np.concatenate([fit.weights(0).T, fit.floor()[None]]).astype(np.float64)


def shares(fit: TopicFit, means: list[Float64[np.ndarray, " units"]]) -> list[Float64[np.ndarray, " units"]]:
    """Share of each unit in the tokens that its layer makes; see `show.unit_shares`."""
    return unit_shares([fit.weights(layer) for layer in range(fit.architecture.depth)], means)
