"""Training that tells how far it is: passes over the corpus and the bound, after every few steps."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from hivi._families.base import AbstractFamily
from hivi._families.hierarchical import Hierarchical
from hivi._families.mean_field import MeanField
from hivi._tree import Key
from hivi.topics.base import Corpus
from hivi.topics.batches import Documents
from hivi.topics.estimator import DeepExponentialFamily
from hivi.topics.fitting import TopicFit, grow, start, train
from hivi.topics.model import Architecture
from hivi.topics.trained import mean_latents, without_documents

Watch = Callable[[float, float], None]
"""Called with (passes done, bound in nats)."""


def fit_watched(model: DeepExponentialFamily, corpus: Corpus, watch: Watch) -> DeepExponentialFamily:
    """`model.fit(corpus)`, watched; a hierarchical family grows half-way between the warm-up and the end, as there."""
    architecture, family, seed = model._architecture(), model._family(), model._seed()
    documents = model._documents(corpus, "fit", reset=True)
    warm, passes = min(model.warm_up, model.passes // 2), model.passes
    grows = isinstance(family, Hierarchical)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    fit = begin(documents, architecture, MeanField() if grows else family, key=key, batch=model.batch_size)
    before = warm + (passes - warm) // 2 if grows else passes
    go_on(fit, before, rng=rng, warm_up=warm, watch=watch)
    if grows:
        history = fit.elbo
        fit = grow(fit, family, key=jax.random.fold_in(key, 1))
        fit.stream.elbo = history.tolist()
        go_on(fit, passes - before, rng=rng, watch=watch)
    model._set(without_documents(fit, documents.n_documents, seed), mean_latents(fit, seed))
    model.bound_history_ = np.nanmean(fit.elbo.reshape(passes, -1), axis=1)
    return model


def begin(
    documents: Documents, architecture: Architecture, family: AbstractFamily, *, key: Key, batch: int
) -> TopicFit:
    """A fit before its first pass; one of the same shape as an earlier one compiles nothing anew."""
    fit = start(documents, architecture, family, key=key, batch=batch)
    return fit


def go_on(
    fit: TopicFit, passes: int, *, rng: np.random.Generator, warm_up: int = 0, watch: Watch | None = None
) -> TopicFit:
    """`fitting.train`, watched."""
    per_pass = len(fit.stream.source.passes(np.random.default_rng(0)))

    def report(done: int, of: int, bound: float) -> None:
        if watch is not None:
            watch(len(fit.stream.elbo) / per_pass, bound)

    return train(fit, passes, rng=rng, warm_up=warm_up, report=report) if passes > 0 else fit
