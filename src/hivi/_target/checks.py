"""Numeric checks of a model at random points: rows of a minibatch are independent, masked latents are free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hivi._errors import TargetError, message
from hivi._space import Plate, Site

ROUNDS = 8
"""How often rows are checked: once may miss a maximum, where the row that stays is the largest."""


def random_point(sites: Sequence[Site], rng: np.random.Generator, full: bool = False) -> dict[str, jax.Array]:
    """Arbitrary values of all latents, of minibatch (or full) shape."""
    point = {}
    for s in sites:
        shape = s.shape if full else s.batch_shape
        if s.discrete:
            value: np.ndarray = s.values.low + rng.integers(0, min(s.values.count or 4, 4), shape)
        else:
            value = 0.5 * rng.standard_normal(shape)
        point[s.name] = jnp.asarray(value, s.dtype)
    return point


def check_rows(
    evaluate: Callable[..., Mapping[str, Any]],
    axes: Mapping[str, Mapping[str, int]],
    sites: Sequence[Site],
    plates: Sequence[Plate],
) -> None:
    """Refuse a model whose rows are not independent: no N/B makes its minibatches unbiased.

    A second minibatch keeps only the first row, and a third is the first in another order. What a row contributes
    must be the same in all three, and so must be what lies outside the plates.

    Args:
        evaluate: (z, rows) -> log-probabilities of every term, element by element.
        axes: term -> subsampled plate -> axis of the term.
        sites: the latent sites.
        plates: the subsampled plates.

    Raises:
        TargetError: a row depends on the rest of its minibatch, or on its place in it.
    """
    rng = np.random.default_rng(0)
    for _ in range(ROUNDS):
        here, there, back = (evaluate(z, rows) for z, rows in _three_batches(sites, plates, rng))
        for name, where in axes.items():
            a, b, c = (np.asarray(terms[name]) for terms in (here, there, back))
            c = np.roll(c, -1, tuple(where.values())) if where else c
            row = tuple(0 if k in where.values() else slice(None) for k in range(a.ndim))
            # Elsewhere in a vector, the last digits may differ; at the same place they may not.
            if not _close(a[row], b[row], 1e-5) or not _close(a, c, 1e-2):
                raise TargetError(_dependent(name, plates, bool(where)))


def _three_batches(
    sites: Sequence[Site], plates: Sequence[Plate], rng: np.random.Generator
) -> list[tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Latents and rows of a minibatch, of one that keeps only its first row, and of the same in another order."""
    z, other = random_point(sites, rng), random_point(sites, rng)
    rows, changed = {}, {}
    for p in plates:
        order = rng.permutation(p.size)
        rows[p.name] = order[: p.batch]
        # As many new rows as there are.
        changed[p.name] = np.append(order[0], np.append(order[p.batch :], order[1 : p.batch])[: p.batch - 1])
    moved, rolled = dict(z), dict(z)
    for s in sites:
        if s.local is not None:
            first = (slice(None),) * s.local[1] + (0,)
            moved[s.name] = other[s.name].at[first].set(z[s.name][first])
            rolled[s.name] = jnp.roll(z[s.name], 1, s.local[1])
    turned = {name: np.roll(r, 1) for name, r in rows.items()}
    batches = ((z, rows), (moved, changed), (rolled, turned))
    return [(point, {name: jnp.asarray(r) for name, r in picked.items()}) for point, picked in batches]


def _close(a: Any, b: Any, tolerance: float) -> bool:
    return np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _dependent(name: str, plates: Sequence[Plate], inside: bool) -> str:
    where = " and ".join(repr(p.name) for p in plates)
    found = "rows that depend on the other rows or on their order" if inside else "a term that depends on the minibatch"
    cure = (
        "compute sums and means over the whole data outside the model, index every array of this plate by its rows "
        "(`with numpyro.plate(name, N) as i: ... y[i]`), or see the plate whole"
    )
    return message(f"term {name!r}, subsampled plate {where}", found, "rows independent given the global latents", cure)


def check_masks(evaluate: Callable[..., Mapping[str, Any]], masks: Mapping[str, Any], sites: Sequence[Site]) -> None:
    """Refuse masked latents that something still depends on.

    A coordinate that nothing holds would be a free parameter of q. Where nothing else depends on the masked
    coordinates, their own prior integrates to one, and keeping it leaves the evidence as it is.

    Args:
        evaluate: full-size z -> log-probabilities of every statement, with all masks applied.
        masks: latent -> its mask, which broadcasts with the latent.
        sites: the latent sites.

    Raises:
        TargetError: a term that counts depends on a masked coordinate.
    """
    rng = np.random.default_rng(0)
    one, two = random_point(sites, rng, full=True), random_point(sites, rng, full=True)
    before = evaluate(one)
    for name, mask in masks.items():
        after = evaluate({**one, name: jnp.where(mask, one[name], two[name])})
        for term in before:
            if not np.array_equal(np.asarray(before[term]), np.asarray(after[term]), equal_nan=True):
                found = f"a mask on its prior, and a term ({term!r}) that depends on the masked coordinates"
                cure = "mask observed statements only, or use numpyro.distributions.ImproperUniform for a flat prior"
                raise TargetError(message(f"site {name!r}", found, "masked latents that nothing depends on", cure))
