"""A trained model beside the unigram and other models, on the same held-out tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from hivi._fit.result import Estimate
from hivi.topics.base import Corpus
from hivi.topics.estimator import DeepExponentialFamily
from hivi.topics.heldout import Scores, Split, hold_out_tokens, log_scores, paired_difference
from hivi.topics.peers import evaluate_peer, fit_lda, fit_nmf
from hivi.topics.scoring import hold_out


class Scored(NamedTuple):
    """A model's figures.

    Attributes:
        name: of the model.
        scores: of the held-out tokens.
        nll: negative bound of the observed part, in nats per token; None where a model has none.
        better: nats per held-out token that it gains on the unigram; None for the unigram, or a single document.
        observed: tokens of the observed part.
    """

    name: str
    scores: Scores
    nll: float | None
    better: Estimate | None
    observed: int

    @property
    def perplexity(self) -> float:
        """Of the held-out tokens."""
        return self.scores.perplexity


def score_run(
    model: DeepExponentialFamily,
    corpus: Corpus,
    test: Int64[np.ndarray, " test"],
    train: Int64[np.ndarray, " train"] | None,
    totals: Int64[np.ndarray, " words"],
    *,
    heldout: float = 0.1,
    seed: int = 0,
    passes: int | None = None,
) -> list[Scored]:
    """The model first, the unigram of its training documents second; LDA and NMF where `train` is given.

    Args:
        model: a fitted one.
        corpus: with the test documents.
        test: their numbers.
        train: training documents, if the other models are to be fitted to them.
        totals: how often each word occurs in the training documents.
        heldout: share of the tokens that is held out.
        seed: of the tokens' split (as `make_split`: seed + 1), and of the other models.
        passes: gradient steps per test document; None as `hivi.topics.infer` takes it.
    """
    observed, held = hold_out_tokens(corpus.rows(test), heldout, seed + 1)
    seen = int(observed.sum())
    own = hold_out(model._trained, observed, held, passes=passes)
    frequencies = (totals + 1.0) / (totals.sum() + len(totals))
    unigram = log_scores(np.ones((len(test), 1)), frequencies[None], held)

    def better(scores: Scores) -> Estimate | None:
        return paired_difference(scores, unigram) if len(test) > 1 else None

    kind = f"deep exponential family {'-'.join(map(str, model._trained.architecture.layers))}"
    found = [
        Scored(kind, own.scores, own.nll, better(own.scores), seen),
        Scored("unigram", unigram, None, None, seen),
    ]
    if train is not None:
        split, topics = Split(train, test, observed, held), model._trained.architecture.layers[0]
        for name, peer in (("LDA", fit_lda), ("NMF", fit_nmf)):
            fitted = evaluate_peer(functools.partial(peer, n_topics=topics, seed=seed), corpus, split)
            found.append(Scored(f"{name}, {topics} topics", fitted.scores, None, better(fitted.scores), seen))
    return found
