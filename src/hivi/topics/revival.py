"""Topics that died in the warm-up live again: the largest are split in two.

A sparse prior and point estimates of the weights let an unlucky topic lose all its words to others, and nothing brings it
back: its rate is zero in every document. Where that happened, the words of the largest topic are dealt out at random
between it and the dead one, which is given the other's place in the documents and in the layer above. That hardly changes a
document's rates, and the passes that follow tell the two apart.

Source: in the manner of the split moves of Bryant & Sudderth (2012), Truly Nonparametric Online Variational Inference for
Hierarchical Dirichlet Processes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hivi._families.amortised import AmortisedProposal
from hivi._families.gamma import GammaProposal
from hivi._families.mean_field import MeanFieldProposal
from hivi._fit.streaming import Stream
from hivi._tree import PyTree
from hivi.topics.architecture import Architecture, w_name, z_name

DEAD = 0.05
"""A topic is dead with less than this part of an equal share of the tokens: it will not come back by itself."""


def revive(stream: Stream, architecture: Architecture, rng: np.random.Generator) -> int:
    """Split the largest topics into the dead ones' places; returns how many were dead.

    Of documents with parameters of their own, and of inference networks over these, whose words' weights are Gamma; nothing
    happens to other fits.
    """
    shared, words = stream.state.shared, w_name(0)
    weights, documents = part_of(shared, words), part_of(shared, z_name(1))
    if not isinstance(weights, GammaProposal) or not isinstance(_rows(documents), MeanFieldProposal):
        return 0
    prior, shape = architecture.priors.topic_shape, np.asarray(weights.shape[words], np.float64)
    counts = np.maximum(shape - prior, 0.0)
    split, parents = split_largest(counts, rng)
    dead = int(np.sum(parents != np.arange(len(parents))))
    if not dead:
        return 0
    moved = np.where(np.any(split != counts, 0), split + prior, shape)
    rate = weights.rate[words]
    new = dataclasses.replace(
        weights,
        shape={**weights.shape, words: jnp.asarray(moved, weights.shape[words].dtype)},
        rate={**weights.rate, words: rate[:, parents]},
    )
    shared = _above(_replaced(shared, weights, new), parents)
    if isinstance(documents, AmortisedProposal):
        shared = _replaced(shared, documents, _network(documents, parents))
    else:
        _records(stream, parents)
    stream.state = dataclasses.replace(stream.state, shared=shared)
    return dead


def split_largest(
    counts: Float[np.ndarray, "words topics"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "words topics"], Int[np.ndarray, " topics"]]:
    """Expected counts of each word, the largest topics' dealt out to the dead ones; and each topic's parent, or itself."""
    counts, parents = counts.copy(), np.arange(counts.shape[1])
    for topic in np.flatnonzero(counts.sum(0) < DEAD * counts.sum() / counts.shape[1]):
        largest = int(np.argmax(counts.sum(0)))
        share = rng.uniform(size=len(counts))
        counts[:, topic], counts[:, largest] = share * counts[:, largest], (1 - share) * counts[:, largest]
        parents[topic] = parents[largest]
    return counts, parents


def part_of(shared: PyTree, site: str) -> Any:
    """The part of a proposal over several groups of sites that has this one; None where there is none."""
    return next((p for p in shared.parts if site in {s.name for s in p.sites}), None)


def _rows(part: Any) -> Any:
    """The family of the documents' latents, behind an inference network or not."""
    return part.row if isinstance(part, AmortisedProposal) else part


def _replaced(shared: PyTree, old: Any, new: Any) -> PyTree:
    return dataclasses.replace(shared, parts=tuple(new if p is old else p for p in shared.parts))


def _above(shared: PyTree, parents: Int[np.ndarray, " topics"]) -> PyTree:
    """The shared parameters in which a new topic is to the layer above what its parent is."""
    for site in (w_name(1), "b1"):
        part = part_of(shared, site)
        if isinstance(part, GammaProposal):
            moved = {site: part.shape[site][parents]}
            rate = part.rate[site] if part.rate[site].shape[0] == 1 else part.rate[site][parents]
            new: Any = dataclasses.replace(part, shape={**part.shape, **moved}, rate={**part.rate, site: rate})
            shared = _replaced(shared, part, new)
        elif isinstance(part, MeanFieldProposal):
            shared = _replaced(shared, part, dataclasses.replace(part, lam={**part.lam, site: part.lam[site][parents]}))
    return shared


def _network(part: AmortisedProposal, parents: Int[np.ndarray, " topics"]) -> AmortisedProposal:
    """The network whose answers for a new topic are those for its parent; one of another kind stays as it is."""
    last = part.network.layers[-1] if isinstance(part.network, eqx.nn.MLP) else None
    if not isinstance(last, eqx.nn.Linear) or last.bias is None:
        return part
    width = part.row.parameters()[z_name(1)].shape[-1]
    places = np.arange(len(part.start))  # the first layer's come first
    places[: len(parents) * width] = (parents[:, None] * width + np.arange(width)).reshape(-1)
    moved: list[Array] = [x[places] for x in (last.weight, last.bias, part.start)]
    return eqx.tree_at(lambda p: (p.network.layers[-1].weight, p.network.layers[-1].bias, p.start), part, moved)


def _records(stream: Stream, parents: Int[np.ndarray, " topics"]) -> None:
    """Give a new topic its parent's place in every document."""
    for ids in stream.source.blocks():
        own, moments = stream.layout.unpack(jnp.asarray(stream.records.read(ids)))
        part = part_of(own, z_name(1))
        lam = {**part.lam, z_name(1): part.lam[z_name(1)][:, parents]}
        own = _replaced(own, part, dataclasses.replace(part, lam=lam))
        stream.records.write(ids, np.asarray(stream.layout.pack((own, moments))))
