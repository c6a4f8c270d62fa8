"""Structured products: the parameters of a group of sites depend on the values that were drawn for earlier groups."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message
from hivi._families.base import AbstractFamily, AbstractProposal, Conditional, Layout
from hivi._families.networks import check_width
from hivi._families.product import build_proposal, grouped
from hivi._families.rows import by_rows
from hivi._likelihood import likelihood
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree


class Structured(AbstractFamily):
    """q(z) = q(z_1) q(z_2 | z_1) q(z_3 | z_1, z_2) ...: a product of families whose order is that of the dict.

    Each later group has its family's own parameters plus a learned function of the earlier groups' draws, linear unless a
    network is given: theta_2(z_1) = theta_2 + W h(z_1), where h is the standardised value of continuous sites and the
    features of discrete ones. It starts at W = 0, the plain product (Hoffman & Blei 2015).
    Continuous earlier groups have the pathwise gradient; discrete ones that of the score, with the whole log-weight as its
    signal, since all later draws depend on them. Sites that all belong to one subsampled plate are structured row by row.

    Args:
        groups: site name or pattern -> family, the first group first.
        networks: key of a later group -> Equinox module from the vector h of all earlier groups to the vector of the
            group's parameters, in place of W. Its output counts from zero, by a learned factor.

    Raises:
        FamilyError: fewer than two groups, or a later group that cannot depend on earlier ones.

    Example:
        >>> import hivi, jax, jax.numpy as jnp
        >>> target = hivi.from_log_joint(
        ...     lambda z: -0.5 * z["a"] ** 2 - 0.5 * (z["w"] - 3 * z["a"]) ** 2,
        ...     latents={"a": hivi.Latent(), "w": hivi.Latent()},
        ... )
        >>> family = hivi.Structured({"a": hivi.MeanField(), "w": hivi.MeanField()})
        >>> fit = hivi.fit(target, family, key=jax.random.key(0), steps=1500, progress=False)
        >>> bool(abs(fit.elbo(jax.random.key(1)).mean - jnp.log(2 * jnp.pi)) < 0.05)
        True
    """

    groups: tuple[tuple[str, AbstractFamily], ...]
    networks: Mapping[str, Any] | None = None

    def __init__(
        self,
        groups: Mapping[str, AbstractFamily] | Iterable[tuple[str, AbstractFamily]],
        networks: Mapping[str, Any] | None = None,
    ):
        self.groups = tuple(dict(groups).items())
        self.networks = networks
        later = [name for name, _ in self.groups[1:]]
        if not later:
            cure = "name at least two, the first one first, or use the family itself"
            raise FamilyError(message("Structured()", f"{len(self.groups)} group(s)", "two groups of sites", cure))
        for name in networks or {}:
            if name not in later:
                cure = "give networks to later groups only, under the keys of the groups"
                raise FamilyError(message(f"Structured(networks=...) key {name!r}", "no later group", f"{later}", cure))

    def native_plates(self) -> bool:
        return True

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        plates = {s.local[0] if s.local is not None else None for s in sites}
        plate = next(iter(plates))
        if len(plates) == 1 and plate is not None:
            return by_rows(self, sites, plate, key)
        found = grouped(dict(self.groups), sites)
        keys = jax.random.split(key, len(found))
        parts = tuple(build_proposal(f, own, k) for (f, own), k in zip(found, keys, strict=True))
        names = tuple(name for name, _ in self.groups)
        for number, (name, p) in enumerate(zip(names, parts, strict=True)):
            _check(name, p, first=number == 0, last=number == len(parts) - 1)
        standard = tuple(_standardised(p) for p in parts)
        maps: list[AbstractMap] = []
        given = 0
        for number, (name, p) in enumerate(zip(names, parts, strict=True)):
            if number > 0:
                maps.append(_start(name, p, given, (self.networks or {}).get(name)))
            if number < len(parts) - 1:
                given += jax.eval_shape(lambda p=p, s=standard[number]: _inputs(p, s, p.propose(key)[0])).shape[0]
        ordered = tuple(s for p in parts for s in p.sites)
        return StructuredProposal(ordered, parts, tuple(maps), standard)


def _check(name: str, part: AbstractProposal, first: bool, last: bool) -> None:
    rows = [s.name for s in part.sites if s.local is not None]
    found, cure = None, ""
    if part.amortised:
        found = "an inference network, whose parameters are those of a row's data"
        cure = "put the structure inside: hivi.Amortised(hivi.Structured({...}))"
    elif part.points and not first:
        found, cure = "Delta(), whose value would follow earlier draws", "make it the first group, or use MeanField()"
    elif part.branches > 1 and not first:
        found, cure = "a mixture, whose weights are those of stratified draws", "make it the first group, or use Flow()"
    elif rows and not last:
        found = f"the sites {rows} of a subsampled plate, before other groups"
        cure = "put global groups first; rows that depend on each other go into one Structured of that plate's sites"
    if found is not None:
        raise FamilyError(message(f"Structured() at group {name!r}", found, "a group that others can depend on", cure))


def _standardised(part: AbstractProposal) -> bool:
    """Whether the values of a group have a location and a scale of their own."""
    if any(s.discrete or s.local is not None for s in part.sites):
        return False
    try:
        part.affine()
    except FamilyError:
        return False
    return True


def _inputs(part: AbstractProposal, standard: bool, z: Latents) -> Float[Array, " inputs"]:
    """What later groups see of a group's values."""
    if standard:
        location, scale = part.affine()
        return (Layout(part.sites).flatten(z) - location) / scale
    seen = [likelihood(s).features(z[s.name])[..., 1:] if s.discrete else z[s.name] for s in part.sites]
    return jnp.concatenate([jnp.ravel(x) for x in seen])


class AbstractMap(eqx.Module):
    """From what is seen of earlier groups to a later group's parameters."""

    @abc.abstractmethod
    def shift(self, own: PyTree, given: Float[Array, " inputs"]) -> PyTree:
        """The group's own parameters, moved."""

    @abc.abstractmethod
    def gather(self, part: AbstractProposal, rows: dict[str, Array]) -> AbstractMap:
        """The map for one minibatch of the group's rows."""


class Linear(AbstractMap):
    """W, as a tree like the group's parameters with a last axis over the inputs."""

    weights: PyTree

    def shift(self, own: PyTree, given: Array) -> PyTree:
        return jax.tree.map(lambda x, w: x + w @ given, own, self.weights)

    def gather(self, part: AbstractProposal, rows: dict[str, Array]) -> Linear:
        """Each column of W is a tree of parameters, whose rows are taken as the group takes its own."""
        rest = eqx.filter(part, eqx.is_inexact_array, inverse=True)

        def column(arrays: PyTree) -> PyTree:
            return eqx.filter(eqx.combine(arrays, rest).gather(rows), eqx.is_inexact_array)

        return Linear(jax.vmap(column, in_axes=-1, out_axes=-1)(self.weights))


class Gated(AbstractMap):
    """A network whose output is multiplied by a learned number that starts at zero."""

    network: Any
    gate: Float[Array, ""]

    def shift(self, own: PyTree, given: Array) -> PyTree:
        flat, back = jax.flatten_util.ravel_pytree(own)
        return back(flat + self.gate * self.network(given))

    def gather(self, part: AbstractProposal, rows: dict[str, Array]) -> Gated:
        return self


def _start(name: str, part: AbstractProposal, inputs: int, network: Any) -> AbstractMap:
    """W = 0, or the network, shut off."""
    own = eqx.filter(part, eqx.is_inexact_array)
    if network is None:
        return Linear(jax.tree.map(lambda x: jnp.zeros((*x.shape, inputs), x.dtype), own))
    where = f"Structured(networks=...) at group {name!r}"
    if any(s.local is not None for s in part.sites):
        cure = "leave its network out: each row has a linear map of its own"
        raise FamilyError(message(where, "sites of a subsampled plate", "global sites", cure))
    check_width(where, network, (inputs,), sum(x.size for x in jax.tree.leaves(own)))
    return Gated(network, jnp.zeros(()))


class StructuredContext(NamedTuple):
    """What drew the values: each group's own context, and what it saw of earlier groups."""

    contexts: tuple[PyTree, ...]
    inputs: tuple[Array, ...]


class StructuredProposal(AbstractProposal):
    """Groups in their order, and what the later ones make of earlier draws.

    Attributes:
        groups: the proposals at h = 0.
        maps: of each later group.
        standard: of each group, whether its values are seen standardised.
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    groups: tuple[AbstractProposal, ...]
    maps: tuple[AbstractMap, ...]
    standard: tuple[bool, ...] = eqx.field(static=True)

    @property
    def upstream(self) -> frozenset[str]:
        inside = frozenset().union(*(p.upstream for p in self.groups))
        return inside | {s.name for p in self.groups[:-1] for s in p.sites if s.discrete}

    @property
    def points(self) -> frozenset[str]:
        return frozenset().union(*(p.points for p in self.groups))

    @property
    def branches(self) -> int:
        return self.groups[0].branches

    def log_weights(self) -> Float[Array, " branches"]:
        return self.groups[0].log_weights()

    def score_weight(self, inner: int) -> float:
        return min(p.score_weight(inner) for p in self.groups)

    def _at(self, number: int, inputs: tuple[Array, ...]) -> AbstractProposal:
        """A group at the inputs of earlier ones."""
        part = self.groups[number]
        if number == 0:
            return part
        own, rest = eqx.partition(part, eqx.is_inexact_array)
        return eqx.combine(self.maps[number - 1].shift(own, jnp.concatenate(inputs[:number])), rest)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, StructuredContext]:
        return self.redrawn({}, key, branch)

    def redrawn(self, values: Latents, key: Key, branch: Array | int = 0) -> tuple[Latents, StructuredContext]:
        z: Latents = {}
        contexts: tuple[PyTree, ...] = ()
        inputs: tuple[Array, ...] = ()
        for number, k in enumerate(jax.random.split(key, len(self.groups))):
            part = self._at(number, inputs)
            draw, context = part.redrawn(values, k, branch if number == 0 else 0)
            draw = {n: values.get(n, v) for n, v in draw.items()}
            z, contexts = z | draw, (*contexts, context)
            if number < len(self.groups) - 1:
                inputs = (*inputs, _inputs(part, self.standard[number], draw))
        return z, StructuredContext(contexts, inputs)

    def log_q(self, z: Latents, context: StructuredContext, key: Key, inner: int = 0) -> dict[str, Array]:
        # Later groups stay at what they were drawn from: no strategy moves a value on which other draws depend.
        terms: dict[str, Array] = {}
        for number, k in enumerate(jax.random.split(key, len(self.groups))):
            part, own = self._at(number, context.inputs), context.contexts[number]
            values = {n: z[n] for n in (*(s.name for s in part.sites), *part.hidden(own)) if n in z}
            terms |= {f"{name}#{number}": v for name, v in part.log_q(values, own, k, inner).items()}
        return terms

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        total = jnp.zeros(())
        inputs: tuple[Array, ...] = ()
        for number, k in enumerate(jax.random.split(key, len(self.groups))):
            part = self._at(number, inputs)
            values = {s.name: z[s.name] for s in part.sites}
            total = total + part.log_density(values, k, samples)
            if number < len(self.groups) - 1:
                inputs = (*inputs, _inputs(part, self.standard[number], values))
        return total

    def hidden(self, context: StructuredContext) -> Latents:
        found = zip(self.groups, context.contexts, strict=True)
        return {n: v for p, c in found for n, v in p.hidden(c).items()}

    @property
    def above(self) -> tuple[Site, ...]:
        return tuple(s for p in self.groups for s in p.above)

    def conditionals(self, context: StructuredContext) -> dict[str, Conditional]:
        """Of the last group and of all discrete sites: the draws of continuous ones before it carry its gradient on."""
        out: dict[str, Conditional] = {}
        last = len(self.groups) - 1
        for number, c in enumerate(context.contexts):
            part = self._at(number, context.inputs)
            real = {s.name for s in part.sites if not s.discrete} if number < last else set()
            out |= {n: v for n, v in part.conditionals(c).items() if n not in real}
        return out

    def gather(self, rows: dict[str, Array]) -> StructuredProposal:
        maps = tuple(how.gather(p, rows) for p, how in zip(self.groups[1:], self.maps, strict=True))
        return StructuredProposal(self.sites, tuple(p.gather(rows) for p in self.groups), maps, self.standard)

    def scales(self) -> dict[str, float]:
        return {f"{name}#{k}": v for k, p in enumerate(self.groups) for name, v in p.scales().items()}
