"""Change points in Poisson counts: the index alone (rates integrated out), two of them, and the index with its rates."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from base import Problem, normalise, site_marginals
from jax.scipy.special import gammaln as jax_gammaln
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints
from scipy.special import gammaln

import hivi

SHAPE, RATE = 2.0, 0.5
"""Of the Gamma prior of every rate."""
LENGTH = 24


def counts(rates: tuple[float, ...], length: int = LENGTH, seed: int = 0) -> Int[np.ndarray, " length"]:
    """Counts over `length` years, whose rate changes at equal distances."""
    rng = np.random.default_rng([seed, length, len(rates)])
    years = np.arange(length)
    return rng.poisson(np.array(rates)[years * len(rates) // length])


def evidence(total: np.ndarray, years: np.ndarray) -> np.ndarray:
    """Log of the integral of Gamma(r; SHAPE, RATE) r^total e^(-r years) over the rate r."""
    shape, rate = SHAPE + total, RATE + years
    return SHAPE * np.log(RATE) - gammaln(SHAPE) + gammaln(shape) - shape * np.log(rate)


def _evidence(total: Array, years: Array) -> Array:
    shape, rate = SHAPE + total, RATE + years
    return SHAPE * np.log(RATE) - jax_gammaln(SHAPE) + jax_gammaln(shape) - shape * jnp.log(rate)


def _segments(x: np.ndarray, number: int) -> tuple[Float[np.ndarray, "*indices"], np.ndarray, np.ndarray]:
    """Log-evidence of every choice of `number` change points, and of its segments the totals and years.

    Index k means that the rate changes after year k: years 0..k belong to the segment before. Two change points may come
    in either order, and may be the same.
    """
    length = len(x)
    before = np.cumsum(x)
    index = np.stack(np.meshgrid(*[np.arange(length)] * number, indexing="ij"), -1)
    index = np.sort(index, -1)
    ends = np.concatenate([index + 1, np.full((*index.shape[:-1], 1), length)], -1)
    sums = np.concatenate([before[index], np.full((*index.shape[:-1], 1), before[-1])], -1)
    years = np.diff(ends, axis=-1, prepend=0)
    totals = np.diff(sums, axis=-1, prepend=0)
    fixed = -np.sum(gammaln(x + 1.0)) - number * np.log(length)
    return np.sum(evidence(totals, years), -1) + fixed, totals, years


def indices(number: int, rates: tuple[float, ...]) -> Problem:
    """`number` change points with uniform priors; their rates are integrated out."""
    x = counts(rates)
    length = len(x)
    log_p, _, _ = _segments(x, number)
    log_z, table = normalise(log_p)
    latents = {"index": hivi.Latent((number,), constraints.integer_interval(0, length - 1))}
    cumulated = jnp.asarray(np.cumsum(x), jnp.float32)
    constant = -float(np.sum(gammaln(x + 1.0)))

    def likelihood(index: Array) -> Array:
        cuts = [jnp.min(index), jnp.max(index)] if number == 2 else [index[0]]
        ends = [0.0, *(c + 1.0 for c in cuts), float(length)]
        sums = [0.0, *(cumulated[c] for c in cuts), cumulated[-1]]
        parts = [_evidence(sums[k + 1] - sums[k], ends[k + 1] - ends[k]) for k in range(number + 1)]
        return sum(parts, jnp.array(constant))

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {"prior": jnp.full(number, -np.log(length)), "counts": likelihood(z["index"])}

    def model() -> None:
        with numpyro.plate("changes", number):
            index = numpyro.sample("index", dist.DiscreteUniform(0, length - 1))
        numpyro.factor("counts", likelihood(index))

    if number == 1:
        about = f"one change point in {length} years, rates integrated out: mean-field is exact"
    else:
        about = f"two unordered change points in {length} years: modes in pairs, ridges"
    name = "change-point" if number == 1 else "change-points-2"
    return Problem(name, about, latents, log_joint, model, log_z, site_marginals(table, latents), table)


def one() -> Problem:
    """One change point: a control, on which every family must reach log Z."""
    return indices(1, (3.0, 1.5))


def two() -> Problem:
    """Two change points, unordered."""
    return indices(2, (2.0, 4.5, 1.5))


def with_rates() -> Problem:
    """One change point and the rates before and after it: sites `index` (discrete) and `rate` (two positive numbers).

    Given the index the rates are Gamma, so that log Z and the index are those of `one`; the rates' moments are mixtures.
    """
    x = counts((3.0, 1.5))
    length = len(x)
    log_p, totals, years = _segments(x, 1)
    log_z, table = normalise(log_p)
    mean = (SHAPE + totals) / (RATE + years)
    square = mean * (SHAPE + totals + 1) / (RATE + years)
    first, second = table @ mean, table @ square
    moments = np.stack([first, np.sqrt(second - first**2)], -1)
    latents = {
        "index": hivi.Latent((), constraints.integer_interval(0, length - 1)),
        "rate": hivi.Latent((2,), constraints.positive),
    }
    data, axis = jnp.asarray(x), jnp.arange(length)

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        rate = jnp.where(axis <= z["index"], z["rate"][0], z["rate"][1])
        return {
            "index": jnp.array(-np.log(length)),
            "rate": dist.Gamma(SHAPE, RATE).log_prob(z["rate"]),
            "counts": dist.Poisson(rate).log_prob(data),
        }

    def model() -> None:
        index = numpyro.sample("index", dist.DiscreteUniform(0, length - 1))
        with numpyro.plate("segments", 2):
            rate = numpyro.sample("rate", dist.Gamma(SHAPE, RATE))
        with numpyro.plate("years", length):
            numpyro.sample("counts", dist.Poisson(jnp.where(axis <= index, rate[0], rate[1])), obs=data)

    about = f"one change point in {length} years with its two rates: discrete and continuous latents depend"
    marginals = {"index": table, "rate": moments}
    return Problem("change-point-rates", about, latents, log_joint, model, log_z, marginals)
