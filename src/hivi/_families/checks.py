"""What families ask of the sites that they are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hivi._errors import FamilyError, message
from hivi._space import Site


def with_counts(sites: tuple[Site, ...], concentration: float | None, dispersed: bool) -> tuple[Site, ...]:
    """The sites with negative-binomial q for counts, where a concentration is given, or with q of free spread.

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
    values = [
        dataclasses.replace(s.values, concentration=float(concentration or 0), dispersed=dispersed) for s in sites
    ]
    return tuple(
        dataclasses.replace(s, values=v) if v.kind == "count" else s for s, v in zip(sites, values, strict=True)
    )


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
