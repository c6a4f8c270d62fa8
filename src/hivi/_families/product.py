"""Products of families over groups of sites."""

from __future__ import annotations

import re
from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message, nearest
from hivi._families.base import AbstractFamily, AbstractProposal, Conditional, rate_for
from hivi._families.rows import by_rows
from hivi._space import Latents, Plate, Site
from hivi._tree import Key, PyTree


def build_proposal(
    family: AbstractFamily | Mapping[str, AbstractFamily], sites: tuple[Site, ...], key: Key
) -> AbstractProposal:
    """Build a family, or a dict of families, for the sites of a target.

    The keys of a dict are site names or regular expressions that match whole names; the first that matches takes a site,
    and all sites of one key are fitted jointly. Sites of a subsampled plate are independent rows: a family that is
    not mean-field is then built for one row, and its parameters repeated for every row.

    Raises:
        FamilyError: a site without a family, or a key that matches none.
    """
    groups = grouped(family, sites)
    parts = []
    for k, (member, group) in zip(jax.random.split(key, len(groups)), groups, strict=True):
        for k2, (plate, some) in zip(jax.random.split(k, len(group)), _by_plate(member, group).items(), strict=False):
            k3, k4 = jax.random.split(k2)
            if member.inner() is not member:  # amortised
                parts.append(_amortised(member, some, k3, k4))
            else:
                parts.append(member.build(some, k2) if plate is None else by_rows(member, some, plate, k2))
    return parts[0] if len(parts) == 1 else ProductProposal(tuple(s for p in parts for s in p.sites), tuple(parts))


def _amortised(member: AbstractFamily, sites: tuple[Site, ...], k_rows: Key, k_network: Key) -> AbstractProposal:
    """The proposal of an inference network: its row, and the network that gives the parameters of each row."""
    one, local = member.inner(), member.localised(sites)
    plate, axes = next((s.local[0], {t.local[1] for t in local if t.local}) for s in local if s.local is not None)
    rows = one.build(local, k_rows) if one.native_plates() and axes == {0} else by_rows(one, local, plate, k_rows)
    return member.over_rows(rows, k_network)


def grouped(
    family: AbstractFamily | Mapping[str, AbstractFamily], sites: tuple[Site, ...]
) -> list[tuple[AbstractFamily, tuple[Site, ...]]]:
    """The groups of sites that are fitted jointly, each with its family, in the order of the keys.

    Raises:
        FamilyError: a site without a family, or a key that matches none.
    """
    if isinstance(family, AbstractFamily):
        return [(family, sites)]
    if not isinstance(family, Mapping):
        raise FamilyError(
            message(
                "family", repr(family), "a family or a dict {site or pattern: family}", "for example hivi.MeanField()"
            )
        )
    for key, member in family.items():
        if not isinstance(member, AbstractFamily):
            found = repr(member)[:60] + (", a class: call it" if isinstance(member, type) else "")
            raise FamilyError(message(f"family key {key!r}", found, "a family", "for example hivi.MeanField()"))
    taken: dict[str, list[Site]] = {pattern: [] for pattern in family}
    alone: list[str] = []
    for site in sites:
        pattern = next((p for p in family if p == site.name or re.fullmatch(p, site.name)), None)
        if pattern is None:
            alone.append(site.name)
        else:
            taken[pattern].append(site)
    names = [s.name for s in sites]
    for pattern in (p for p, group in taken.items() if not group):  # first: a misspelt key leaves its site without one
        cure = nearest(pattern, alone, "correct the name, or drop the key")
        raise FamilyError(
            message(f"family key {pattern!r}", "no site that it matches", f"one of the sites {names}", cure)
        )
    if alone:
        found, cure = f"no family among the keys {list(family)}", 'add a key for it, or a last key ".*"'
        raise FamilyError(message(f"site {alone[0]!r}", found, "one family for every site", cure))
    return [(family[pattern], tuple(group)) for pattern, group in taken.items()]


def _by_plate(family: AbstractFamily, sites: tuple[Site, ...]) -> dict[Plate | None, tuple[Site, ...]]:
    """Split a group into its global sites and those of each subsampled plate."""
    if family.native_plates():
        return {None: sites}
    out: dict[Plate | None, tuple[Site, ...]] = {}
    for s in sites:
        plate = None if s.local is None else s.local[0]
        out[plate] = (*out.get(plate, ()), s)
    return out


class ProductProposal(AbstractProposal):
    """Independent proposals over disjoint groups of sites."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    parts: tuple[AbstractProposal, ...]

    @property
    def branches(self) -> int:
        total = 1
        for p in self.parts:
            total *= p.branches
        return total

    @property
    def plain(self) -> bool:
        return all(p.plain for p in self.parts)

    @property
    def learning_rate(self) -> float:
        return rate_for(self.sites) if self.plain else min(p.learning_rate for p in self.parts)

    def apart(self, key: Key) -> ProductProposal:
        keys = jax.random.split(key, len(self.parts))
        return ProductProposal(self.sites, tuple(p.apart(k) for p, k in zip(self.parts, keys, strict=True)))

    def log_weights(self) -> Float[Array, " branches"]:
        out = jnp.zeros(1)
        for p in self.parts:
            out = (out[:, None] + p.log_weights()[None, :]).reshape(-1)
        return out

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self.redrawn({}, key, branch)

    def redrawn(self, values: Latents, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        z: Latents = {}
        contexts, rest = [], branch
        for p, k in reversed(list(zip(self.parts, jax.random.split(key, len(self.parts)), strict=True))):
            draw, context = p.redrawn(values, k, rest % p.branches)
            rest = rest // p.branches
            z |= draw
            contexts.append(context)
        return z, tuple(reversed(contexts))

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        terms: dict[str, Array] = {}
        keys = jax.random.split(key, len(self.parts))
        for number, (p, c, k) in enumerate(zip(self.parts, context, keys, strict=True)):
            own = {n: z[n] for n in (*(s.name for s in p.sites), *p.hidden(c)) if n in z}
            terms |= {f"{name}#{number}": value for name, value in p.log_q(own, c, k, inner).items()}
        return terms

    def hidden(self, context: PyTree) -> Latents:
        return {n: v for p, c in zip(self.parts, context, strict=True) for n, v in p.hidden(c).items()}

    @property
    def above(self) -> tuple[Site, ...]:
        return tuple(s for p in self.parts for s in p.above)

    def landable(self, site: str) -> bool:
        return any(p.landable(site) for p in self.parts)

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        terms: dict[str, Array] = {}
        for number, (p, c) in enumerate(zip(self.parts, context, strict=True)):
            own = {s.name: z[s.name] for s in p.sites}
            if any(p.landable(n) for n in sites & own.keys()):
                terms |= {f"{name}#{number}": value for name, value in p.landed(own, c, sites).items()}
        return terms

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        keys = jax.random.split(key, len(self.parts))
        own = [{s.name: z[s.name] for s in p.sites} for p in self.parts]
        parts = [p.log_density(v, k, samples) for p, v, k in zip(self.parts, own, keys, strict=True)]
        return sum(parts, jnp.zeros(()))

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        return {n: v for p, c in zip(self.parts, context, strict=True) for n, v in p.conditionals(c).items()}

    def gather(self, rows: dict[str, Array]) -> ProductProposal:
        return ProductProposal(self.sites, tuple(p.gather(rows) for p in self.parts))

    def divided(self, names: frozenset[str]) -> tuple[AbstractProposal | None, AbstractProposal | None]:
        sides = zip(*(p.divided(names) for p in self.parts), strict=True)
        outside, inside = (tuple(p for p in side if p is not None) for side in sides)
        return _together(outside), _together(inside)

    def row_terms(self, plate: str) -> dict[str, int]:
        return {f"{name}#{k}": axis for k, p in enumerate(self.parts) for name, axis in p.row_terms(plate).items()}

    def scales(self) -> dict[str, float]:
        return {f"{name}#{k}": v for k, p in enumerate(self.parts) for name, v in p.scales().items()}

    def score_weight(self, inner: int) -> float:
        return min(p.score_weight(inner) for p in self.parts)

    def parameters(self) -> dict[str, Array]:
        return {n: v for p in self.parts for n, v in p.parameters().items()}

    def near(self, means: dict[str, Array]) -> ProductProposal:
        return ProductProposal(self.sites, tuple(p.near(means) for p in self.parts))

    @property
    def amortised(self) -> bool:
        return any(p.amortised for p in self.parts)

    @property
    def upstream(self) -> frozenset[str]:
        return frozenset().union(*(p.upstream for p in self.parts))

    @property
    def points(self) -> frozenset[str]:
        return frozenset().union(*(p.points for p in self.parts))

    @property
    def inferred(self) -> frozenset[str]:
        return frozenset().union(*(p.inferred for p in self.parts))

    def unseen(self, features: Mapping[str, Array], sites: tuple[Site, ...]) -> ProductProposal:
        parts = tuple(p.unseen(features, sites) for p in self.parts)
        return ProductProposal(tuple(s for p in parts for s in p.sites), parts)

    def bare(self) -> ProductProposal:
        return ProductProposal(self.sites, tuple(p.bare() for p in self.parts))

    def given(self, features: Array | None) -> ProductProposal:
        return ProductProposal(self.sites, tuple(p.given(features) for p in self.parts))

    def centre(self) -> Latents:
        return {n: v for p in self.parts for n, v in p.centre().items()}

    def expecting(self, sites: tuple[str, ...], plug_in: bool = False) -> ProductProposal:
        return ProductProposal(self.sites, tuple(p.expecting(sites, plug_in) for p in self.parts))

    def views(self) -> dict[str, Latents]:
        out: dict[str, Latents] = {}
        for p in self.parts:
            for view, means in p.views().items():
                out.setdefault(view, {}).update(means)
        return out

    def natural(self, gradient: PyTree) -> PyTree:
        return ProductProposal(self.sites, tuple(p.natural(g) for p, g in zip(self.parts, gradient.parts, strict=True)))

    def roles(self) -> PyTree:
        return ProductProposal(self.sites, tuple(p.roles() for p in self.parts))

    def owned(self) -> PyTree:
        return ProductProposal(self.sites, tuple(p.owned() for p in self.parts))


def _together(parts: tuple[AbstractProposal, ...]) -> AbstractProposal | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    return ProductProposal(tuple(s for p in parts for s in p.sites), parts)
