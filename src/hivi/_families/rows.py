"""Families repeated over the rows of a subsampled plate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message
from hivi._families.base import AbstractFamily, AbstractProposal, Conditional
from hivi._likelihoods.base import AbstractLikelihood
from hivi._space import Latents, Plate, Site
from hivi._tree import Key, PyTree, taken


def by_rows(family: AbstractFamily, sites: tuple[Site, ...], plate: Plate, key: Key) -> AbstractProposal:
    """A family built for one row of a plate, its parameters repeated for every row.

    Raises:
        FamilyError: a family that cannot be repeated row by row.
    """
    rows = tuple(s.row() for s in sites)
    count = next(s.shape[s.local[1]] for s in sites if s.local is not None)  # all rows, or those of one minibatch
    keys = jax.random.split(key, count)
    example = family.at_row(sites, jnp.array(0)).build(rows, keys[0])
    if example.hidden(eqx.filter_eval_shape(example.propose, key)[1]):
        raise FamilyError(
            message(
                f"sites {[s.name for s in sites]} of the subsampled plate {plate.name!r}",
                f"{type(family).__name__}, whose own discrete variables are not repeated row by row",
                "a family with continuous lambda",
                "use Hierarchical(prior=Flow()) or MeanField() for these sites",
            )
        )
    if not example.equal_branches:
        raise FamilyError(
            message(
                f"sites {[s.name for s in sites]} of the subsampled plate {plate.name!r}",
                f"a mixture ({type(family).__name__}) with weights, whose components cannot be stratified row by row",
                "components of equal weight, or none",
                "use Mixture(components, equal=True), Hierarchical(prior=Flow()) or MeanField() for these sites",
            )
        )
    static = eqx.partition(example, eqx.is_array)[1]

    def arrays_of(k: Key, row: Array) -> PyTree:
        return eqx.filter(family.at_row(sites, row).build(rows, k), eqx.is_array)

    stacked = jax.vmap(arrays_of)(keys, jnp.arange(count))
    mask = jax.tree.map(lambda flag, x: flag, example.individual(), example)
    flags = tuple(m for m, x in zip(jax.tree.leaves(mask), jax.tree.leaves(example), strict=True) if eqx.is_array(x))
    arrays = [x if own else x[0] for own, x in zip(flags, jax.tree.leaves(stacked), strict=True)]
    return RowsProposal(
        sites, eqx.combine(jax.tree.unflatten(jax.tree.structure(stacked), arrays), static), plate, flags
    )


def _is_none(x: Any) -> bool:
    return x is None


class RowsProposal(AbstractProposal):
    """One proposal per row of a subsampled plate.

    Attributes:
        sites: the sites, over all rows.
        rows: the proposal of a row; its own arrays have a leading axis over rows.
        plate: the plate.
        mask: which of its arrays are each row's own, in the order of its leaves; the others serve all rows.
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    rows: AbstractProposal
    plate: Plate = eqx.field(static=True)
    mask: tuple[bool, ...] = eqx.field(static=True)

    @property
    def branches(self) -> int:
        return self.rows.branches

    @property
    def equal_branches(self) -> bool:
        return True

    def log_weights(self) -> Float[Array, " branches"]:
        return jnp.full(self.branches, -jnp.log(self.branches))

    @property
    def plain(self) -> bool:
        return self.rows.plain

    def _split(self) -> tuple[PyTree, PyTree]:
        """Each row's own arrays, and the rest."""
        return eqx.partition(self.rows, self._flags())

    def _flags(self) -> PyTree:
        flags = iter(self.mask)
        return jax.tree.map(lambda x: next(flags) if eqx.is_array(x) else False, self.rows)

    def _each(self, fn: Callable[..., Any], *args: Any) -> Any:
        """`fn(proposal, *args)` for every row at once."""
        own, rest = self._split()
        return jax.vmap(lambda a, *more: fn(eqx.combine(a, rest), *more))(own, *args)

    def _out(self, z: Latents) -> Latents:
        return {s.name: jnp.moveaxis(z[s.name], 0, s.local[1]) for s in self.sites if s.local is not None}

    def _in(self, z: Latents) -> Latents:
        local = ((s.name, s.local[1]) for s in self.sites if s.local is not None and s.name in z)
        return {name: jnp.moveaxis(z[name], axis, 0) for name, axis in local}

    def _count(self) -> int:
        return int(jax.tree.leaves(self._split()[0])[0].shape[0])

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self.redrawn({}, key, branch)

    def redrawn(self, values: Latents, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        known = self._in(values)
        k1, k2 = jax.random.split(key)
        keys = jax.random.split(k1, self._count())
        if self.branches > 1:  # each row has each component in some branch, and independent ones within a branch
            shift = jax.random.randint(jax.random.fold_in(key, 2), (self._count(),), 0, self.branches)
            z, context = self._each(
                lambda p, v, k, b: p.redrawn(v, k, b), known, keys, (branch + shift) % self.branches
            )
        else:
            z, context = self._each(lambda p, v, k: p.redrawn(v, k), known, keys)
        out = self._out(z)
        # Discrete values of all rows in one draw: the sampler's loops run once, not once for each row's worst case.
        given = self.conditionals(context)
        fixed = self.rows.upstream  # on which the rest of a row depends
        discrete = [s.name for s in self.sites if s.discrete and s.name in given and s.name not in fixed]
        for name, k in zip(discrete, jax.random.split(k2, max(len(discrete), 1)), strict=False):
            out[name] = given[name].likelihood.sample(given[name].lam, k)
        return out, context

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        keys = jax.random.split(key, self._count())
        terms = self._each(lambda p, v, c, k: p.log_q(v, c, k, inner), self._in(z), context, keys)
        return {f"{name}[{self.plate.name}]": value for name, value in terms.items()}

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        keys = jax.random.split(key, self._count())
        return jnp.sum(self._each(lambda p, v, k: p.log_density(v, k, samples), self._in(z), keys))

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        rules: dict[str, AbstractLikelihood] = {}  # the row's own, which need not be the site's usual one

        def find(p: AbstractProposal, c: PyTree) -> dict[str, Array]:
            found = p.conditionals(c)
            rules.update({n: v.likelihood for n, v in found.items()})
            return {n: v.lam for n, v in found.items()}

        lam = self._each(find, context)
        out = {}
        for s in self.sites:
            if s.name in lam and s.local is not None:
                out[s.name] = Conditional(rules[s.name], jnp.moveaxis(lam[s.name], 0, s.local[1]))
        return out

    def gather(self, rows: dict[str, Array]) -> RowsProposal:
        own, rest = self._split()
        some = jax.tree.map(lambda x: taken(x, rows.get(self.plate.name)), own)
        return self._with(eqx.combine(some, rest))

    @property
    def upstream(self) -> frozenset[str]:
        return self.rows.upstream

    @property
    def points(self) -> frozenset[str]:
        return self.rows.points

    def resized(self, sites: tuple[Site, ...]) -> RowsProposal:
        plate = next(s.local[0] for s in sites if s.local is not None)
        return RowsProposal(sites, self.rows, plate, self.mask)

    def _with(self, rows: AbstractProposal) -> RowsProposal:
        return RowsProposal(self.sites, rows, self.plate, self.mask)

    def scales(self) -> dict[str, float]:
        z, context = jax.eval_shape(self.propose, jax.random.key(0))
        names: dict[str, Array] = {}
        for inner in (0, 1):  # some have other terms with extra draws of lambda
            with contextlib.suppress(FamilyError):
                names |= jax.eval_shape(lambda v, c, k=inner: self.log_q(v, c, jax.random.key(0), k), z, context)
        return dict.fromkeys(names, self.plate.scale)

    def row_terms(self, plate: str) -> dict[str, int]:
        return dict.fromkeys(self.scales(), 0) if plate == self.plate.name else {}

    def score_weight(self, inner: int) -> float:
        return self.rows.score_weight(inner)

    def parameters(self) -> dict[str, Array]:
        return {}

    def near(self, means: dict[str, Array]) -> RowsProposal:
        flags = self._flags()
        moved = self._each(lambda p: eqx.filter(p.near(means), flags))
        return self._with(eqx.combine(moved, self._split()[1]))

    def grown(self, lam: dict[str, Array]) -> RowsProposal:
        flags = self._flags()
        moved = self._each(lambda p, v: eqx.filter(p.grown(v), flags), self._in(lam))
        return self._with(eqx.combine(moved, self._split()[1]))

    def along_lambda(self, lam: dict[str, Array]) -> RowsProposal:
        flags = self._flags()
        moved = self._each(lambda p, v: eqx.filter(p.along_lambda(v), flags), self._in(lam))
        return self._with(eqx.combine(moved, self._split()[1]))

    def natural(self, gradient: PyTree) -> PyTree:
        flags = jax.tree.map(lambda flag, x: flag and eqx.is_inexact_array(x), self._flags(), self.rows)
        here = jax.tree.map(lambda g, flag: flag if g is not None else None, gradient.rows, flags, is_leaf=_is_none)
        own, rest = eqx.partition(gradient.rows, here)
        scaled = jax.tree.map(lambda g: g / self.plate.scale, own)
        moved = self._each(lambda p, g: eqx.filter(p.natural(eqx.combine(g, rest)), flags), scaled)
        return self._with(eqx.combine(moved, rest))

    def roles(self) -> PyTree:
        return self._with(self.rows.roles())

    def owned(self) -> PyTree:
        return self._with(self._flags())
