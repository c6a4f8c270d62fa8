"""Samples of the curvature operator at a mean-field optimum, and its top eigenpairs, without a D x D matrix.

At mu, with f = log p - log q_0, the gradient of E_q(z|lambda)[f] is E[h], h the weighted differences of f
(`move_weights`), and d/dlambda_j E[h_i] = E[h_i score_j] + E[dh_i/dlambda_j]. The last term is proportional to the gradient, zero
at the optimum. So the Hessian is `M = Cov(h, score)`, estimated by its symmetric part over draws.

A Normal site has h from its pathwise gradient, with the location in units of its standard deviation; where all sites are
global, the block of Normal sites comes from Hessian-vector products instead (`hessian.Bend`), the rest from the covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._compile import compiled
from hivi._estimators.hessian import Bend, pathwise
from hivi._families.auxiliary import Link
from hivi._families.base import AbstractProposal, size_of
from hivi._likelihood import likelihood
from hivi._space import Latents, Site
from hivi._target.base import Rows, Target
from hivi._tree import Key

BATCH = 16
"""Draws evaluated at once."""
STEPS = 128
"""Most Lanczos steps; exact for blocks of up to so many parameters."""
BREAKDOWN = 1e-6
"""A residual below this share of the operator's size ends a Krylov space; the next one starts at random."""
RIDGE = 1e-6


class Block(NamedTuple):
    """The sites that are tested together: global ones, or those of one row of a subsampled plate (static)."""

    sites: tuple[Site, ...]

    @property
    def local(self) -> bool:
        """Whether the block is one row of a plate, and there are many."""
        return self.sites[0].local is not None

    @property
    def link(self) -> Link:
        """The flat vector lambda of one block."""
        return Link(tuple(s.row() if self.local else s for s in self.sites))

    def flat(self, parts: dict[str, Array]) -> Float[Array, "blocks dim"]:
        """Arrays over (*batch shape, width) as one row per block."""
        fronts = [self.front(s, parts[s.name]) for s in self.sites]
        return jnp.concatenate([a.reshape(a.shape[0], -1) for a in fronts], -1)

    def front(self, site: Site, array: Array) -> Array:
        """The axis over blocks first; a new one of length 1 for global sites."""
        return array[None] if site.local is None else jnp.moveaxis(array, site.local[1], 0)


class Pairs(NamedTuple):
    """Top directions of every block, and what a fresh half of the draws says about them.

    Attributes:
        vectors: unit directions, from the first half, (blocks, top, dim).
        value: Rayleigh quotients on the second half: unbiased for these directions, (blocks, top).
        stderr: their standard errors.
        information: e'Fe, the Fisher information along each direction.
        price: Var((e . score)^2) / 8: a spread s costs s^4 times this in KL(q || q_0), to leading order.
        slack: first-order gain that mean-field has left, 1/2 g'F^-1 g in nats, unbiased, (blocks,).
        slack_stderr: its standard error where the gradient g is zero.
    """

    vectors: Float[Array, "blocks top dim"]
    value: Float[Array, "blocks top"]
    stderr: Float[Array, "blocks top"]
    information: Float[Array, "blocks top"]
    price: Float[Array, "blocks top"]
    slack: Float[Array, " blocks"]
    slack_stderr: Float[Array, " blocks"]


@compiled
def signals(
    proposal: AbstractProposal, target: Target, block: Block, rows: Rows, key: Key, samples: int
) -> tuple[Float[Array, "samples blocks dim"], Float[Array, "samples blocks dim"]]:
    """Weighted differences h and scores of `samples` draws from q_0; plates that `rows` lacks get random minibatches."""

    def one(k: Key) -> tuple[Array, Array]:
        k_rows, k_branch, k_draw = jax.random.split(k, 3)
        batch = {**target.minibatch(k_rows), **rows}
        local = proposal.gather(batch)
        branch = jax.random.categorical(k_branch, local.log_weights()) if local.branches > 1 else 0
        z, _ = local.propose(k_draw, branch)
        lam = local.parameters()
        h = {s.name: _weighted(target, s, lam[s.name], z, batch) for s in block.sites}
        score = {s.name: standard(s, lam[s.name], likelihood(s).score(lam[s.name], z[s.name])) for s in block.sites}
        return block.flat(h), block.flat(score)

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=BATCH)


def _weighted(target: Target, site: Site, lam: Array, z: Latents, rows: Rows) -> Array:
    """One draw's h of a site."""
    if not site.discrete:
        return pathwise(target, site, lam, z, rows)
    own, value = likelihood(site), z[site.name]
    moved = own.moves(value)
    change = target.factored.differences(site.name, moved, z, target.data, rows) / site.scale
    log_q = jax.vmap(lambda v: own.log_prob(lam, v))(moved) - own.log_prob(lam, value)
    weights, pull = jax.vjp(lambda free: own.move_weights(free, value), lam)
    gain = change - log_q
    # A move whose weight is exactly zero cannot matter, even to an impossible value (0 times -inf).
    found: Array = pull(jnp.where((weights == 0) & ~jnp.isfinite(gain), 0.0, gain))[0]
    return found


def standard(site: Site, lam: Array, gradient: Array) -> Array:
    """A gradient with respect to lambda, for Normal sites with the location in units of the standard deviation."""
    return gradient if site.discrete else gradient.at[..., 0].multiply(jnp.exp(lam[..., 1]))


def information(site: Site, lam: Array) -> Array:
    """The Fisher matrix, in the same units."""
    if site.discrete:
        return likelihood(site).fisher(lam)
    return jnp.broadcast_to(jnp.diag(jnp.array([1.0, 2.0])), (*lam.shape[:-1], 2, 2))


@compiled
def eigenpairs(
    link: Link,
    h: Float[Array, "samples blocks dim"],
    score: Float[Array, "samples blocks dim"],
    fisher: dict[str, Array],
    top: int,
    key: Key,
    bend: tuple[Bend, Bend] | None = None,
) -> Pairs:
    """Directions from the first half of the draws, judged on the second: the top of a noisy matrix is biased upwards.

    `bend` has the Hessian-vector products of Normal sites, for the first half and for the second.
    """
    first, second = (None, None) if bend is None else bend

    def one(h: Array, score: Array, fisher: dict[str, Array], k: Key) -> Pairs:
        half = h.shape[0] // 2
        vectors = _lanczos(_operator(link, h[:half], score[:half], first), link.dim, top, k)
        value, stderr = _quotients(link, h[half:], score[half:], vectors, second)
        along = (score @ vectors.T) ** 2
        information = jax.vmap(lambda e: e @ _times(link, fisher, e))(vectors)
        left = 0.5 * h[half:] @ _solve(link, fisher, h[:half].mean(0))
        stderr_left = left.std(ddof=1) / jnp.sqrt(left.shape[0])
        return Pairs(vectors, value, stderr, information, along.var(0, ddof=1) / 8, left.mean(), stderr_left)

    keys = jax.random.split(key, h.shape[1])
    return jax.vmap(one, in_axes=(1, 1, 0, 0))(h, score, fisher, keys)


def _quotients(link: Link, h: Array, score: Array, vectors: Array, bend: Bend | None) -> tuple[Array, Array]:
    """The values e'Me from fresh draws, with standard errors; what is exactly zero is left out."""
    count, real = h.shape[0], _real(link)
    h = (h - h.mean(0)) * (count / (count - 1))

    def one(e: Array) -> Array:
        values = _product(link, h, score, e)
        if bend is None:
            return values
        within = jnp.zeros_like(e).at[real].set(e[real])
        return values - _product(link, h, score, within) + bend.each(e[real]) @ e[real]

    values = jax.lax.map(one, vectors)
    return values.mean(-1), values.std(-1, ddof=1) / jnp.sqrt(count)


def _product(link: Link, h: Array, score: Array, e: Array) -> Array:
    """Of each draw (h.e)(score.e), without the entries of a coordinate's own block that are zero on average."""
    values = (h @ e) * (score @ e)
    for start, stop, zero in _segments(link):
        a, b = ((x * e)[:, start:stop].reshape(h.shape[0], -1, len(zero)) for x in (h, score))
        values = values - jnp.einsum("nia,ab,nib->n", a, zero, b)
    return values


def _operator(link: Link, h: Array, score: Array, bend: Bend | None = None) -> Callable[[Array], Array]:
    """Map u to 1/2 (A u + A'u), A the covariance of h and score without what is exactly zero."""
    count, real = h.shape[0], _real(link)
    h = (h - h.mean(0)) / (count - 1)
    own = []
    for start, stop, zero in _segments(link):
        a, b = (x[:, start:stop].reshape(count, -1, len(zero)) for x in (h, score))
        cross = jnp.einsum("nia,nib->iab", a, b) * zero
        own.append((start, stop, 0.5 * (cross + jnp.swapaxes(cross, 1, 2))))

    def apply(u: Array) -> Array:
        parts = [jnp.einsum("iab,ib->ia", c, u[i:j].reshape(len(c), -1)).reshape(-1) for i, j, c in own]
        return 0.5 * (h.T @ (score @ u) + score.T @ (h @ u)) - jnp.concatenate(parts)

    def mixed(u: Array) -> Array:
        within = jnp.zeros_like(u).at[real].set(u[real])
        return apply(u).at[real].add(bend.each(u[real]).mean(0) - apply(within)[real])  # type: ignore[union-attr]

    return apply if bend is None else mixed


def _segments(link: Link) -> list[tuple[int, int, np.ndarray]]:
    """Start and stop of every site in the flat vector, and which entries of a coordinate's own block are exactly zero.

    All of them for finite supports; for a Normal site its location's, since its scale is at its optimum, too.
    """
    out, start = [], 0
    for s in link.sites:
        width = likelihood(s).width
        stop = start + size_of(s.shape) * width
        zero = np.full((width, width), float(likelihood(s).table))
        if not s.discrete:
            zero[0, 0] = 1.0
        out.append((start, stop, zero))
        start = stop
    return out


def _real(link: Link) -> np.ndarray:
    """Places of the Normal sites' parameters in the flat vector."""
    spans = [np.arange(a, b) for (a, b, _), s in zip(_segments(link), link.sites, strict=True) if not s.discrete]
    return np.concatenate([np.zeros(0, int), *spans])


def _times(link: Link, fisher: dict[str, Array], e: Array) -> Array:
    """Product F e, F block-diagonal."""
    parts = link.split(e)
    return link.join({n: jnp.einsum("...ab,...b->...a", fisher[n], parts[n]) for n in parts})


def _solve(link: Link, fisher: dict[str, Array], g: Array) -> Array:
    """Solution F^-1 g, with a small ridge: logits of a categorical have a direction without information."""
    parts, out = link.split(g), {}
    for n, part in parts.items():
        block = fisher[n]
        size = jnp.trace(block, axis1=-2, axis2=-1)[..., None, None]
        ridge = (RIDGE * size + jnp.finfo(block.dtype).tiny) * jnp.eye(block.shape[-1])
        out[n] = jnp.linalg.solve(block + ridge, part[..., None])[..., 0]
    return link.join(out)


def _lanczos(apply: Callable[[Array], Array], dim: int, top: int, key: Key) -> Float[Array, "top dim"]:
    """Unit eigenvectors of the largest eigenvalues of a symmetric operator; full reorthogonalisation."""
    steps = min(dim, STEPS)

    def clean(basis: Array, v: Array) -> Array:
        for _ in range(2):
            v = v - basis.T @ (basis @ v)
        return v

    def step(carry: tuple[Array, Array, Array], now: tuple[Array, Key]) -> tuple[tuple[Array, Array, Array], Array]:
        basis, v, size = carry
        number, k = now
        basis = basis.at[number].set(v)
        product = apply(v)
        size = jnp.maximum(size, jnp.linalg.norm(product))
        rest, spare = clean(basis, product), clean(basis, jax.random.normal(k, (dim,)))
        length = jnp.linalg.norm(rest)
        alive = length > BREAKDOWN * size
        unit = jnp.where(alive, rest / jnp.where(alive, length, 1.0), spare / jnp.linalg.norm(spare))
        return (basis, unit, size), jnp.stack([v @ product, jnp.where(alive, length, 0.0)])

    k_start, k_steps = jax.random.split(key)
    first = jax.random.normal(k_start, (dim,))
    start = (jnp.zeros((steps, dim)), first / jnp.linalg.norm(first), jnp.zeros(()))
    (basis, _, _), found = jax.lax.scan(step, start, (jnp.arange(steps), jax.random.split(k_steps, steps)))
    diagonal, beside = found[:, 0], found[:-1, 1]
    _, inner = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    vectors = inner[:, ::-1][:, :top].T @ basis
    vectors = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    size = jnp.abs(vectors)
    largest = jnp.argmax(size > 0.99 * size.max(1, keepdims=True), 1)  # the first of equals, whatever the rounding
    return vectors * jnp.sign(jnp.take_along_axis(vectors, largest[:, None], 1))
