"""Latents of documents, seen or new: their own parameters are fitted with everything else as it is."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._bounds import AbstractBound, Elbo
from hivi._compile import compiled
from hivi._estimators.base import AbstractStrategy
from hivi._families.base import AbstractProposal
from hivi._fit.rowwise import row_bounds
from hivi._fit.stream import Schedule, at_blocks, conditioned, row_moments, split_rows
from hivi._fit.streaming import Stream, advance, in_order, open_stream, per_block
from hivi._likelihoods.poisson import MAX_LOG_RATE
from hivi._target.base import Target
from hivi._tree import Key
from hivi.topics.batches import CorpusSource, Documents
from hivi.topics.fitting import TopicFit, proposal_for, strategies
from hivi.topics.model import Architecture, build_target, z_name

LOCAL_PASSES = 60
REFINING_RATE, REFINING_DRAWS = 0.1, 4
"""Of documents that start at an inference network's answer: chosen on documents held out of training."""
LOCAL_BATCH = 128


class Inference(NamedTuple):
    """What is known of some documents.

    Attributes:
        layers: posterior means of the latents, one array (documents, units) per layer.
        bound: each document's share of the bound, in nats: E[log p(x, z) - log q(z)], under E over q of the weights.
    """

    layers: list[np.ndarray]
    bound: np.ndarray


def infer(
    fit: TopicFit,
    documents: Documents,
    *,
    key: Key,
    passes: int | None = None,
    samples: int = 16,
    bound: AbstractBound | None = None,
) -> Inference:
    """Latents of documents, seen or new: their own parameters are fitted with everything else as it is.

    Args:
        fit: the trained model.
        documents: any documents over its vocabulary.
        key: a JAX random key.
        passes: gradient steps per document: 60 if None; with 0 an inference network's answer stands as it is.
        samples: draws per document for the bound, and for posterior means that have no closed form.
        bound: which bound; `Elbo()` if None.
    """
    k1, k2 = jax.random.split(key)
    stream, chosen = inferred(fit, documents, key=k1, passes=passes)
    return read(stream, fit.architecture, chosen, key=k2, samples=samples, bound=bound)


def inferred(
    fit: TopicFit, documents: Documents, *, key: Key, passes: int | None = None
) -> tuple[Stream, dict[str, AbstractStrategy]]:
    """Documents with fitted parameters of their own, and the strategies of that fit; see `infer`."""
    size = 1
    while size < min(documents.n_documents, LOCAL_BATCH):
        size *= 2
    stream, schedule, samples = localised(opened(fit, documents, size, key=key))
    chosen = strategies(stream.target, stream.proposal(stream.source.blocks()[0]))
    steps, rng = LOCAL_PASSES if passes is None else passes, np.random.default_rng(0)
    advance(stream, steps, strategies=chosen, schedule=schedule, samples=samples, rng=rng)
    return stream, chosen


def opened(fit: TopicFit, documents: Documents, size: int, *, key: Key) -> Stream:
    """A stream over other documents, `size` at once, with the weights of a fit; the documents start afresh."""
    k1, k2 = jax.random.split(key)
    source = CorpusSource(documents, size, fit.architecture.observations, local=True)
    target = build_target(fit.architecture, source, fit.statistics)
    stream = open_stream(target, proposal_for(target, fit.architecture, fit.family, k1), k2)
    leaves = jax.tree.leaves(fit.stream.state.shared)
    shared = jax.tree.unflatten(jax.tree.structure(stream.state.shared), leaves)
    stream.state = dataclasses.replace(stream.state, shared=shared)
    return stream


def localised(stream: Stream) -> tuple[Stream, Schedule, int]:
    """For documents to be inferred: parameters of their own, the size of their steps, and draws per step.

    Those of an inference network start at its answer (semi-amortised inference, Kim et al. 2018): it is a good start, and
    a poor end for long documents. From there the steps are gentle: large ones lose what the network knows of short documents.
    """
    if not stream.proposal(stream.source.blocks()[0]).amortised:
        return stream, Schedule(shared=False), 1
    opened: Stream | None = None
    for ids, here in at_blocks(stream.target):
        local = conditioned(here, stream.proposal(ids))
        if opened is None:
            opened = open_stream(stream.target, local, stream.state.key)
        own, _ = split_rows(local)
        opened.records.write(ids, np.asarray(opened.layout.pack((own, row_moments(own)))))
    assert opened is not None
    return opened, Schedule(rows=REFINING_RATE, shared=False), REFINING_DRAWS


def read(
    stream: Stream,
    architecture: Architecture,
    chosen: dict[str, AbstractStrategy],
    *,
    key: Key,
    samples: int = 16,
    bound: AbstractBound | None = None,
) -> Inference:
    """Posterior means and bounds of all documents of a stream, as their parameters are now."""
    lean, wanted = tuple(chosen.items()), Elbo() if bound is None else bound

    def bounds(target: Target, proposal: AbstractProposal, k: Key) -> Array:
        return row_bounds(target, proposal, k, lean, wanted, samples)[0]

    found = in_order(stream.source, per_block(stream, bounds, key))
    return Inference(posterior_means(stream, architecture, key=key, samples=samples), found.astype(np.float64))


def posterior_means(
    stream: Stream, architecture: Architecture, *, key: Key, samples: int = 16
) -> list[Float[np.ndarray, "documents _"]]:
    """E[z] of every document of a stream, one array per layer, as their parameters are now."""
    found = per_block(stream, latent_means, key, architecture, samples)
    names = [z_name(k) for k in range(1, architecture.depth + 1)]
    return [in_order(stream.source, [means[name] for means in found]) for name in names]


@compiled
def latent_means(
    target: Target, proposal: AbstractProposal, key: Key, architecture: Architecture, samples: int
) -> dict[str, Array]:
    """E[z] of every layer under q, in the model's own space: over draws of lambda, exact given lambda."""
    proposal = conditioned(target, proposal)

    def one(k: Key) -> dict[str, Array]:
        _, context = proposal.propose(k)
        out = {}
        for name, c in proposal.conditionals(context).items():
            if not name.startswith("z"):
                continue
            if architecture.latent == "gamma":
                out[name] = jnp.exp(c.lam[..., 0] + 0.5 * jnp.exp(2 * c.lam[..., 1]))
            elif architecture.latent == "poisson":
                out[name] = jnp.exp(jnp.minimum(c.lam[..., 0], MAX_LOG_RATE))
            else:
                out[name] = jax.nn.sigmoid(c.lam[..., 0])
        return out

    return jax.tree.map(lambda x: jnp.mean(x, 0), jax.lax.map(one, jax.random.split(key, samples)))
