"""A log-density as a sum of local factors: evaluation, local signals, and cheap differences.

`factorise` traces a function once, peels its final sums and reads off which latent coordinates each
element of each term touches. The terms of log p and of log r, log q go through the same code, so that the
local signal f_i of eq. 8/11 (only the terms that touch z_i) has one definition.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from hivi import _jaxprs
from hivi._errors import TargetError, message
from hivi._locality import products
from hivi._locality.accumulators import unfold
from hivi._locality.axes import scopes
from hivi._locality.base import Factor, Loss, Maps
from hivi._locality.colour import colours
from hivi._locality.peel import peel
from hivi._locality.place import place
from hivi._locality.reading import closest
from hivi._locality.rolling import roll
from hivi._locality.sums import PASSES, push
from hivi._space import Latents
from hivi._tree import PyTree, sum_all

UNROLL = 4
"""Up to this many evaluations of a difference are written out; more run in a compiled loop."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The static half of a factorised function. Equal programs are equal and hash alike, whatever made them.

    Attributes:
        jaxpr: open jaxpr: constants, then latents, then the leaves of the other arguments -> factor arrays.
        sites: the latents, in the order of the jaxpr's inputs.
        factors: one per output.
        losses: where locality was given up.
        key: fingerprint that decides equality.
        read: pairs (leaf of the other arguments, digest) of the arrays on whose integers or zeros the factors' scopes rest;
            `_locality.reading.unchanged` compares.
    """

    jaxpr: jex.Jaxpr
    sites: tuple[str, ...]
    factors: tuple[Factor, ...]
    losses: tuple[Loss, ...]
    key: str
    read: tuple[tuple[int, str], ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.key == other.key and self.factors == other.factors

    def __hash__(self) -> int:
        return hash((self.key, self.sites))

    @functools.lru_cache(maxsize=1024)  # noqa: B019  programs are few, and equal ones share an entry
    def restrict(self, keep: tuple[int, ...]) -> tuple[Program, tuple[bool, ...]]:
        """The program of some factors only, and which inputs it still needs."""
        wanted = [k in keep for k in range(len(self.factors))]
        jaxpr, used = _jaxprs.prune(self.jaxpr, wanted)
        factors = tuple(self.factors[k] for k in keep)
        return Program(jaxpr, self.sites, factors, (), f"{self.key}{keep}"), tuple(used)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def moves(self, site: str, position: int, shape: tuple[int, ...]) -> Moves:
        """How a site (the input at `position`, of this shape) moves, colour by colour."""
        palette = colours(self.factors, site, shape)
        counts = tuple(int(c.max(initial=-1)) + 1 for c in palette)
        variable = self.jaxpr.invars[position]
        found = products.candidates(self.jaxpr, variable) if max(counts, default=1) > 1 else []
        operands = _jaxprs.rebuild(self.jaxpr, outvars=[eqn.invars[moving] for eqn, moving in found])
        maps, _ = scopes(operands, [site if v is variable else None for v in self.jaxpr.invars])
        updates = {
            eqn.outvars[0]: how
            for (eqn, moving), scope in zip(found, maps, strict=True)
            if (how := products.product(eqn, moving, scope.get(site, frozenset()), palette)) is not None
        }
        return Moves(site, tuple(palette), counts, products.plan(self.jaxpr, variable, updates))

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def groups(self, site: str, shape: tuple[int, ...], keep: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Factors that are evaluated together: those of few colours need not wait for those of many."""
        factors = [self.factors[k] for k in keep]
        costs = [math.prod(int(c.max(initial=-1)) + 1 for c in colours([f], site, shape)) for f in factors]
        few = tuple(k for k, cost in zip(keep, costs, strict=True) if 4 * cost <= max(costs, default=0))
        many = tuple(k for k in keep if k not in few)
        return [group for group in (few, many) if group]

    def touching(self, site: str) -> tuple[int, ...]:
        """Numbers of the factors that depend on a site."""
        return tuple(k for k, f in enumerate(self.factors) if f.maps(site))


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """How the factors change when the coordinates of a site move, colour by colour.

    Attributes:
        site: the site.
        palette: colours of the indices of each of its axes.
        counts: how many colours each axis has.
        plan: what is evaluated once, and what for every colour.
    """

    site: str
    palette: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    plan: products.Plan

    def change(self, program: Program, base: Mapping[Any, Array], here: Array, there: Array) -> Array:
        """Change of the log-density for each coordinate that moves alone from `here` to `there`."""
        axes = {how.latent for how in self.plan.products.values()}
        # Each index of a summed axis is moved alone anyhow, unless other axes have colours too.
        at_once = all(c == 1 for axis in axes for k, c in enumerate(self.counts) if k != axis)
        every = products.deltas(self.plan, base, there) if at_once else None

        def one(colour: Array) -> Array:
            own: list[Array] = []
            for count in reversed(self.counts):
                own.insert(0, colour % count)
                colour = colour // count
            mask = self._mask(own)
            value = jnp.where(mask, there, here)
            deltas = products.deltas(self.plan, base, value) if every is None else every
            after = products.moved(self.plan, base, value, deltas, own)
            return jnp.where(mask, self._placed(program, base, after, mask.shape), 0.0)

        total = math.prod(self.counts)
        if total <= UNROLL:
            return functools.reduce(jnp.add, [one(jnp.array(c)) for c in range(total)])
        return jax.lax.fori_loop(0, total, lambda c, acc: acc + one(c), jnp.zeros(there.shape))

    def _placed(
        self, program: Program, base: Mapping[Any, Array], after: Sequence[Array], shape: tuple[int, ...]
    ) -> Array:
        changes: dict[tuple[tuple[int, ...], Maps], tuple[Factor, Array]] = {}
        for factor, v, new in zip(program.factors, self.plan.outs, after, strict=True):
            part = factor.weight * (new - base[v])
            alike = factor.shape, factor.maps(self.site)
            changes[alike] = factor, changes[alike][1] + part if alike in changes else part
        return functools.reduce(jnp.add, [place(part, factor, self.site, shape) for factor, part in changes.values()])

    def _mask(self, own: Sequence[Array]) -> Array:
        """Which coordinates have this colour; built from the per-axis colours, never stored for all colours."""
        mask = jnp.ones([len(c) for c in self.palette], bool)
        for axis, colour in enumerate(own):
            here = jnp.asarray(self.palette[axis]) == colour
            mask &= jnp.expand_dims(here, [k for k in range(mask.ndim) if k != axis])
        return mask


Difference = Callable[..., Array]
"""Closed form of a factor's differences: (z, moved value of the site, *other arguments) -> array of the site's shape."""


class Factored(eqx.Module):
    """A function of the latents (and other arguments) that is a sum of local factor arrays.

    Attributes:
        program: the traced structure; static.
        consts: arrays that the function had captured; arguments of every compiled use.
        overrides: triples (term name, site, closed form of the whole term's differences, scale included).
    """

    program: Program = eqx.field(static=True)
    consts: tuple[Any, ...]
    overrides: tuple[tuple[str, str, Difference], ...] = eqx.field(static=True, default=())

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors, in the order of `terms`."""
        return self.program.factors

    def _inputs(self, z: Mapping[str, Array], rest: Sequence[PyTree]) -> list[Any]:
        return [*self.consts, *(z[s] for s in self.program.sites), *jax.tree.leaves(rest)]

    def terms(self, z: Mapping[str, Array], *rest: PyTree) -> list[Array]:
        """The factor arrays, unweighted and before their sums."""
        return _jaxprs.evaluate(self.program.jaxpr, self._inputs(z, rest))

    def total(self, terms: Sequence[Array]) -> Array:
        """The log-density: the weighted sum of all factor arrays; a scalar."""
        sums = [f.weight * sum_all(a) for f, a in zip(self.factors, terms, strict=True)]
        return functools.reduce(jnp.add, sums, jnp.zeros(()))

    def signal(self, site: str, shape: tuple[int, ...], terms: Sequence[Array]) -> Array:
        """Local signal f_i of eq. 8/11: for every coordinate, the sum of the terms that touch it."""
        out = jnp.zeros(shape)
        for factor, array in zip(self.factors, terms, strict=True):
            if factor.maps(site):
                out = out + factor.weight * place(array, factor, site, shape)
        return out

    def differences(
        self,
        site: str,
        moved: Array,
        z: Latents,
        *rest: PyTree,
        among: frozenset[str] | None = None,
        numbers: Collection[int] | None = None,
    ) -> Array:
        """Change of the log-density when one coordinate moves, for every coordinate at once.

        Coordinates that share no factor element move together, so the number of evaluations is the number
        of colours, not of coordinates; only factors that touch the site are evaluated. Differences are taken
        element by element before any sum, which keeps them exact in float32.

        Args:
            site: the site that moves.
            moved: its new values, shape (moves, *site shape): move m takes coordinate i to `moved[m, i]`.
            z: the current latents.
            *rest: the other arguments.
            among: names of the terms that count; None for all.
            numbers: numbers of the factors that count, of a term with a closed form all or none; None for all.

        Returns:
            Array (moves, *site shape): `f(z with z_i = moved[m, i]) - f(z)`.
        """
        counted = range(len(self.factors)) if numbers is None else numbers
        wanted = {self.factors[k].name for k in counted}
        wanted = wanted if among is None else wanted & among
        closed = {name: rule for name, owner, rule in self.overrides if owner == site}
        keep = [
            k for k in self.program.touching(site) if k in counted and self.factors[k].name in wanted - closed.keys()
        ]
        out = jnp.zeros(moved.shape)
        for rule in (rule for name, rule in closed.items() if name in wanted):
            out = out + jax.vmap(lambda value, rule=rule: rule(z, value, *rest))(moved)
        if not keep or moved.size == 0:
            return out
        for group in self.program.groups(site, moved.shape[1:], tuple(keep)):
            out = out + self._differences(site, moved, z, rest, group)
        return out

    def _differences(self, site: str, moved: Array, z: Latents, rest: Sequence[PyTree], keep: tuple[int, ...]) -> Array:
        """Differences of some factors, which are evaluated together."""
        program, used = self.program.restrict(keep)
        inputs = [x for x, u in zip(self._inputs(z, rest), used, strict=True) if u]
        position = sum(used[: len(self.consts) + self.program.sites.index(site)])
        moves = program.moves(site, position, moved.shape[1:])
        base = dict(zip(moves.plan.kept, _jaxprs.evaluate(moves.plan.once, inputs), strict=True))

        def change(value: Array) -> Array:
            return moves.change(program, base, z[site], value)

        if math.prod(moves.counts) * len(moved) <= UNROLL:
            return jnp.stack([change(value) for value in moved])
        return jax.lax.map(change, moved)


def factorise(
    fn: Callable[..., Mapping[str, Array]],
    z: Mapping[str, Any],
    *rest: PyTree,
    scales: Mapping[str, float] | None = None,
    overrides: Mapping[tuple[str, str], Difference] | None = None,
    declared: Mapping[str, Mapping[str, Maps]] | None = None,
    indexed: Collection[str] = (),
) -> Factored:
    """Trace `fn(z, *rest)` once and split it into local factors.

    Args:
        fn: returns a dict from term name to array; the log-density is the sum of everything in it.
        z: example latents (arrays or shapes), site name -> value.
        *rest: example values of the other arguments (data, minibatch indices, parameters).
        scales: term name -> number that multiplies it (the plate scale N/B times any user scale).
        overrides: (term name, site) -> closed form of the change of the whole (scaled) term.
        declared: term name -> site -> maps, for terms whose code (sparse kernels) hides its locality from the analysis; its
            author answers for them.
        indexed: sites for which, where locality would be lost otherwise, it is read from values in `rest` too: integers, and
            where matrices of mostly zeros are zero. The program is then that of these values: others make another program.

    Raises:
        TargetError: a term is not a real number.
    """
    sites = tuple(sorted(z))
    leaves, treedef = jax.tree.flatten(rest)
    names: list[str] = []

    def flat(*args: Any) -> list[Array]:
        terms = fn(dict(zip(sites, args, strict=False)), *jax.tree.unflatten(treedef, args[len(sites) :]))
        names.extend(terms)
        return [_real(name, value) for name, value in terms.items()]

    jaxpr, consts, _ = _jaxprs.trace(flat, *(z[s] for s in sites), *leaves)
    jaxpr, more = unfold(_jaxprs.inline(jaxpr))
    consts = [*more, *consts]
    parts = peel(jaxpr)
    for _ in range(PASSES):
        latents = dict(zip(sites, jaxpr.invars[len(consts) :], strict=False))
        pushed = push(jaxpr, parts, list(latents.values()), [latents[s] for s in sites if s in indexed])
        if pushed is None:
            break
        jaxpr, more = pushed
        consts, parts = [*more, *consts], peel(jaxpr)
    if rolled := roll(jaxpr, parts):
        jaxpr, more, parts = rolled
        consts = [*more, *consts]
    jaxpr = _jaxprs.trimmed(_jaxprs.rebuild(jaxpr, outvars=[t.var for t in parts]))
    # Captured arrays stay arguments of the compiled program, but indices among them are part of its structure.
    fixed = _jaxprs.rebuild(jaxpr, invars=jaxpr.invars[len(consts) :], constvars=jaxpr.invars[: len(consts)])
    reading = closest(fixed, sites, leaves, consts, indexed)
    scales = scales or {}
    found = [dict((declared or {}).get(names[t.output], scope)) for t, scope in zip(parts, reading.scopes, strict=True)]
    factors = tuple(
        Factor(
            name=names[t.output],
            shape=tuple(np.shape(t.var.val) if isinstance(t.var, jex.Literal) else t.var.aval.shape),
            weight=t.weight * scales.get(names[t.output], 1.0),
            scope=tuple(sorted((s, m) for s, m in scope.items() if m)),
        )
        for t, scope in zip(parts, found, strict=True)
    )
    program = Program(jaxpr, sites, factors, tuple(reading.losses), _jaxprs.fingerprint(jaxpr), reading.read)
    return Factored(program, tuple(consts), tuple((*key, rule) for key, rule in (overrides or {}).items()))


def _real(name: str, value: Any) -> Array:
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise TargetError(message(f"term {name!r}", "complex numbers", "a real log-density", "take the real part"))
    return value.astype(jnp.result_type(float)) if not jnp.issubdtype(value.dtype, jnp.floating) else value
