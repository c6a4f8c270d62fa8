"""What families ask of the sites that they are given, and of each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hivi._errors import FamilyError, message, require_positive
from hivi._space import Site
from hivi._tree import Key

TABLE, NUMBERS = 1024, 2**14
"""The longest range whose values get a probability each, and the most numbers that such a site may take."""
SCATTER = 1.0
"""Standard deviation, in unconstrained coordinates."""
RATE, DISCRETE_RATE = 0.01, 0.05
"""Learning rates. Where sites are discrete, slow steps let the real sites settle before the discrete ones have taken sides: of
six mean-field fits of 800 data of two clusters, six find the clusters at 0.05, three at 0.01."""


def rate_for(sites: Sequence[Site]) -> float:
    """The default optimiser's learning rate, for a family without flows."""
    return DISCRETE_RATE if any(s.discrete for s in sites) else RATE


def scattered(sites: Sequence[Site], lam: Mapping[str, Array], key: Key) -> dict[str, Array]:
    """Parameters whose real sites are moved to random places.

    Means of clusters that start at one place stay there: what they would gain by parting is of fourth order in their distance.
    """
    real = [s.name for s in sites if not s.discrete]
    keys = dict(zip(real, jax.random.split(jax.random.fold_in(key, len(sites)), max(len(real), 1)), strict=False))
    moved = {n: lam[n].at[..., 0].add(SCATTER * jax.random.normal(k, lam[n].shape[:-1])) for n, k in keys.items()}
    return {**lam, **moved}


def with_tables(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites with a probability for each value of long ranges, too, where that takes few numbers."""

    def small(s: Site) -> bool:
        return s.values.kind == "binomial" and s.values.count <= min(TABLE, NUMBERS // math.prod(s.shape))

    return tuple(
        dataclasses.replace(s, values=dataclasses.replace(s.values, kind="finite")) if small(s) else s for s in sites
    )


def require_spread(concentration: float | None, dispersed: bool) -> None:
    """Refuse a spread of counts that is none.

    Raises:
        FamilyError: a concentration that is not positive, or both; a `dispersed` that is no truth value.
    """
    if not isinstance(dispersed, bool):
        raise FamilyError(message("dispersed=...", repr(dispersed), "True or False", "correct it"))
    if dispersed and concentration is not None:
        cure = "dispersed=True also widens, up to four times a Poisson's variance; leave one out"
        raise FamilyError(message("dispersed=True", f"concentration={concentration!r} as well", "one of them", cure))
    if concentration is not None:
        require_positive("concentration=...", concentration, "1 is Geometric, None Poisson")


def with_counts(sites: tuple[Site, ...], concentration: float | None, dispersed: bool) -> tuple[Site, ...]:
    """The sites with negative-binomial q for counts, where a concentration is given, or counts and ranges of free spread."""
    if concentration is None and not dispersed:
        return sites

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
                    f"a discrete site ({s.values})",
                    "continuous sites only",
                    "use Hierarchical(), MeanField() or Mixture() for it, for example "
                    f"family={{{s.name!r}: hivi.Hierarchical(), ...}}",
                )
            )


class Directions(NamedTuple):
    """Directions of lambda along which a hierarchy starts.

    Attributes:
        vectors: site -> (count, *site shape, width), of unit length over all sites together; for rows of a
            subsampled plate (rows, count, *shape of a row, width).
        spread: standard deviation of lambda along each, (count,) or (rows, count); 0 where there is none.
        rows: numbers of the plate's rows that have directions; None for global sites.
    """

    vectors: dict[str, Array]
    spread: Float[Array, "*rows count"]
    rows: Int[Array, " rows"] | None = None

    def at_row(self, row: Int[Array, ""]) -> Directions:
        """The directions of one row; of length zero where it has none."""
        if self.rows is None:
            return self
        own = (self.rows == row).astype(self.spread.dtype)
        return Directions({n: jnp.tensordot(own, v, 1) for n, v in self.vectors.items()}, own @ self.spread)


def not_a_prior(proposal: Any) -> str:
    """Why a proposal cannot be a prior over lambda."""
    return message(
        "Hierarchical(prior=...)",
        type(proposal).__name__.removesuffix("Proposal") + "()",
        "a distribution of the flat vector lambda",
        "use Flow(), FullRank(), LowRank(), Mixture(), MeanField() or another Hierarchical()",
    )


def jointly(family: str, sites: Sequence[Site], among: Sequence[Site]) -> str:
    """Why some of a proposal's sites do not stand alone."""
    name, other = sites[0].name, next(s.name for s in among if s not in sites)
    found = f"{family}, which fits it jointly with {other!r} outside the plate"
    cure = f"use family={{{name!r}: ..., '.*': hivi.MeanField()}}, or hivi.Elbo()"
    return message(f"site {name!r} of the bound's plate", found, "a family of its own for the plate's sites", cure)
