"""Inference networks: the parameters of a row's proposal as the output of an encoder of that row's data."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message
from hivi._families.base import AbstractFamily, AbstractProposal
from hivi._families.mean_field import MeanField
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree


class Amortised(AbstractFamily):
    """One encoder instead of parameters per row: own parameters of row n = start + skip(x_n) + MLP(x_n).

    For the rows of a streamed plate whose target gives features of a row (`Target.features`). Unseen rows then need no
    fitting. The network's last layer starts at zero, so that the fit starts where it would without it.

    Args:
        family: the family of a row: `MeanField()`, or `Hierarchical(shared=True)`, whose flow all rows share.
        features: number of features.
        hidden: width of the network's two hidden layers.
        skip: so many leading features are added to as many leading parameters: for features that are estimates of them.

    Example:
        >>> import hivi
        >>> hivi.Amortised(features=11, skip=10).hidden
        64
    """

    family: AbstractFamily
    features: int
    hidden: int = 64
    skip: int = 0

    def __init__(self, family: AbstractFamily | None = None, features: int = 1, hidden: int = 64, skip: int = 0):
        self.family = MeanField() if family is None else family
        self.features, self.hidden, self.skip = features, hidden, skip

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        raise FamilyError(
            message(
                f"Amortised() for sites {[s.name for s in sites]}",
                "sites without a subsampled plate",
                "sites of a streamed plate whose rows have features",
                "use its inner family for global sites",
            )
        )

    def inner(self) -> AbstractFamily:
        return self.family

    def over_rows(self, rows: AbstractProposal, key: Key) -> AbstractProposal:
        """The amortised form of a proposal that has been built over the rows of a minibatch."""
        own, rest = eqx.partition(rows, jax.tree.map(lambda o, x: o and eqx.is_array(x), rows.owned(), rows))
        first = jax.tree.map(lambda x: x[0], own)
        width = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(first))
        network = eqx.nn.MLP(self.features, width, self.hidden, 2, activation=jax.nn.gelu, key=key)
        last: Any = network.layers[-1]
        network = eqx.tree_at(
            lambda n: (n.layers[-1].weight, n.layers[-1].bias),
            network,
            (jnp.zeros_like(last.weight), jnp.zeros_like(last.bias)),
        )
        start = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(first)])
        return AmortisedProposal(rows.sites, network, start, eqx.combine(first, rest), self.skip)


class AmortisedProposal(AbstractProposal):
    """An encoder, and a proposal whose rows' own arrays it will fill: `given` makes it usable."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    network: eqx.nn.MLP
    start: Float[Array, " width"]
    row: AbstractProposal
    skip: int = eqx.field(static=True)

    @property
    def amortised(self) -> bool:
        return True

    def given(self, features: Float[Array, "rows features"] | None) -> AbstractProposal:
        """The proposal of the rows with these features.

        Raises:
            FamilyError: the target gives none.
        """
        if features is None:
            raise FamilyError(
                message("Amortised()", "a target without features of its rows", "features", "use its inner family")
            )
        out = jax.vmap(self.network)(features) + self.start
        if self.skip:
            out = out.at[:, : self.skip].add(features[:, : self.skip])
        flags = jax.tree.map(lambda o, x: o and eqx.is_array(x), self.row.owned(), self.row)
        own, rest = eqx.partition(self.row, flags)
        leaves, treedef = jax.tree.flatten(own)
        filled, at = [], 0
        for leaf in leaves:
            stop = at + int(np.prod(leaf.shape))
            filled.append(out[:, at:stop].reshape(-1, *leaf.shape))
            at = stop
        return eqx.combine(jax.tree.unflatten(treedef, filled), rest)

    def near(self, means: dict[str, Array]) -> AmortisedProposal:
        one = jax.tree.map(lambda o, x: x[None] if o and eqx.is_array(x) else x, self.row.owned(), self.row)
        moved = one.near(means)
        own = eqx.filter(moved, jax.tree.map(lambda o, x: o and eqx.is_array(x), moved.owned(), moved))
        start = jnp.concatenate([x[0].reshape(-1) for x in jax.tree.leaves(own)])
        return dataclasses.replace(self, start=start.at[: self.skip].set(0.0))

    def _refuse(self) -> Any:
        raise FamilyError(
            message("Amortised()", "no data of its rows", "a streamed target", "fit it through hivi.fit or hivi.topics")
        )

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self._refuse()

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return self._refuse()

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return self._refuse()
