"""Estimates of bounds: of a whole fit, and of each row of a plate."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound, Elbo, ImportanceWeighted
from hivi._compile import compiled
from hivi._errors import FitError, message, require_count
from hivi._estimators.evaluation import RowBounds, row_bounds
from hivi._families.base import AbstractProposal
from hivi._target.base import Rows, Target
from hivi._tree import Key

BATCH = 8
"""Estimates made at once."""
CALLER = "Fit.pointwise"


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
        rows: the share of every row, (samples, rows): the terms of log p - log q that touch a latent of it.
        rest: all other terms, (samples,): latents outside the plate, and data whose term touches no latent of their row.
    """

    rows: Float[np.ndarray, "samples rows"]
    rest: Float[np.ndarray, " samples"]

    def __repr__(self) -> str:
        return f"Pointwise({self.rows.shape[1]} rows, {self.rows.shape[0]} estimates: {self.total()} nats in all)"

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
    proposal: AbstractProposal, target: Target, inner: int, key: Key, plate: str, draws: int | None, samples: int
) -> Pointwise:
    """Estimates for every row, a minibatch at a time; what lies outside the plate is drawn alike for all of them.

    Raises:
        FitError: rows whose share cannot be told: another plate is subsampled, or some terms of its rows touch no latent.
    """
    if not isinstance(plate, str):
        raise FitError(message(f"{CALLER}(plate=...)", repr(plate), "the name of a plate", "pass it as a string"))
    require_count(f"{CALLER}(draws=...)", 1 if draws is None else draws, "ask for so many draws", 1, FitError)
    require_count(f"{CALLER}(samples=...)", samples, "ask for so many estimates", 2, FitError)
    bound = Elbo(inner) if draws is None else ImportanceWeighted(int(draws), inner)
    samples = int(samples)
    other = [p.name for p in target.plates if p.batch < p.size and p.name != plate]
    if other:
        raise FitError(
            _whole(f"subsampled plate {other[0]!r}", f"{CALLER} of the plate {plate!r}, whose rows meet its data")
        )
    own = next((p for p in target.plates if p.name == plate), None)
    if own is None:
        found = _block(proposal, target, bound, plate, key, {}, jnp.asarray(0), samples)
        return Pointwise(np.asarray(found.rows, float), np.asarray(found.rest, float))
    whole, parts = {p.name: jnp.arange(p.batch) for p in target.plates}, []
    for number, start in enumerate(range(0, own.size, own.batch)):
        taken = jnp.asarray((start + np.arange(own.batch)) % own.size)
        parts.append(_block(proposal, target, bound, plate, key, {**whole, plate: taken}, jnp.asarray(number), samples))
    rows = np.concatenate([np.asarray(p.rows, float) for p in parts], 1)
    rest = np.stack([np.asarray(p.rest, float) for p in parts])
    # A last block that is not full holds rows again, whose terms would count twice in the mean over blocks.
    if own.size % own.batch and not np.allclose(rest, rest[:1], rtol=1e-5, atol=1e-5):
        found = f"{CALLER}, and {own.size} rows of which some terms touch no latent, {own.batch} at a time"
        raise FitError(_whole(f"plate {plate!r}", found))
    return Pointwise(rows[:, : own.size], rest.mean(0))


def _whole(where: str, found: str) -> str:
    return message(
        where, found, "all of the data at once", "make the target again without subsample, and load the fit with it"
    )


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
        return row_bounds(proposal, target, bound, plate, (shared, jax.random.fold_in(inside, number)), rows, CALLER)

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=BATCH)
