"""Sparse kernels: the observed words of a minibatch at O(nonzeros x topics), forwards, backwards and for all differences.

The nonzeros of a minibatch lie in chunks of one document each, so that a scan over chunks keeps its work in cache. The rate
of word v in document d is `floor_v + sum_k z_dk w_vk`; only rates at nonzeros are ever computed, because the sum of all
rates is `sum_k z_dk sum_v w_vk`. A one in Bernoulli data is a positive Poisson count (Zhou 2015): p(x=1) = 1 - exp(-rate).
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hivi.topics.architecture import Observations

DENSE = 32
"""Backwards, residuals are scattered to documents x words and multiplied: while that table has at most this many cells per
nonzero it is cheaper than rows of topics added one by one, and still O(nonzeros x topics)."""

GROUP = 8
"""Chunks that are handled together: one by one, handing out the work took as long as the work."""


class Batch(NamedTuple):
    """The nonzeros of some documents; chunks that are not full hold zero counts.

    Attributes:
        words: word number of each nonzero.
        counts: its count; 0 for padding.
        document: document of each chunk, within the minibatch; its size for padding.
        constant: per document, the part of log p(x) that depends on counts alone.
    """

    words: Int[Array, "chunks length"]
    counts: Float[Array, "chunks length"]
    document: Int[Array, " chunks"]
    constant: Float[Array, " documents"]


def _pad(z: Array) -> Array:
    """One more document, empty, which padding chunks belong to."""
    return jnp.concatenate([z, jnp.zeros((1, z.shape[1]), z.dtype)])


def _grouped(words: Array, document: Array, blank: int, *more: Array) -> tuple[Array, ...]:
    """Chunks by groups, which are handled together; those that are wanting belong to the document `blank`, empty."""
    missing = -words.shape[0] % GROUP

    def grouped(x: Array, fill: int) -> Array:
        padded = jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)], constant_values=fill)
        return padded.reshape(-1, GROUP, *x.shape[1:])

    return grouped(words, 0), grouped(document, blank), *(grouped(x, 0) for x in more)


@jax.custom_vjp
def rates(
    weights: Float[Array, "words topics"],
    z: Float[Array, "documents topics"],
    floor: Float[Array, " words"],
    batch: Batch,
) -> Float[Array, "chunks length"]:
    """Rate at every nonzero."""
    padded = _pad(z)

    def some(_: None, chunks: tuple[Array, ...]) -> tuple[None, Array]:
        words, document = chunks
        return None, jnp.einsum("glk,gk->gl", weights[words], padded[document]) + floor[words]

    found = jax.lax.scan(some, None, _grouped(batch.words, batch.document, z.shape[0]))[1]
    return found.reshape(-1, found.shape[-1])[: batch.words.shape[0]]


def _forward(weights: Array, z: Array, floor: Array, batch: Batch) -> tuple[Array, tuple[Array, Array, Batch]]:
    return rates(weights, z, floor, batch), (weights, z, batch)


def _backward(saved: tuple[Array, Array, Batch], residual: Array) -> tuple[Array, Array, None, None]:
    weights, z, batch = saved
    residual = jnp.where(batch.counts > 0, residual, 0.0)
    padded = _pad(z)
    documents = padded.shape[0]

    def by_document(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        words, document, one = chunk
        return total.at[document].add(one @ weights[words]), None

    to_z = jax.lax.scan(by_document, jnp.zeros_like(padded), (batch.words, batch.document, residual))[0]
    if documents * weights.shape[0] <= DENSE * batch.words.size:
        dense = jnp.zeros((documents, weights.shape[0]), z.dtype).at[batch.document[:, None], batch.words].add(residual)
        return dense.T @ padded, to_z[:-1], None, None

    def by_word(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        words, document, one = chunk
        return total.at[words].add(one[:, None] * padded[document]), None

    to_weights = jax.lax.scan(by_word, jnp.zeros_like(weights), (batch.words, batch.document, residual))[0]
    return to_weights, to_z[:-1], None, None


rates.defvjp(_forward, _backward)


def log_factor(kind: Observations, rate: Array) -> Array:
    """What one observation adds per count, beyond `-rate`: log rate, or log(exp(rate) - 1) for a Bernoulli one."""
    if kind == "poisson":
        return jnp.log(rate)
    return rate + jnp.log(-jnp.expm1(-rate))


def log_likelihood(kind: Observations, rate: Array, batch: Batch) -> Float[Array, " documents"]:
    """Per document, `sum_v x log rate` over its nonzeros, with its constant."""
    chunks = jnp.sum(jnp.where(batch.counts > 0, batch.counts * log_factor(kind, rate), 0.0), -1)
    documents = batch.constant.shape[0]
    return jnp.zeros(documents + 1, chunks.dtype).at[batch.document].add(chunks)[:-1] + batch.constant


def differences(
    kind: Observations,
    weights: Float[Array, "words topics"],
    z: Float[Array, "documents topics"],
    moved: Float[Array, "documents topics"],
    floor: Float[Array, " words"],
    batch: Batch,
    unit: bool = False,
) -> Float[Array, "documents topics"]:
    """Change of `sum_v x log rate` when one z_dk takes its value in `moved`, for every d and k at once.

    `unit` says that every move is by +1, which saves a product and a maximum per cell.
    """
    padded, step = _pad(z), _pad(moved - z)

    def some(total: Array, chunks: tuple[Array, ...]) -> tuple[Array, None]:
        words, document, counts = chunks
        rows, low = weights[words], floor[words]
        rate = jnp.einsum("glk,gk->gl", rows, padded[document]) + low
        moved = rate[..., None] + (rows if unit else rows * step[document][:, None])
        after = moved if unit else jnp.maximum(moved, low[..., None])
        change = jnp.einsum("gl,glk->gk", counts, log_factor(kind, after) - log_factor(kind, rate)[..., None])
        return total.at[document].add(change), None

    start = jnp.zeros_like(padded)
    return jax.lax.scan(some, start, _grouped(batch.words, batch.document, z.shape[0], batch.counts))[0][:-1]


@functools.partial(jax.jit, static_argnames="kind")
def layer_differences(
    kind: Literal["poisson", "bernoulli"],
    weights: Float[Array, "children parents"],
    child: Float[Array, "documents children"],
    eta: Float[Array, "documents children"],
    step: Float[Array, "documents parents"],
) -> Float[Array, "documents parents"]:
    """Change of a layer's log-probability given its parents, when one parent moves by `step`: O(children x parents).

    Poisson: only `child * log eta` counts here (the sum of eta is linear); Bernoulli: all, with eta the logits.
    """
    moved = eta[:, None, :] + step[:, :, None] * weights.T
    if kind == "poisson":
        low = 1e-6 * eta[:, None, :]
        return jnp.einsum("dpc,dc->dp", jnp.log(jnp.maximum(moved, low)) - jnp.log(eta)[:, None, :], child)
    change = child[:, None, :] * (moved - eta[:, None, :]) - (jax.nn.softplus(moved) - jax.nn.softplus(eta)[:, None, :])
    return jnp.sum(change, -1)
