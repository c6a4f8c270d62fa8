"""Score-function gradients with local learning and a baseline (eq. 8/11)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractBaseline, AbstractStrategy, Evaluation, Increment
from hivi._estimators.leave_one_out import LeaveOneOut
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Site
from hivi._tree import Key, PyTree


class Score(AbstractStrategy):
    """grad log q(z_i|lambda_i) times the local signal f_i, less a baseline.

    f_i holds only the terms that touch z_i (Rao-Blackwellised, Ranganath et al. 2014); for a multi-sample bound the baseline is
    the bound with f_i replaced by the baseline's value (compare VIMCO, Mnih & Rezende 2016).

    Args:
        baseline: `LeaveOneOut()`, the mean of f_i over the other draws, which needs two draws or more; `MovingAverage()`, over
            earlier steps; `Learned()`, a network of lambda.

    Example:
        >>> import hivi
        >>> hivi.Score(baseline=hivi.MovingAverage()).remembers
        True
    """

    baseline: AbstractBaseline = LeaveOneOut()
    detached: ClassVar[bool] = True

    def __check_init__(self) -> None:
        if not isinstance(self.baseline, AbstractBaseline):
            expected = "LeaveOneOut(), MovingAverage() or Learned()"
            raise FitError(
                message("Score(baseline=...)", repr(self.baseline), expected, "pass the object, with its ()")
            )

    @property
    def remembers(self) -> bool:
        return self.baseline.remembers

    @property
    def whole(self) -> bool:
        return True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return None if conditional is not None else "its coordinates are not independent given the family's context"

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        if self.remembers and site.local is not None and site.scale != 1:
            return f"{type(self.baseline).__name__}() would mix the rows of different minibatches"
        return None

    def start(self, conditional: Conditional, key: Key) -> PyTree:
        return self.baseline.start(conditional, key)

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        log_q = conditional.likelihood.log_prob(conditional.lam, evaluation.z[site])
        fixed = Conditional(conditional.likelihood, jax.lax.stop_gradient(conditional.lam))
        return log_q, evaluation.signal(site), self.baseline.predict(evaluation.memory, fixed)

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        log_q, signal, predicted = measured
        baseline = self.baseline.value(signal, predicted)
        advantage = -increment(jax.lax.stop_gradient(baseline - signal))
        return jnp.sum(log_q * advantage)

    def learn(self, memory: PyTree, measured: PyTree) -> PyTree:
        _, signal, predicted = measured
        return self.baseline.learn(memory, signal, predicted)
