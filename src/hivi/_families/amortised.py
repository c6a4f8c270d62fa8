"""Inference networks: the parameters of a row's proposal as the output of an encoder of that row's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message
from hivi._families.base import AbstractFamily, AbstractProposal, Conditional
from hivi._families.mean_field import MeanField
from hivi._families.networks import Kept, check_width, perceptron
from hivi._space import Latents, Plate, Site
from hivi._tree import Key, PyTree


class Amortised(AbstractFamily):
    """One encoder instead of parameters per row: own parameters of row n = start + skip(x_n) + encoder(x_n).

    q(z) = prod_n q(z_n | start + encoder(x_n)) over the rows of a plate (Kingma & Welling 2014; Gershman & Goodman 2014).
    Unseen rows need no fitting: `fit.rows(x)`. The default encoder's last layer starts at zero, so that the fit starts
    where it would without it. Parameters that rows share, such as the flow of `Hierarchical(shared=True)`, stay shared.

    Args:
        family: the family of a row: `MeanField()`, `FullRank()`, `Flow()` or `Hierarchical()`, discrete latents included.
        features: number of features, where `data` does not tell.
        hidden: width of the default encoder's two hidden layers.
        skip: so many leading features are added to as many leading parameters: for features that are estimates of them.
        data: features of the rows, the plate's axis first, of about unit size: what the encoder may see of row n. A streamed
            target brings its own.
        encoder: an Equinox module from the features of one row to its parameters, a vector; an MLP if None.
        plate: name of the plate, where the sites have several and none is subsampled.

    Raises:
        FamilyError: global sites, other rows than the plate has, or an encoder of another width.

    Example:
        >>> import hivi, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     with numpyro.plate("data", len(y)):
        ...         z = numpyro.sample("z", dist.Normal(0, 1))
        ...         numpyro.sample("y", dist.Normal(z, 1), obs=y)
        >>> y = jnp.linspace(-2.0, 2.0, 20)
        >>> family = hivi.Amortised(hivi.MeanField(), data=y[:, None], hidden=8)
        >>> target = hivi.from_numpyro(model, y, subsample={"data": 10})
        >>> fit = hivi.fit(target, family, key=jax.random.key(0), steps=100, progress=False)
        >>> fit.rows(jnp.array([[0.3], [1.5]])).sample(jax.random.key(1), 5)["z"].shape
        (5, 2)
    """

    family: AbstractFamily
    features: int
    hidden: int = 64
    skip: int = 0
    data: Any = None
    encoder: Any = None
    plate: str | None = None

    def __init__(
        self,
        family: AbstractFamily | None = None,
        features: int | None = None,
        hidden: int = 64,
        skip: int = 0,
        *,
        data: Any = None,
        encoder: Any = None,
        plate: str | None = None,
    ):
        self.family = MeanField() if family is None else family
        self.data = None if data is None else jnp.asarray(data)
        self.features = _feature_count(self.data, features)
        if self.data is not None and self.data.ndim != 2 and encoder is None:
            cure = "flatten the features of a row, or pass an encoder that takes their shape"
            raise FamilyError(message("Amortised(data=...)", f"shape {self.data.shape}", "(rows, features)", cure))
        self.hidden, self.skip, self.encoder, self.plate = hidden, skip, encoder, plate
        if getattr(self.family, "start", None) is not None:
            cure = "leave the start out; fit without a network for rows that grow from a fit of their own"
            raise FamilyError(
                message("Amortised(Hierarchical(start=...))", "rows that begin where others ended", "no start", cure)
            )

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        raise FamilyError(
            message(
                f"Amortised() for sites {[s.name for s in sites]}",
                "sites without a plate, which have no rows",
                "sites of one plate, whose rows have features",
                'use a product such as {"z": hivi.Amortised(...), ".*": hivi.MeanField()}',
            )
        )

    def inner(self) -> AbstractFamily:
        return self.family

    def localised(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        found = []
        for s in sites:
            named = {name: axis for name, axis in s.plates if self.plate in (None, name)}
            if s.local is None and not named:
                self.build((s,), jax.random.key(0))  # which says that it needs rows
            if s.local is None and len(named) > 1:
                raise FamilyError(
                    message(
                        f"Amortised() for site {s.name!r}",
                        f"the plates {sorted(named)}",
                        "one plate whose rows have features",
                        f"name it, as in Amortised(..., plate={min(named)!r})",
                    )
                )
            if s.local is None:
                (name, axis), size = next(iter(named.items())), s.shape[next(iter(named.values()))]
                s = dataclasses.replace(s, local=(Plate(name, size, size), axis))
            found.append(s)
        plates = {s.local[0] for s in found if s.local is not None}
        if len(plates) > 1:
            found_plates = sorted(p.name for p in plates)
            cure = "give the sites of each plate a network of their own, in a dict {site: Amortised(...)}"
            raise FamilyError(message("Amortised()", f"sites of the plates {found_plates}", "one plate", cure))
        self._check_rows(next(iter(plates)))
        return tuple(found)

    def _check_rows(self, plate: Plate) -> None:
        if self.data is not None and self.data.shape[0] != plate.size:
            raise FamilyError(
                message(
                    f"Amortised(data=...) for plate {plate.name!r}",
                    f"features of shape {self.data.shape}",
                    f"{plate.size} rows, one for each element of the plate, along the first axis",
                    "pass the features of the very rows that the target has",
                )
            )

    def over_rows(self, rows: AbstractProposal, key: Key) -> AbstractProposal:
        """The amortised form of a proposal that has been built over the rows of a plate."""
        own, rest = eqx.partition(rows, jax.tree.map(lambda o, x: o and eqx.is_array(x), rows.owned(), rows))
        first = jax.tree.map(lambda x: x[0], own)
        given = [x.reshape(-1) for x in jax.tree.leaves(first) if eqx.is_inexact_array(x)]
        start = jnp.concatenate(given)
        network: Any = self.encoder
        if network is None:
            network = perceptron(self.features, start.size, self.hidden, key)
        elif self.data is not None:
            check_width("Amortised(encoder=...)", network, self.data.shape[1:], start.size)
        features = None if self.data is None else Kept.of(self.data)
        plate = next(s.local[0].name for s in rows.sites if s.local is not None)
        return AmortisedProposal(rows.sites, network, start, eqx.combine(first, rest), self.skip, features, plate)


def _feature_count(data: Array | None, features: int | None) -> int:
    if data is None:
        return 1 if features is None else features
    found = int(np.prod(data.shape[1:]))
    if data.ndim < 2 or (features is not None and features != found):
        raise FamilyError(
            message(
                "Amortised(data=...)",
                f"an array of shape {data.shape}",
                "(rows, features)" if features is None else f"(rows, {features})",
                "put one row per element of the plate; y[:, None] makes one feature of a vector",
            )
        )
    return found


class AmortisedProposal(AbstractProposal):
    """An encoder, and a proposal whose rows' own arrays it fills.

    Attributes:
        network: from the features of a row to its parameters.
        start: what is added to them, of shape (width,).
        row: the proposal, with the arrays of one row in place of all.
        skip: number of leading features that are added to leading parameters.
        features: of the rows that are fitted; None where they come with a streamed target, or after loading.
        plate: the rows' plate.
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    network: Any
    start: Float[Array, " width"]
    row: AbstractProposal
    skip: int = eqx.field(static=True)
    features: Kept | None = None
    plate: str = eqx.field(static=True, default="")

    @property
    def amortised(self) -> bool:
        return True

    @property
    def upstream(self) -> frozenset[str]:
        return self.row.upstream

    @property
    def points(self) -> frozenset[str]:
        return self.row.points

    @property
    def inferred(self) -> frozenset[str]:
        return frozenset((self.plate,))

    def given(self, features: Array | None) -> AbstractProposal:
        """The proposal of the rows with these features, (rows, *features).

        Raises:
            FamilyError: there are none.
        """
        if features is None:
            raise FamilyError(
                message(
                    f"Amortised() for plate {self.plate!r}",
                    "no data of its rows",
                    "an array with one row per element of the plate",
                    "pass Amortised(..., data=x), or ask a fitted or loaded one as fit.rows(x)",
                )
            )
        out = jax.vmap(self.network)(features) + self.start
        if self.skip:
            out = out.at[:, : self.skip].add(features[:, : self.skip])
        flags = jax.tree.map(lambda o, x: o and eqx.is_array(x), self.row.owned(), self.row)
        own, rest = eqx.partition(self.row, flags)
        leaves, treedef = jax.tree.flatten(own)
        filled, at = [], 0
        for leaf in leaves:
            stop = at + (leaf.size if eqx.is_inexact_array(leaf) else 0)
            part = out[:, at:stop].reshape(-1, *leaf.shape) if stop > at else jnp.stack([leaf] * out.shape[0])
            filled.append(part)
            at = stop
        return eqx.combine(jax.tree.unflatten(treedef, filled), rest)

    def _all(self) -> AbstractProposal:
        return self.given(None if self.features is None else self.features.value)

    def gather(self, rows: dict[str, Array]) -> AbstractProposal:
        if self.features is None or self.plate not in rows:
            return self._all()
        return self.given(self.features.value[rows[self.plate]])

    def unseen(self, features: Mapping[str, Array], sites: tuple[Site, ...]) -> AmortisedProposal:
        new, found = {s.name: s for s in sites}, jnp.asarray(features[self.plate])
        whole = Plate(self.plate, len(found), len(found))
        own = tuple(
            dataclasses.replace(new[s.name], local=new[s.name].local or (whole, s.local[1]), values=s.values)
            for s in self.sites
            if s.local is not None
        )
        return dataclasses.replace(self, sites=own, row=self.row.resized(own), features=Kept.of(found))

    def bare(self) -> AmortisedProposal:
        return dataclasses.replace(self, features=None)

    def owned(self) -> PyTree:
        nothing = jax.tree.map(lambda _: False, self)
        return eqx.tree_at(
            lambda p: jax.tree.leaves(p.features), nothing, [True for _ in jax.tree.leaves(self.features)]
        )

    def near(self, means: dict[str, Array]) -> AmortisedProposal:
        one = jax.tree.map(lambda o, x: x[None] if o and eqx.is_array(x) else x, self.row.owned(), self.row)
        moved = one.near(means)
        own = eqx.filter(moved, jax.tree.map(lambda o, x: o and eqx.is_inexact_array(x), moved.owned(), moved))
        start = jnp.concatenate([x[0].reshape(-1) for x in jax.tree.leaves(own)])
        return dataclasses.replace(self, start=start.at[: self.skip].set(0.0))

    # Of all rows with features, as the filled proposal has it.
    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self._all().propose(key, branch)

    def redrawn(self, values: Latents, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self._all().redrawn(values, key, branch)

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return self._all().log_q(z, context, key, inner)

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return self._all().log_density(z, key, samples)

    def conditionals(self, context: PyTree) -> dict[str, Conditional]:
        return self._all().conditionals(context)

    @property
    def branches(self) -> int:
        return self.row.branches

    @property
    def equal_branches(self) -> bool:
        return self.row.equal_branches

    def log_weights(self) -> Float[Array, " branches"]:
        return self.row.log_weights()

    def scales(self) -> dict[str, float]:
        return self._all().scales()

    def score_weight(self, inner: int) -> float:
        return self._all().score_weight(inner)

    def parameters(self) -> dict[str, Array]:
        return {} if self.features is None else self._all().parameters()
