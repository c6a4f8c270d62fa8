"""Would a Gibbs step move q? Against exact conditionals, and on fits that miss a mode."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from hivi._space import Values
from hivi._stationarity import NARROW, SINGLE, cells, odds

KEY = jax.random.key(0)
QUIET = {"key": KEY, "progress": False, "tolerance": None, "steps": 1500}


def two_modes(z: dict[str, Array]) -> Array:
    return jnp.logaddexp(dist.Poisson(5.0).log_prob(z["z"]), dist.Poisson(60.0).log_prob(z["z"]))


def occupancy() -> None:
    seen = jnp.array([0, 0, 1, 0, 2, 0])
    with numpyro.plate("place", 6):
        count = numpyro.sample("count", dist.ZeroInflatedPoisson(0.4, 12.0))
        numpyro.sample("seen", dist.Poisson(0.1 * count + 0.01), obs=seen)


def test_a_mode_that_q_misses_is_found():
    target = hivi.from_log_joint(two_modes, {"z": hivi.Latent((), constraints.nonnegative_integer)})
    fit = hivi.fit(target, hivi.MeanField(), **QUIET)
    assert fit.sample(KEY)["z"].max() < 25
    (found,) = odds(fit, KEY)
    assert found.clear
    assert abs(found.apart - 0.5) < 0.1
    assert 40 < found.low < 70
    assert found.q == 0.0
    said = [f for f in hivi.trust(fit, key=KEY).faults if "at odds with the model at z" in f]
    assert len(said) == 1


def test_the_coordinate_and_the_value_are_named():
    """Of six independent counts the third was seen once: hardly ever zero."""
    target = hivi.from_numpyro(occupancy)
    fit = hivi.fit(target, hivi.MeanField(), **QUIET)
    at_zero = np.asarray(fit.sample(KEY)["count"] == 0).mean(0)
    (found,) = odds(fit, KEY)
    counts = np.arange(100)
    prior = np.where(counts == 0, 0.4, 0.0) + 0.6 * np.exp(dist.Poisson(12.0).log_prob(counts))
    given = prior * np.exp(dist.Poisson(0.1 * counts + 0.01).log_prob(1))
    if at_zero[2] > 0.5:
        assert (found.at, found.low, found.high) == ((2,), 0, 0)
        assert abs(found.given - given[0] / given.sum()) < 0.01
    assert found.clear == (found.apart > 0.1 + 2 * found.noise)
    assert "count[" in str(found)


def test_the_averages_are_those_of_enumeration():
    """Mean-field on a table of three by two: E_q[p(z_i | z_j)] in closed form."""
    table = np.log(np.array([[0.30, 0.02], [0.05, 0.33], [0.10, 0.20]]))
    latents = {
        "a": hivi.Latent((), constraints.integer_interval(0, 2)),
        "b": hivi.Latent((), constraints.boolean),
    }
    target = hivi.from_log_joint(lambda z: jnp.asarray(table)[z["a"], z["b"]], latents)
    fit = hivi.fit(target, hivi.MeanField(), **QUIET)
    draws = {n: np.asarray(v) for n, v in fit.sample(jax.random.key(3), 100_000).items()}
    q = {n: np.bincount(v, minlength=3 if n == "a" else 2) / len(v) for n, v in draws.items()}
    p = np.exp(table)
    exact = {"a": (p / p.sum(0)) @ q["b"], "b": q["a"] @ (p / p.sum(1, keepdims=True))}
    for found in odds(fit, KEY):
        assert abs(found.given - exact[found.site][found.low]) < 0.06
        assert abs(found.apart - 0.5 * np.abs(exact[found.site] - q[found.site]).sum()) < 0.08


@pytest.mark.parametrize("mean", [0.3, 4.0, 200.0, 3000.0])
def test_the_posterior_itself_has_no_fault(mean):
    shape = (3,)
    target = hivi.from_log_joint(
        lambda z: dist.Poisson(mean).log_prob(z["z"]), {"z": hivi.Latent(shape, constraints.nonnegative_integer)}
    )
    fit = hivi.fit(target, hivi.MeanField(), **QUIET)
    assert not any(found.clear for found in odds(fit, KEY))


def test_what_is_not_looked_at():
    y = jnp.zeros(8)

    def rows(y):
        with numpyro.plate("row", len(y)):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    small = hivi.from_numpyro(rows, y, subsample={"row": 4})
    fit = hivi.fit(small, hivi.MeanField(), key=KEY, steps=20, progress=False)
    assert odds(fit, KEY) == []
    assert cells(Values("finite", 0, 5000), np.array([3])) is None
    uneven = np.stack([np.arange(100) % 3, np.arange(100) * 50], 1)  # cells for one are too wide for the other
    assert cells(Values("count", 0), uneven) is None


def test_cells_cover_the_range_once():
    draws = np.random.default_rng(0).poisson(500, 300)[:, None]
    for values in (Values("count", 0), Values("count", 2), Values("binomial", 0, 4000)):
        ends = cells(values, draws)
        assert ends is not None
        assert ends[0] == values.low
        assert np.all(np.diff(ends) > 0)
        assert np.all(np.diff(ends[:SINGLE]) == 1)
        inside = ends[(ends >= draws.min()) & (ends <= draws.max())]
        assert np.diff(inside).max() <= np.ptp(draws) / NARROW + 1
        assert ends[-1] == (values.low + values.count if values.count else ends[-1])
