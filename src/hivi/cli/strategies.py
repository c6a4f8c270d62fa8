"""`--estimator`: the gradient strategies by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from hivi._estimators.base import AbstractStrategy
from hivi._estimators.control_variates import DoubleControlVariates
from hivi._estimators.differences import Difference, LocalExpectation
from hivi._estimators.disarm import DisARM
from hivi._estimators.enumeration import Enumeration
from hivi._estimators.factor_expectation import FactorExpectation
from hivi._estimators.hierarchical_score import HierarchicalScore
from hivi._estimators.learned import Learned
from hivi._estimators.moving_average import MovingAverage
from hivi._estimators.pathwise import Pathwise
from hivi._estimators.score import Score
from hivi._estimators.sticking import StickTheLanding

STRATEGIES: dict[str, AbstractStrategy] = {
    "score": Score(),
    "score-moving-average": Score(MovingAverage()),
    "score-learned": Score(Learned()),
    "disarm": DisARM(),
    "double-control-variates": DoubleControlVariates(),
    "local-expectation": LocalExpectation(),
    "coupled-local-expectation": LocalExpectation(coupled=True),
    "factor-expectation": FactorExpectation(),
    "difference": Difference(),
    "enumeration": Enumeration(),
    "hierarchical-score": HierarchicalScore(),
    "pathwise": Pathwise(),
    "stick-the-landing": StickTheLanding(),
}

AUTO = "auto"
NAMES = ", ".join((AUTO, *STRATEGIES))

Estimator = Annotated[
    list[str] | None,
    typer.Option(
        "--estimator", metavar="[SITE=]NAME",
        help=f"Gradient strategy of one site, or of all that it suits: {NAMES}. Repeatable for sites; "
        "with auto, the default, hivi chooses, and `hivi explain` says what.",
    ),
]  # fmt: skip


def read_strategies(options: Sequence[str] | None) -> AbstractStrategy | dict[str, AbstractStrategy] | None:
    """What `hivi.fit(estimator=)` takes, from the options as they were typed."""
    if not options:
        return None
    found: dict[str, AbstractStrategy | None] = {}
    for option in options:
        site, equals, name = option.rpartition("=")
        if name not in (AUTO, *STRATEGIES) or (equals and not site):
            raise typer.BadParameter(
                f"{option!r} is not [SITE=]NAME with NAME one of {NAMES}", param_hint="'--estimator'"
            )
        if name == AUTO and site:
            raise typer.BadParameter(f"{option!r}: leave {site} out, and hivi chooses", param_hint="'--estimator'")
        if site in found:
            raise typer.BadParameter(f"two for {site!r}" if site else "two without a site", param_hint="'--estimator'")
        found[site] = STRATEGIES.get(name)
    if "" in found and len(found) > 1:
        raise typer.BadParameter("either NAME alone, or SITE=NAME for each site", param_hint="'--estimator'")
    chosen = {site: strategy for site, strategy in found.items() if strategy is not None}
    return chosen.get("", chosen) or None
