"""Score-function gradients with local learning and a leave-one-out baseline (eq. 8/11)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._families.base import Conditional
from hivi._space import Site
from hivi._tree import PyTree


class Score(AbstractStrategy):
    """grad log q(z_i|lambda_i) times the local signal f_i, less the mean of f_i over the other draws.

    f_i holds only the terms that touch z_i (Rao-Blackwellised, Ranganath et al. 2014); for a multi-sample bound the baseline is
    the bound with f_i replaced by that mean (compare VIMCO, Mnih & Rezende 2016). It needs two draws or more to
    have a baseline.
    """

    detached: ClassVar[bool] = True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return None if conditional is not None else "its coordinates are not independent given the family's context"

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        log_q = conditional.likelihood.log_prob(conditional.lam, evaluation.z[site])
        return log_q, evaluation.signal(site)

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        log_q, signal = measured
        draws = signal.shape[0] * signal.shape[1]
        total = jnp.sum(signal, (0, 1), keepdims=True)
        baseline = (total - signal) / max(draws - 1, 1)
        advantage = -increment(jax.lax.stop_gradient(baseline - signal))
        return jnp.sum(log_q * advantage)
