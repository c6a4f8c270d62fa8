"""What families ask of the sites that they are given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from hivi._errors import FamilyError, message
from hivi._space import Site

TABLE, NUMBERS = 1024, 2**14
"""The longest range whose values get a probability each, and the most numbers that such a site may take."""


def with_tables(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites with a probability for each value of long ranges, too, where that takes few numbers."""

    def small(s: Site) -> bool:
        return s.values.kind == "binomial" and s.values.count <= min(TABLE, NUMBERS // math.prod(s.shape))

    return tuple(
        dataclasses.replace(s, values=dataclasses.replace(s.values, kind="finite")) if small(s) else s for s in sites
    )


def with_counts(sites: tuple[Site, ...], concentration: float | None, dispersed: bool) -> tuple[Site, ...]:
    """The sites with negative-binomial q for counts, where a concentration is given, or counts and ranges of free spread.

    Raises:
        FamilyError: a concentration that is not positive, or both.
    """
    if dispersed and concentration is not None:
        cure = "dispersed=True also widens, up to four times a Poisson's variance; leave one out"
        raise FamilyError(message("dispersed=True", f"concentration={concentration!r} as well", "one of them", cure))
    if concentration is None and not dispersed:
        return sites
    if concentration is not None and not concentration > 0:
        raise FamilyError(
            message("concentration=...", repr(concentration), "a positive number", "1 is Geometric, None Poisson")
        )

    def freed(s: Site) -> Site:
        if s.values.kind == "count":
            values = dataclasses.replace(s.values, concentration=float(concentration or 0), dispersed=dispersed)
        else:
            values = dataclasses.replace(s.values, dispersed=dispersed and s.values.ordered)
        return dataclasses.replace(s, values=values)

    return tuple(freed(s) for s in sites)


def require_real(family: str, sites: Sequence[Site]) -> None:
    """Refuse discrete sites.

    Raises:
        FamilyError: naming the first discrete site.
    """
    for s in sites:
        if s.discrete:
            raise FamilyError(
                message(
                    f"{family} at site {s.name!r}",
                    f"a discrete site ({s.values.kind})",
                    "continuous sites only",
                    "use Hierarchical(), MeanField() or Mixture() for it, for example "
                    f"family={{{s.name!r}: hivi.Hierarchical(), ...}}",
                )
            )
