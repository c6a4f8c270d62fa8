"""LowRank against the dense Gaussian that it is, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

import hivi
from cases import TARGETS, perturbed, quick
from hivi._families.low_rank import LowRankProposal
from hivi._space import Latents

KEY = jax.random.key(0)


def proposal(dim: int, rank: int, spread: float = 1.0) -> LowRankProposal:
    target = hivi.from_log_joint(lambda z: -0.5 * jnp.sum(z["x"] ** 2), {"x": hivi.Latent((dim,))})
    return perturbed(hivi.LowRank(rank).build(target.sites, KEY), jax.random.key(1), spread)


def covariance(own: LowRankProposal) -> np.ndarray:
    scale, v = np.exp(np.asarray(own.log_scale, np.float64)), np.asarray(own.directions, np.float64)
    return scale[:, None] * (np.eye(len(scale)) + v.T @ v) * scale


@pytest.mark.parametrize(("dim", "rank"), [(1, 1), (2, 1), (5, 2), (3, 6), (40, 4)])
def test_density_is_that_of_the_dense_gaussian(dim, rank):
    own = proposal(dim, rank)
    points = jax.random.normal(KEY, (20, dim))
    found = quick(jax.vmap(lambda x: own.log_density({"x": x}, KEY)))(points)
    with jax.enable_x64(True):
        exact = multivariate_normal.logpdf(
            np.asarray(points, np.float64), np.asarray(own.location, np.float64), covariance(own)
        )
    np.testing.assert_allclose(found, exact, rtol=3e-5, atol=3e-4)


def test_draws_have_the_covariance():
    own = proposal(4, 2)
    jacobian = quick(jax.jacfwd(lambda b: own.from_coordinates(b)[0]["x"]))(jnp.ones(4))
    np.testing.assert_allclose(jacobian @ jacobian.T, covariance(own), rtol=1e-4, atol=1e-4)


def test_single_precision_holds_beside_a_long_direction():
    """A direction 1000 times as long as the rest: Woodbury's difference of two large numbers would lose 0.1 nats."""
    own = proposal(30, 2)
    own = LowRankProposal(own.sites, own.location, own.log_scale, own.directions.at[0].multiply(1000.0))
    z, context = own.propose(jax.random.key(3))
    np.testing.assert_allclose(own.coordinates(z, None).base, context, atol=2e-3)


def test_stretch_widens_along_the_rows():
    own = proposal(5, 3, 0.0)
    extra = jnp.array([[0.0, 2.0, -1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0, 0.3]])
    wide = own.stretch(extra)
    assert wide.directions.shape == own.directions.shape
    np.testing.assert_allclose(covariance(wide), covariance(own) + np.asarray(extra.T @ extra), atol=2e-2)
    assert own.stretch(jnp.eye(5)).directions.shape == own.directions.shape


def test_fit_finds_the_full_covariance_where_the_rank_allows():
    """A Gaussian of diagonal plus rank one is in the family: the bound is log Z to the noise of the fit."""
    v = jnp.array([1.0, -2.0, 0.5, 1.5, -0.7])
    precision = jnp.linalg.inv(jnp.eye(5) + jnp.outer(v, v))

    def log_joint(z: Latents) -> jax.Array:
        return -0.5 * z["x"] @ precision @ z["x"] + 0.5 * jnp.linalg.slogdet(precision / (2 * jnp.pi))[1]

    target = hivi.from_log_joint(log_joint, {"x": hivi.Latent((5,))})
    fit = hivi.fit(target, hivi.LowRank(1), key=KEY, steps=3000, progress=False)
    found = fit.elbo(KEY, 4096)
    assert found.stderr < 0.01
    assert abs(found.mean) < 0.02


@pytest.mark.parametrize("rank", [0, -1, True])
def test_a_bad_rank_is_refused(rank):
    with pytest.raises(
        hivi.FamilyError, match=r"LowRank\(rank=\.\.\.\): found .*; expected an integer, at least 1. Cure: "
    ):
        hivi.LowRank(rank).build(TARGETS["normal"]().sites, KEY)


def test_a_discrete_site_is_refused():
    with pytest.raises(hivi.FamilyError, match="LowRank at site 'z'"):
        hivi.LowRank(1).build(TARGETS["pair"]().sites, KEY)
