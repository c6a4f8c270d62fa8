"""Bounds taken row by row of a plate: what belongs to each row of log p - log q, and what to none.

Sites outside the plate are drawn once, those inside it as often as the bound says. A draw of the latter then has a log-weight
for every row, and the bound's increments apply to each row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message, nearest
from hivi._families.base import AbstractProposal
from hivi._families.product import ProductProposal
from hivi._locality.base import ALL, Entry, Factor
from hivi._locality.place import along_axis, sums_along
from hivi._space import Latents, Plate
from hivi._target.base import Target
from hivi._tree import Key, PyTree, sum_all


class RowWeights(NamedTuple):
    """log p - log q of a draw.

    Attributes:
        rows: what belongs to each row, without the plate's scale, (..., rows).
        rest: what belongs to no row, with its scale.
    """

    rows: Array
    rest: Array


class Split(NamedTuple):
    """A proposal as its parts outside and inside a plate, independent of each other.

    Attributes:
        proposal: their product, the part outside first where there is one.
        plate: the plate.
        rows: site inside -> its axis of rows.
        instead: in words, what to use where rows cannot be told apart.
    """

    proposal: ProductProposal
    plate: Plate
    rows: Mapping[str, int]
    instead: str = "Elbo(), ImportanceWeighted()"

    def propose(self, shared: Key | None, key: Key, branch: Array | int) -> tuple[Latents, PyTree]:
        """A draw: of the sites outside by the key that all draws share."""
        z: Latents = {}
        contexts = []
        *outside, inside = self.proposal.parts
        assert shared is not None
        for part, own, which in (*((p, shared, 0) for p in outside), (inside, key, branch)):
            draw, context = part.propose(own, which)
            z |= draw
            contexts.append(context)
        return z, tuple(contexts)

    def weights(self, target: Target, p_terms: Sequence[Array], q_terms: Mapping[str, Array]) -> RowWeights:
        """The log-weight of a draw, row by row."""
        size, scale = self.plate.batch, self.plate.scale
        rows, rest = jnp.zeros(size), jnp.zeros(())
        for factor, term in zip(target.factored.factors, p_terms, strict=True):
            entry = self.entry(factor)
            if entry is None:
                rest = rest + factor.weight * sum_all(term)
            else:
                rows = rows + factor.weight / scale * sums_along(term, entry, size)
        axes, scales = self.proposal.row_terms(self.plate.name), self.proposal.scales()
        inside = f"#{len(self.proposal.parts) - 1}"
        for name, term in q_terms.items():
            if name in axes:
                own = jnp.moveaxis(term, axes[name], 0).reshape(size, -1)
                rows = rows - scales.get(name, 1.0) / scale * jnp.sum(own, 1)
            elif name.endswith(inside):
                expected = "a family that takes rows one by one"
                cure = f"use MeanField() or Amortised(), or minibatches, subsample={{{self.plate.name!r}: ...}}"
                family = type(self.proposal.parts[-1]).__name__.removesuffix("Proposal")
                raise FitError(self._coupled(f"the term {name!r} of log q ({family})", expected, cure))
            else:
                rest = rest - scales.get(name, 1.0) * sum_all(term)
        return RowWeights(rows, rest)

    def entry(self, factor: Factor) -> Entry | None:
        """How the elements of a factor run along the rows; None where they touch none.

        Raises:
            FitError: an element that several rows share.
        """
        size = self.plate.batch
        found = {along_axis(factor, name, axis, size) for name, axis in self.rows.items()} - {None}
        if len(found) > 1 or ALL in found:
            expected = "terms whose elements touch one row each"
            cure = (
                "if data look up their row by an index array, close over that array in place of passing it to the model"
            )
            raise FitError(self._coupled(f"the term {factor.name!r}", expected, cure))
        return next(iter(found), None)

    def check(self, factors: Sequence[Factor], sites: Sequence[str]) -> None:
        """Refuse sites whose changes are not those of one row.

        Raises:
            FitError: naming the site or the term.
        """
        for n in sites:
            if n not in self.rows or n in self.proposal.upstream:
                found = "a discrete site, on which every row depends"
                cure = "use hivi.Elbo(), or sum the site out of the model"
                raise FitError(
                    message(f"site {n!r} outside the plate {self.plate.name!r}", found, "no such site", cure)
                )
        for factor in factors:
            self.entry(factor)

    def axes(self) -> dict[str, tuple[int, int]]:
        """Site inside -> its axis of rows, and their number."""
        return {name: (axis, self.plate.batch) for name, axis in self.rows.items()}

    def of(self, bound: AbstractBound) -> Callable[[RowWeights, Array], Float[Array, " samples"]]:
        """`bound.value` of log-weights by row, with leading axes (samples, outer, branches)."""
        each = self.each(bound)
        return lambda log_w, log_pi: log_w.rest[:, 0, 0] + self.plate.scale * jnp.sum(each(log_w.rows, log_pi), -1)

    def each(self, bound: AbstractBound) -> Callable[[Array, Array], Float[Array, "samples rows"]]:
        """`bound.value` of every row by itself, of its log-weights with leading axes (samples, outer, branches)."""
        return lambda rows, log_pi: jax.vmap(lambda w: bound.value(w, log_pi), -1, -1)(rows)

    def increment(
        self, bound: AbstractBound, log_w: RowWeights, log_pi: Array, target: Target, site: str
    ) -> Callable[[Array], Array]:
        """Change of the bound when the log-weight of a coordinate's row changes, (samples, outer, branches, ..., *site)."""
        axis, scale = self.rows[site] - len(target.site(site).batch_shape), self.plate.scale

        def of(change: Array) -> Array:
            moved = jnp.moveaxis(change, axis, 0) / scale
            each = jax.vmap(lambda w, c: bound.increment(w, log_pi, c), (-1, 0))(log_w.rows, moved)
            return scale * jnp.moveaxis(each, 0, axis)

        return of

    def _coupled(self, where: str, expected: str, cure: str) -> str:
        found = f"several rows of the plate {self.plate.name!r} in one number"
        return message(where, found, expected, f"{cure}; or use a bound of all rows together: {self.instead}")


def split(proposal: AbstractProposal, target: Target, plate: str | None, caller: str = "") -> Split | None:
    """The parts of a minibatch's proposal for a bound that is taken row by row of a plate; None for the other bounds.

    `caller` is the method that asks, where it is no bound of a fit.

    Raises:
        FitError: a plate without latent sites, a streamed target, or a mixture outside the plate.
        FamilyError: a family that fits the plate's sites jointly with others.
    """
    if plate is None:
        return None
    where = f"plate {plate!r} of {caller or 'ImportanceWeighted'}"
    instead = "Fit.elbo" if caller else "hivi.Elbo()"
    rows = {s.name: axis for s in target.sites for name, axis in s.plates if name == plate}
    known = sorted({name for s in target.sites for name, _ in s.plates})
    if not rows:
        cure = nearest(plate, known, f"use {instead}")
        expected = f"one of the plates {known}" if known else "a plate that has latents, and the model has none"
        raise FitError(message(where, "no latent site in it", expected, cure))
    if target.source is not None:
        raise FitError(message(where, "a streamed target", "all data in memory", f"use {instead}"))
    outside, inside = proposal.divided(frozenset(rows))
    assert inside is not None
    if outside is not None and outside.branches > 1:
        name = outside.sites[0].name
        found, expected = f"a mixture ({outside.branches} branches) outside the plate", "one component there"
        raise FitError(message(f"site {name!r}", found, expected, f"use MeanField() or Flow() for it, or {instead}"))
    parts = (inside,) if outside is None else (outside, inside)
    size = target.site(next(iter(rows))).batch_shape[next(iter(rows.values()))]
    own = next((p for p in target.plates if p.name == plate), Plate(plate, size, size))
    return Split(
        ProductProposal(tuple(s for p in parts for s in p.sites), parts),
        own,
        rows,
        instead if caller else "Elbo(), ImportanceWeighted()",
    )
