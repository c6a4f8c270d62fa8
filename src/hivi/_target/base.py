"""A target: the sites of a model and its log-joint as local factors."""

from __future__ import annotations

import abc
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hivi._compile import compiled
from hivi._errors import TargetError, message, nearest
from hivi._factored import Factored
from hivi._locality.base import Factor
from hivi._locality.reading import unchanged
from hivi._space import Latents, Plate, Site, constrain
from hivi._tree import Key, PyTree

Rows = dict[str, Array]
"""Row numbers of a minibatch: subsampled plate -> integer array of its batch size."""


class Source(abc.ABC):
    """Host-side data of a streamed target: the rows of one plate, loaded for a few steps at a time.

    Nothing in the engine grows with the number of rows but the rows' own variational parameters, which travel with
    their data.
    """

    plate: Plate

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """Number of rows that it has; the plate's size, unless only the rows' own latents are wanted."""

    @abc.abstractmethod
    def passes(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Row numbers of the minibatches of one pass over the data, in random order; each of the plate's batch size."""

    @abc.abstractmethod
    def blocks(self) -> list[np.ndarray]:
        """Every row once, in full batches; -1, at the end of a batch, stands for an empty row where there are too few."""

    @abc.abstractmethod
    def load(self, batches: Sequence[np.ndarray]) -> PyTree:
        """The data of these batches, stacked along a leading axis of steps."""


class AbstractOrigin(abc.ABC):
    """The model that a target was made of, ready to be run again: for predictions and likelihoods by observation.

    All are equal, since no compiled program depends on them: data of the same shapes compile nothing anew. An origin
    holds no data; they are the target's.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AbstractOrigin)

    def __hash__(self) -> int:
        return 0

    @abc.abstractmethod
    def observed(self, data: PyTree, draws: Latents) -> dict[str, Observed]:
        """The observed statements, by name; `draws` are latents in the model's own space, with a leading axis."""

    @abc.abstractmethod
    def log_likelihood(self, data: PyTree, draws: Latents) -> dict[str, Array]:
        """Log-probability of every observation at every draw, in nats: statement -> (samples, *batch shape)."""

    @abc.abstractmethod
    def predict(self, data: PyTree, draws: Latents, key: Key) -> dict[str, Array]:
        """New observations, and deterministic values, at every draw: statement -> (samples, *shape)."""


class Observed(NamedTuple):
    """An observed statement: its value, and the plates of its axes, as pairs (plate, axis)."""

    value: np.ndarray
    plates: tuple[tuple[str, int], ...]


class Target(eqx.Module):
    """An unnormalised log-density log p(x, z) over named latent sites.

    Made by `hivi.from_log_joint`, `hivi.from_numpyro` and their relatives. Continuous sites are in unconstrained
    coordinates (the Jacobian is one of the factors), discrete ones hold integers.

    Attributes:
        name: what messages call it.
        sites: the latent sites; static.
        factored: log p as a sum of local factors of (z, data, rows).
        data: arrays that the model reads; arguments of every compiled use, so that new data of the same shapes
            compile nothing anew. Where locality rests on integers or zeros among them, others are refused.
        plates: the subsampled plates.
        notes: what was decided while the model was read, for `hivi.explain`.
        constrainer: map to the model's own space, where supports depend on latents.
        source: where the data of a streamed target come from; `data` then holds one example minibatch.
        closed: real sites w whose expectation can be taken in closed form, because every term is linear in w or in e^w, or
            convex in w (where E[w] gives a lower bound, by Jensen's inequality).
        views: pairs (term, "mean" or "logmeanexp"): at which mean of those sites a term is evaluated; "mean" if unlisted.
        averaged: real sites w that are drawn, but whose terms in the view "logmeanexp" (or "logmeanexp NAME", for that site
            alone) are linear in e^w: there log E[e^w] takes the place of the draw, where the family knows it.
        starts: site -> mean in the model's own space at which a fit starts, or one row of it for a local site.
        features: (central values of global sites, data) -> features of the rows, for inference networks; no gradient.
        origin: the model itself, where it can be run again.
    """

    name: str = eqx.field(static=True)
    sites: tuple[Site, ...] = eqx.field(static=True)
    factored: Factored
    data: PyTree
    plates: tuple[Plate, ...] = eqx.field(static=True, default=())
    notes: tuple[str, ...] = eqx.field(static=True, default=())
    constrainer: Callable[..., Latents] | None = None
    source: Source | None = eqx.field(static=True, default=None)
    closed: tuple[str, ...] = eqx.field(static=True, default=())
    views: tuple[tuple[str, str], ...] = eqx.field(static=True, default=())
    averaged: tuple[str, ...] = eqx.field(static=True, default=())
    starts: dict[str, Array] = eqx.field(default_factory=dict)
    features: Callable[[Latents, PyTree], Array] | None = eqx.field(static=True, default=None)
    origin: AbstractOrigin | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        self.check_data()

    def check_data(self) -> None:
        """Refuse other indices, or zeros of a matrix, than those that locality was read from.

        Raises:
            TargetError: the data were replaced by others.
        """
        leaves = jax.tree.leaves(self.data) if self.factored.program.read else []
        for k, known in self.factored.program.read:
            here = leaves[k] if k < len(leaves) else None
            array = isinstance(here, jax.Array | np.ndarray) and not isinstance(here, jax.core.Tracer)
            if array and not unchanged(np.asarray(here), known):
                text = "other integers or zeros than those from which it was read which datum meets which latent"
                cure = "make a new target of the new data"
                raise TargetError(message(f"target {self.name!r}, data", text, "the same integers and zeros", cure))

    def __repr__(self) -> str:
        """Name and sites; `hivi.explain` says the rest."""
        sites = ", ".join(f"{s.name} {s.values} {s.shape}" for s in self.sites)
        return f"Target({self.name!r}: {sites}; {len(self.factored.factors)} terms)"

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            TargetError: there is none.
        """
        for s in self.sites:
            if s.name == name:
                return s
        names = [s.name for s in self.sites]
        cure = nearest(name, names, "correct the name")
        raise TargetError(message(f"site {name!r}", "no such latent", f"one of {names}", cure))

    def all_rows(self) -> Rows:
        """The first `batch` rows of every subsampled plate."""
        return {p.name: jnp.arange(p.batch) for p in self.plates}

    def minibatch(self, key: Key) -> Rows:
        """Rows drawn without replacement, uniformly, from every subsampled plate."""
        keys = jax.random.split(key, max(len(self.plates), 1))
        return {p.name: distinct_rows(k, p.size, p.batch) for p, k in zip(self.plates, keys, strict=False)}

    def terms(self, z: Latents, rows: Rows | None = None) -> list[Array]:
        """The factor arrays at one z, unweighted and before their sums."""
        return self.factored.terms(z, self.data, self.all_rows() if rows is None else rows)

    def log_joint(self, z: Latents, rows: Rows | None = None) -> Float[Array, ""]:
        """Log p(x, z) in nats, in the engine's coordinates; with a minibatch an unbiased estimate."""
        return self.factored.total(self.terms(z, rows))

    def constrain(self, z: Latents) -> Latents:
        """Map one draw from the engine's coordinates to the model's own space."""
        if self.constrainer is not None:
            return self.constrainer(z)
        return constrain(self.sites, z)


def bounded(target: Target) -> str:
    """The cures for impossible values of counts and of categories, to go on with; empty where there are none."""
    counts = ", ".join(repr(s.name) for s in target.sites if s.values.ordered)
    finite = ", ".join(repr(s.name) for s in target.sites if s.values.kind == "finite" and s.values.count > 2)
    parts = []
    if counts or finite:
        bound = f"if data bound a count ({counts or finite}), as in y ~ Binomial(n, p) with n below y impossible"
        parts.append(f"{bound}, take n - y as the latent")
    if finite:
        parts.append(
            f"if the model gives some values of {finite} no probability (a zero of a transition matrix), give them 1e-6"
        )
    return f"; {'; '.join(parts)} (docs/discrete.md)" if parts else ""


def full_size(target: Target) -> bool:
    """Whether every plate is seen whole."""
    return all(p.batch == p.size for p in target.plates)


def distinct_rows(key: Key, size: int, batch: int) -> Int[Array, " batch"]:
    """`batch` distinct rows of `size`, each row equally likely.

    A permutation of all rows costs time with the size of the data, so for a small share of many rows a keyed Feistel
    network permutes only the positions 0..batch-1 (walking on until it lands below `size`).
    """
    if size < 4096 or 4 * batch > size:
        return jax.random.permutation(key, size)[:batch]
    half = (size - 1).bit_length() // 2 + 1
    low = jnp.uint32((1 << half) - 1)
    secrets = jax.random.bits(key, (6,), jnp.uint32)

    def network(x: Array) -> Array:
        left, right = x >> half, x & low
        for secret in secrets:
            mixed = (right + secret) * jnp.uint32(0x9E3779B1)
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA77)
            left, right = right, left ^ ((mixed ^ (mixed >> 13)) & low)
        return (left << half) | right

    def walk(x: Array) -> Array:
        return jnp.where(x < size, x, network(x))

    rows = network(jnp.arange(batch, dtype=jnp.uint32))
    return jax.lax.while_loop(lambda x: jnp.any(x >= size), walk, rows).astype(jnp.int32)


@compiled(effort="quick")
def terms_of_draws(target: Target, draws: Latents) -> list[Array]:
    """The factor arrays of log p at draws, each with a leading axis over them."""
    return jax.vmap(target.terms)(draws)


def check_start(target: Target, draws: Mapping[str, Array]) -> None:
    """Refuse a log-joint that is not a number somewhere it must be.

    Args:
        target: the target.
        draws: site -> values with a leading axis over draws, in the engine's coordinates.

    Raises:
        TargetError: NaN in a factor (naming it and the first element), or -inf or +inf at every draw.
    """
    terms = [np.asarray(values) for values in terms_of_draws(target, dict(draws))]
    for factor, values in zip(target.factored.factors, terms, strict=True):
        bad = np.isnan(values)
        if bad.any():
            first = [int(i) for i in np.argwhere(bad)[0][1:]]
            raise TargetError(
                message(
                    f"factor {factor.name!r}",
                    f"NaN at element {first}" if first else "NaN",
                    "a finite log-probability",
                    "look for missing values in the data (mask them before they enter the density, with jnp.where "
                    "on the data) and for parameters outside their range",
                )
            )
    for factor, values in zip(target.factored.factors, terms, strict=True):
        flat = values.reshape(values.shape[0], -1)
        if np.isinf(flat).any(-1).all():
            element = [int(i) for i in np.argwhere(np.isinf(values))[0][1:]]
            raise TargetError(
                message(
                    f"factor {factor.name!r}",
                    f"an infinite log-probability at every one of {values.shape[0]} starting draws (element {element})",
                    "a finite log-probability where q puts its mass",
                    "check that observations lie in their distribution's support, and that no latent value is impossible"
                    + bounded(target),
                )
            )


def explain(target: Target) -> str:
    """Describe a target: its sites, its factors with their scopes, and where locality was lost and why.

    Args:
        target: any target.

    Returns:
        A table as text. A scope like `z[i, *]` says: element i of the factor touches row i, and any column. A site that
        is "real, unconstrained from positive" has the logarithm of the model's positive value as its coordinate, and
        its shape is that of the coordinates. Factors that would read the same are one row, with their number.

    Raises:
        TargetError: no target.

    Example:
        >>> import hivi
        >>> target = hivi.from_log_joint(lambda z: -z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> print(hivi.explain(target).splitlines()[0])
        target log_joint: 1 latent site, 1 factor
    """
    if not isinstance(target, Target):
        found, cure = f"a {type(target).__name__}", "make one of it by hivi.from_numpyro or hivi.from_log_joint"
        raise TargetError(message("explain(target)", found, "a target", cure))
    count, factors = len(target.sites), len(target.factored.factors)
    lines = [
        f"target {target.name}: {count} latent site{'s' * (count != 1)}, {factors} factor{'s' * (factors != 1)}",
        "",
        "sites",
    ]
    lines += _table([_site_row(s) for s in target.sites])
    lines += ["", "factors"]
    rows = Counter(_factor_row(f) for f in target.factored.factors)
    lines += _table([(*row, "" if same == 1 else f"({same} alike)") for row, same in rows.items()])
    losses = sorted({(x.site, x.primitive, x.reason) for x in target.factored.program.losses})
    lines += ["", "locality lost" if losses else "locality lost: nowhere"]
    lines += [f"  {site}: {primitive}: {reason}" for site, primitive, reason in losses]
    if target.notes:
        lines += ["", "notes", *(f"  {note}" for note in target.notes)]
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as lines, with columns as wide as their longest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _site_row(s: Site) -> tuple[str, ...]:
    plates = ", ".join(f"{name} (axis {axis})" for name, axis in s.plates) or "-"
    local = "" if s.local is None else f"minibatches of {s.local[0].batch} of {s.local[0].size}"
    kind = str(s.values) if s.discrete else _coordinates(s)
    return s.name, f"shape {s.shape}", kind, f"plates {plates}", local


def _factor_row(f: Factor) -> tuple[str, ...]:
    scope = ", ".join(_maps(name, maps) for name, maps in f.scope) or "(no latent)"
    return f.name, f"shape {f.shape}", f"weight {f.weight:.4g}", f"touches {scope}"


def _coordinates(s: Site) -> str:
    """What a continuous site's coordinates are: real values, or unconstrained ones of another support."""
    support: Any = s.support
    if support is None:
        return "real, unconstrained from a support that depends on latents or arrays"
    while hasattr(support, "base_constraint"):  # NumPyro's own class: `to_event` hides the support inside
        support = support.base_constraint
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(support).__name__.lstrip("_")).lower()
    if name == "real":
        return "real"
    bounds = [str(b) if jnp.ndim(b) == 0 else f"array {jnp.shape(b)}" for b in jax.tree.leaves(support)]
    shape = "" if s.shape == s.constrained_shape else f" of shape {s.constrained_shape}"
    return f"real, unconstrained from {name}" + (f"({', '.join(bounds)})" if bounds else "") + shape


def _maps(site: str, maps: Any) -> str:
    ordered = sorted(maps, key=lambda m: [(type(e).__name__, e) for e in m])
    fixed = [m for m in ordered if len(m) == 1 and type(m[0]).__name__ == "Const"]
    shown = _ranges([m[0].index for m in fixed]) + [", ".join(_entry(e) for e in m) for m in ordered if m not in fixed]
    counted = Counter(shown)  # different tables read alike
    return " and ".join(f"{site}[{entry}]" + (f" ({n} tables)" if n > 1 else "") for entry, n in counted.items())


def _ranges(places: list[int]) -> list[str]:
    """Places, three and more in a row as a slice."""
    runs = [[k for _, k in run] for _, run in itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])]
    return [text for r in runs for text in ([f"{r[0]}:{r[-1] + 1}"] if len(r) > 2 else map(str, r))]


def _entry(entry: Any) -> str:
    kind = type(entry).__name__
    if kind == "All":
        return "*"
    if kind == "Const":
        return str(entry.index)
    if kind == "Table":
        return f"table[{', '.join('ijklmnop'[a] for a in entry.axes)}]"
    letter = "ijklmnop"[entry.axis]
    stride = "" if entry.stride == 1 else f"{entry.stride}"
    return f"{stride}{letter}{entry.offset:+d}" if entry.offset else f"{stride}{letter}"
