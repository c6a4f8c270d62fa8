"""Bounds: a ladder below a known log p(x), and `increment` as the change of `value` that it claims to be."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp
from jaxtyping import Array

import hivi
from cases import TARGETS, built, quick, states
from hivi._estimators.evaluation import log_weights


def truth(target: hivi.Target, most: int = 40) -> float:
    """Log of the normaliser, by enumeration."""
    return float(logsumexp(jax.vmap(target.log_joint)(states(target.sites, most))))


def estimates(target: hivi.Target, proposal: object, bound: object, count: int = 20_000, seed: int = 0) -> Array:
    """Independent estimates of a bound, from the same keys whatever the bound."""
    keys = jax.random.split(jax.random.key(seed), count)
    return quick(jax.vmap(lambda k: log_weights(proposal, target, bound, k)))(keys)


def assert_below(low: Array, high: Array | float) -> None:
    """Mean of `low` is below `high`: by four standard errors above it at most, and by some clearly."""
    gap = np.asarray(high).mean() - np.asarray(low).mean()
    stderr = np.hypot(np.std(low) / np.sqrt(np.size(low)), np.std(high) / np.sqrt(np.size(high)))
    assert stderr < 0.02, "not precise enough to judge"
    assert gap > -4 * stderr


@pytest.mark.parametrize("name", ["chain", "count"])
def test_outer_draws_tighten(name):
    target = TARGETS[name]()
    proposal = built("mean-field", target, scale=0.5)
    rungs = [estimates(target, proposal, b) for b in (hivi.Elbo(), *map(_outer, (2, 8)))]
    assert_below(rungs[0], rungs[1])
    assert_below(rungs[1], rungs[2])
    assert_below(rungs[2], truth(target))
    assert np.mean(rungs[2]) - np.mean(rungs[0]) > 0.01, "the ladder has no steps"


def _outer(count: int) -> hivi.ImportanceWeighted:
    return hivi.ImportanceWeighted(outer=count)


@pytest.mark.parametrize("family", ["hvm full-rank, semi-implicit", "hvm mean-field"])
def test_inner_draws_tighten(family):
    target = TARGETS["pair"]()
    proposal = built(family, target)
    rungs = [estimates(target, proposal, hivi.ImportanceWeighted(outer=1, inner=k)) for k in (0, 1, 4)]
    assert_below(rungs[0], rungs[1])
    assert_below(rungs[1], rungs[2])
    assert_below(rungs[2], truth(target))
    assert np.mean(rungs[2]) - np.mean(rungs[0]) > 0.01, "the ladder has no steps"


def test_branches_tighten():
    """A mixture's multi-sample bound takes the mean over its branches inside the logarithm."""
    target = TARGETS["pair"]()
    proposal = built("mixture", target, scale=0.5)
    elbo, weighted = (estimates(target, proposal, b) for b in (hivi.Elbo(), _outer(1)))
    assert_below(elbo, weighted)
    assert_below(weighted, truth(target))


def test_one_draw_is_the_elbo():
    target = TARGETS["chain"]()
    proposal = built("hvm full-rank", target)
    elbo, weighted = (estimates(target, proposal, b, 50) for b in (hivi.Elbo(), _outer(1)))
    np.testing.assert_array_equal(elbo, weighted)


# Increments

BRANCHES = {1: jnp.zeros(1), 3: jnp.log(jnp.array([0.2, 0.5, 0.3]))}
UP_AND_DOWN = [0.0, 1e-4, -1e-4, 0.3, -0.3, 3.0, -3.0, 9.9, -9.9, 10.1, -10.1]
SLACK = {"rtol": 1e-5, "atol": 2e-6}


def increments(bound: object, log_w: np.ndarray, log_pi: Array, change: float) -> tuple[np.ndarray, np.ndarray]:
    """What `increment` says when every draw in turn changes, and the difference of values in double precision."""
    found = bound.increment(jnp.asarray(log_w), log_pi, jnp.full(log_w.shape, change))
    right = np.zeros(log_w.shape)
    with jax.enable_x64(True):
        wide, pi = jnp.asarray(log_w, jnp.float64), jnp.asarray(np.asarray(log_pi), jnp.float64)
        before = bound.value(wide, pi)
        for _, outer, branch in np.ndindex(1, *log_w.shape[1:]):
            moved = wide.at[:, outer, branch].add(change)
            right[:, outer, branch] = bound.value(moved, pi) - before
    return np.asarray(found), right


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("bound", [hivi.Elbo(), _outer(1), _outer(4)], ids=["elbo", "outer 1", "outer 4"])
@pytest.mark.parametrize("change", [*UP_AND_DOWN, 50.0, -50.0])
def test_increment_is_the_change_of_the_value(bound, branches, change):
    log_w = np.random.default_rng(0).normal(size=(5, bound.draws, branches)).astype(np.float32)
    found, right = increments(bound, log_w, BRANCHES[branches], change)
    np.testing.assert_allclose(found, right, **SLACK)


def test_increment_to_an_impossible_value():
    """A change of -inf takes the draw away; the others remain."""
    bound, log_w = _outer(3), np.random.default_rng(1).normal(size=(4, 3, 1)).astype(np.float32)
    found, right = increments(bound, log_w, jnp.zeros(1), -np.inf)
    np.testing.assert_allclose(found, right, **SLACK)


def test_increment_beside_impossible_draws():
    """A draw of weight zero among the others changes nothing for them."""
    bound = _outer(3)
    log_w = np.array([[[0.0], [-1.0], [-np.inf]]], np.float32)
    found, right = increments(bound, log_w, jnp.zeros(1), 1.5)
    np.testing.assert_allclose(found[:, :2], right[:, :2], **SLACK)


@pytest.mark.parametrize(
    ("log_w", "change"),
    [
        ((0.0, -30.0, -40.0), -50.0),  # the dominating draw falls behind
        ((0.0, -30.0, -40.0), -np.inf),
        ((0.0, -17.0, -40.0), -20.0),
        ((0.0, -17.0, -40.0), -12.0),  # its share rounds to 1
        ((0.0, -9.9, -20.0), -9.9),
        ((0.0, -100.0, -40.0), 150.0),  # a draw far behind takes over
        ((0.0, -95.0, -40.0), 100.0),
    ],
)
def test_increment_where_one_draw_dominates(log_w, change):
    found, right = increments(_outer(3), np.array(log_w, np.float32).reshape(1, 3, 1), jnp.zeros(1), change)
    np.testing.assert_allclose(found, right, **SLACK)


def test_increment_broadcasts_over_moves_and_coordinates():
    """Axes after (samples, outer, branches) are moves and coordinates: each is a change of that draw alone."""
    rng = np.random.default_rng(2)
    for bound in (hivi.Elbo(), _outer(3)):
        log_w = jnp.asarray(rng.normal(size=(2, bound.draws, 3)), jnp.float32)
        change = jnp.asarray(rng.normal(size=(2, bound.draws, 3, 2, 4)), jnp.float32)
        found = bound.increment(log_w, BRANCHES[3], change)
        one = jnp.stack(
            [bound.increment(log_w, BRANCHES[3], change[..., m, i]) for m in range(2) for i in range(4)], -1
        )
        np.testing.assert_allclose(found.reshape(one.shape), one, rtol=1e-6)


@pytest.mark.parametrize("wrong", [{"outer": 0}, {"outer": 2, "inner": -1}])
def test_counts_of_draws_are_checked(wrong):
    with pytest.raises(hivi.FitError, match="an integer, at least"):
        hivi.ImportanceWeighted(**wrong)


def test_bounds_are_values():
    """Equal bounds are equal and hash alike: they are static arguments of compiled steps."""
    assert eqx.tree_equal(_outer(3), hivi.ImportanceWeighted(outer=3, inner=0))
    assert hash(_outer(3)) == hash(_outer(3))
    assert hivi.ImportanceWeighted(3, 2).inner == 2
