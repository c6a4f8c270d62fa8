"""Estimates of bounds: of a whole fit, and of each row of a plate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound, Elbo, ImportanceWeighted
from hivi._compile import compiled
from hivi._errors import FitError, message
from hivi._estimators.evaluation import RowBounds, row_bounds
from hivi._families.base import AbstractProposal
from hivi._target.base import Rows, Target
from hivi._tree import Key

BATCH = 8
"""Estimates made at once."""


class Estimate(NamedTuple):
    """A Monte Carlo estimate: mean and standard error, in nats."""

    mean: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.stderr:.4f}"


class Pointwise(NamedTuple):
    """Independent estimates of a bound, taken apart by the rows of a plate, in nats.

    The bound of all is the sum over `rows`, and `rest`.

    Attributes:
        rows: the share of every row: log p - log q of what touches it, (samples, rows).
        rest: what belongs to no row: latents outside the plate, (samples,).
    """

    rows: Float[np.ndarray, "samples rows"]
    rest: Float[np.ndarray, " samples"]

    def mean(self) -> Float[np.ndarray, " rows"]:
        """Mean share of every row, in nats."""
        return self.rows.mean(0)

    def stderr(self) -> Float[np.ndarray, " rows"]:
        """Its standard error."""
        return self.rows.std(0, ddof=1) / np.sqrt(len(self.rows))

    def total(self) -> Estimate:
        """The bound of all rows and the rest."""
        each = self.rows.sum(1) + self.rest
        return Estimate(float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each))))


def pointwise(
    proposal: AbstractProposal, target: Target, plate: str, draws: int | None, key: Key, samples: int
) -> Pointwise:
    """Estimates for every row, a minibatch at a time; what lies outside the plate is drawn alike for all of them.

    Raises:
        FitError: another plate is subsampled, so that no row's share is known.
    """
    other = [p.name for p in target.plates if p.batch < p.size and p.name != plate]
    if other:
        raise FitError(
            message(
                f"subsampled plate {other[0]!r}",
                f"Fit.pointwise of the plate {plate!r}, whose rows meet its data",
                "no other plate in minibatches",
                "make the target again with the whole data, and load the fit with it",
            )
        )
    own = next((p for p in target.plates if p.name == plate), None)
    bound = Elbo() if draws is None else ImportanceWeighted(draws)
    if own is None:
        found = _block(proposal, target, bound, plate, key, {}, jnp.asarray(0), samples)
        return Pointwise(np.asarray(found.rows, float), np.asarray(found.rest, float))
    whole, parts = {p.name: jnp.arange(p.batch) for p in target.plates}, []
    for number, start in enumerate(range(0, own.size, own.batch)):
        taken = jnp.asarray((start + np.arange(own.batch)) % own.size)
        parts.append(_block(proposal, target, bound, plate, key, {**whole, plate: taken}, jnp.asarray(number), samples))
    rows = np.concatenate([np.asarray(p.rows, float) for p in parts], 1)
    return Pointwise(rows[:, : own.size], np.asarray(parts[0].rest, float))


@compiled
def _block(
    proposal: AbstractProposal,
    target: Target,
    bound: AbstractBound,
    plate: str,
    key: Key,
    rows: Rows,
    number: Array,
    samples: int,
) -> RowBounds:
    def one(k: Key) -> RowBounds:
        shared, inside = jax.random.split(k)
        return row_bounds(proposal, target, bound, plate, (shared, jax.random.fold_in(inside, number)), rows)

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=BATCH)
