"""Closed-form expectations over continuous sites that a model meets only through means: no draw, no noise."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Array

from hivi._estimators.base import AbstractStrategy, Evaluation, Increment
from hivi._families.base import Conditional
from hivi._space import Site
from hivi._tree import PyTree


class Expectation(AbstractStrategy):
    """Evaluate log p at the site's means E[w] and log E[e^w] instead of at a draw.

    Exact for terms linear in w or e^w; a lower bound, by Jensen's inequality, for terms convex in w (the log rate of a
    Poisson with positive weights, Cemgil 2009). The target says which (`Target.closed`), the family gives the
    means (`MeanFieldGamma`), and the gradient comes out as the natural one (conjugate step, Hoffman et al. 2013).

    Args:
        plug_in: use log E[e^w] everywhere, without q's entropy: penalised maximum likelihood. Not a bound; a warm-up, because
            from scratch the bound's own penalty prunes or stalls.
    """

    plug_in: bool = False
    detached: ClassVar[bool] = False
    closed: ClassVar[bool] = True

    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        return "it is discrete" if site.discrete else None

    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        raise NotImplementedError("nothing is drawn, so nothing is measured")

    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        raise NotImplementedError("nothing is drawn, so nothing is measured")
