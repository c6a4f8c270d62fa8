"""Numeric checks of a model at random points: rows of a minibatch are independent, masked latents are free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hivi._errors import TargetError, message
from hivi._space import Plate, Site


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

    Two minibatches share one row, at different places; all other rows, and their latents, differ. What the
    shared row contributes must not, and what lies outside the plates must not either.

    Args:
        evaluate: (z, rows) -> log-probabilities of every term, element by element.
        axes: term -> subsampled plate -> axis of the term.
        sites: the latent sites.
        plates: the subsampled plates.

    Raises:
        TargetError: a row depends on the rest of its minibatch.
    """
    rng = np.random.default_rng(0)
    one, two = random_point(sites, rng), random_point(sites, rng)
    rows = [{p.name: rng.permutation(p.size)[: p.batch] for p in plates} for _ in range(2)]
    for p in plates:
        shared = rows[0][p.name][0]
        new = rng.permutation(np.setdiff1d(np.arange(p.size), rows[0][p.name]))
        others = np.append(new, rows[0][p.name][1:])[: p.batch - 1]
        rows[1][p.name] = np.append(rng.permutation(others), shared)
    for s in sites:
        if s.local is None:
            two[s.name] = one[s.name]
        else:
            axis = s.local[1]
            last = (slice(None),) * axis + (-1,)
            two[s.name] = two[s.name].at[last].set(jnp.take(one[s.name], 0, axis))
    first, second = (
        evaluate(z, {name: jnp.asarray(r, jnp.int32) for name, r in picked.items()})
        for z, picked in zip((one, two), rows, strict=True)
    )
    for name, where in axes.items():
        a, b = np.asarray(first[name]), np.asarray(second[name])
        for axis in sorted(where.values(), reverse=True):
            a, b = np.asarray(np.take(a, 0, axis)), np.asarray(np.take(b, -1, axis))
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, _size(a)), equal_nan=True):
            raise TargetError(_dependent(name, plates, bool(where)))


def _size(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0))


def _dependent(name: str, plates: Sequence[Plate], inside: bool) -> str:
    where = " and ".join(repr(p.name) for p in plates)
    found = "rows that depend on the other rows" if inside else "a term that depends on the rows of the minibatch"
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
