"""Would a hierarchy help documents of a topic model? The second-order test at their mean-field optimum."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Array

from hivi._bounds import Elbo
from hivi._curvature import Curvature, curvature
from hivi._errors import FitError, message
from hivi._estimators.expectation import Expectation
from hivi._families.mean_field import MeanField
from hivi._fit.result import Fit
from hivi._fit.stream import Schedule
from hivi._fit.streaming import advance
from hivi._space import Latents
from hivi._target.base import Target
from hivi._tree import Key
from hivi.topics.base import as_counts
from hivi.topics.batches import Counts
from hivi.topics.fitting import strategies
from hivi.topics.inference import opened
from hivi.topics.trained import Trained

PASSES = 100
"""Gradient steps per document at each learning rate, with so many draws: the test is of an optimum."""
RATES, DRAWS = (0.3, 0.1, 0.03, 0.01), 8


def document_curvature(
    trained: Trained, counts: Any, *, key: Key, samples: int = 2048, top: int = 3, passes: int = PASSES
) -> Curvature:
    """The second-order test of `hivi._curvature.curvature`, document by document, with the weights as they were learnt.

    Weights whose expectations are in closed form stay in closed form, as in the fit: the test is of the bound that was
    optimised.

    Args:
        trained: a mean-field model with Poisson or Bernoulli latents.
        counts: sparse counts of some documents, 64 or so: memory grows with documents times samples.
        key: a JAX random key.
        samples: draws.
        top: directions per document.
        passes: gradient steps per document at each learning rate, before the test.

    Raises:
        FitError: Gamma latents, or another family than mean-field.
    """
    a = trained.architecture
    if a.latent == "gamma":
        found, cure = "Gamma latents", "test a model with latent='poisson' or 'bernoulli'"
        raise FitError(message("the curvature of documents", found, "discrete latents", cure))
    if not isinstance(trained.family, MeanField):
        found, cure = f"a model trained with {trained.family}", "train with --family mean-field"
        raise FitError(message("the curvature of documents", found, "mean-field", cure))
    rows = as_counts(counts)
    stream = opened(trained.fit, Counts(rows), rows.shape[0], key=key)
    target, (ids,) = stream.target, stream.source.blocks()
    chosen = strategies(target, stream.proposal(ids))
    for rate in RATES:
        schedule = Schedule(rows=rate, shared=False)
        rng = np.random.default_rng(0)
        advance(stream, passes, strategies=chosen, schedule=schedule, samples=DRAWS, rng=rng)
    proposal = stream.proposal(ids)
    closed = tuple(n for n, s in chosen.items() if isinstance(s, Expectation))
    local = proposal.expecting(closed) if closed else proposal
    history = {name: np.zeros(0) for name in ("step", "elbo", "stderr")}
    fit = Fit(
        local, target.sites, Elbo(), trained.family, True, history, 0.0, "documents of a topic model",
        target=at_views(target, local.views()),
    )  # fmt: skip
    latents = [s.name for s in target.sites if s.discrete and s.local is not None]
    return curvature(fit, key=key, samples=samples, top=min(top, sum(a.layers)), sites=latents or None)


def at_views(target: Target, views: dict[str, Latents]) -> Target:
    """The target whose differences take each term at its own view of the sites in closed form."""
    if not views:
        return dataclasses.replace(target, source=None, starts={})
    chosen, discrete = dict(target.views), [s.name for s in target.sites if s.discrete]
    names = dict.fromkeys(f.name for f in target.factored.factors)
    rules = tuple(
        (name, site, functools.partial(_difference, target, site, name, chosen.get(name, "mean")))
        for site in discrete
        for name in names
    )
    factored = dataclasses.replace(target.factored, overrides=rules)
    return dataclasses.replace(
        target, factored=factored, data={"own": target.data, "views": views}, source=None, starts={}
    )


def _difference(
    target: Target, site: str, name: str, view: str, z: Latents, moved: Array, data: Any, rows: Any
) -> Array:
    """Change of one term as one coordinate of a site moves."""
    here = {**z, **data["views"].get(view, {})}
    return target.factored.differences(site, moved[None], here, data["own"], rows, among=frozenset({name}))[0]
