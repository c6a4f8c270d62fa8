"""NumPyro's distributions taken apart: log-probabilities element by element, masks, and supports."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.distribution import (
    Delta,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    Unit,
)


def unwrap(fn: Any) -> tuple[Any, Any, int]:
    """The distribution inside `expand`, `mask` and `to_event`; the mask; and the event axes that `to_event` made.

    The mask broadcasts with the log-probabilities of the bare distribution: batch axes, then those event axes.
    """
    mask: Any = True
    events = 0
    while isinstance(fn, MaskedDistribution | Independent | ExpandedDistribution):
        if isinstance(fn, MaskedDistribution) and fn._mask is not True:
            mask = jnp.asarray(fn._mask) if mask is True else fn._mask & mask
        elif isinstance(fn, Independent):
            events += fn.reinterpreted_batch_ndims
            mask = mask if mask is True else mask.reshape(mask.shape + (1,) * fn.reinterpreted_batch_ndims)
        fn = fn.base_dist
    return fn, mask, events


def log_prob(fn: Any, value: Any, keep_mask: bool = True, fixed: bool = False) -> Any:
    """Log-probabilities with as many axes as the distribution allows: sums stay visible, masks act per element.

    Args:
        fn: a distribution.
        value: its value.
        keep_mask: whether masked elements count 0; else masks are ignored.
        fixed: whether the value is the distribution's own, as that of a Delta is.
    """
    base, mask, events = unwrap(fn)
    if isinstance(value, np.ndarray):  # NumPy cannot compare it with bounds that are being traced
        value = jnp.asarray(value)
    mask = mask if keep_mask else True
    shape = (*fn.batch_shape, *fn.event_shape[:events])
    if isinstance(base, Unit):
        array = jnp.asarray(base.log_factor)
    elif fixed and isinstance(base, Delta):
        array = jnp.asarray(base.log_density)
    else:
        # A masked value may be NaN: its log-density would be 0, but the gradient NaN.
        array = base.log_prob(value if mask is True else _feasible(base, value, mask))
    array = jnp.broadcast_to(array, jnp.broadcast_shapes(shape, jnp.shape(array)))
    return array if mask is True else jnp.where(mask, array, 0.0)


def outside_support(base: Any, mask: Any, value: Any) -> Any:
    """Where an observation is impossible, of which `log_prob` takes no notice; None where that is not to be said.

    Of the distributions in `CHECKED` alone: the support of others may be another's (censored, zero-inflated and general
    mixtures), periodic, or known to rounding only. An end of a continuous support is possible: a waiting time of 0.
    """
    # A total that changes inside a scan is out of reach after it: NumPyro keeps it beside the arrays.
    if type(base) not in CHECKED or (type(base) in TOTALS and isinstance(base.total_count, jax.core.Tracer)):
        return None
    try:
        support = base.support
        good = support(jnp.asarray(value))
        if not support.is_discrete:
            for end in ("lower_bound", "upper_bound"):
                good = good | (value == getattr(support, end, jnp.nan))
    except (NotImplementedError, ValueError):  # a constraint that stands for "it depends"
        return None
    return ~jnp.asarray(good) & mask


TOTALS = {dist.MultinomialProbs, dist.MultinomialLogits, dist.DirichletMultinomial}
CHECKED = {
    *TOTALS,
    *(dist.BernoulliProbs, dist.BernoulliLogits, dist.CategoricalProbs, dist.CategoricalLogits, dist.DiscreteUniform),
    *(dist.BinomialProbs, dist.BinomialLogits, dist.BetaBinomial, dist.GeometricProbs, dist.GeometricLogits),
    *(dist.Poisson, dist.GammaPoisson, dist.NegativeBinomial2, dist.NegativeBinomialProbs, dist.NegativeBinomialLogits),
    *(dist.Beta, dist.BetaProportion, dist.Chi2, dist.Exponential, dist.Gamma, dist.HalfCauchy, dist.HalfNormal),
    *(dist.InverseGamma, dist.LogNormal, dist.Pareto, dist.Uniform, dist.Weibull),
}
"""Distributions whose `support` says which values they can give."""


def _feasible(base: Any, value: Any, mask: Any) -> Any:
    try:
        other = base.support.feasible_like(value)
    except NotImplementedError:
        other = jnp.ones_like(value)
    return jnp.where(mask.reshape(mask.shape + (1,) * base.event_dim), value, other)


def base_support(support: Any) -> Any:
    """A constraint without the event axes that `to_event` put around it."""
    while hasattr(support, "base_constraint"):  # NumPyro's own class
        support = support.base_constraint
    return support
