"""Dead topics: split off the largest, with nothing else changed, and alive after some passes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hivi.topics import Architecture, Corpus, amortised, liveness, start, train
from hivi.topics.inference import posterior_means
from hivi.topics.revival import DEAD, revive, split_largest

RNG = np.random.default_rng(0)
MIXED = RNG.dirichlet(np.full(3, 0.1), 60) @ RNG.dirichlet(np.full(20, 0.1), 3)
CORPUS = Corpus.from_matrix(RNG.poisson(30 * MIXED))


def test_the_largest_is_split_for_each_dead_topic():
    counts = np.array([[8.0, 0.1, 0.0, 3.0], [4.0, 0.0, 0.0, 2.0]])
    split, parents = split_largest(counts, np.random.default_rng(0))
    np.testing.assert_allclose(split.sum(1), [11.0, 6.0], rtol=0.02)  # what the dead had is lost
    np.testing.assert_array_equal(parents, [0, 0, parents[2], 3])
    assert parents[2] in (0, 3)
    assert (split.sum(0) > DEAD * 17 / 4).all()
    same, own = split_largest(split, np.random.default_rng(1))
    np.testing.assert_array_equal(same, split)
    np.testing.assert_array_equal(own, np.arange(4))


@pytest.mark.parametrize("network", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_dead_topic_lives_again_and_no_rate_changes(network):
    architecture = Architecture((4, 2))
    fit = start(CORPUS, architecture, amortised(architecture, hidden=8) if network else None, key=jax.random.key(0))
    train(fit, 6, rng=np.random.default_rng(0))
    weights = next(p for p in fit.stream.state.shared.parts if p.sites[0].name == "w0")
    dead = np.asarray(weights.shape["w0"]).copy()
    dead[:, 2] = architecture.priors.topic_shape
    weights.shape["w0"] = jax.numpy.asarray(dead)

    def look():
        z, w = posterior_means(fit.stream, architecture, key=jax.random.key(1)), fit.weights()
        return z, w, fit.weights(1)

    z, w, above = look()
    assert network or liveness(z[0], w.T).alive.tolist() == [True, True, False, True]
    assert revive(fit.stream, architecture, np.random.default_rng(0)) == 1
    after, split, over = look()
    parent = int(np.argmax((dead - architecture.priors.topic_shape).clip(0).sum(0)))
    np.testing.assert_allclose(split[:, 2] + split[:, parent], w[:, parent], rtol=1e-4, atol=0.03)
    np.testing.assert_allclose(over[2], above[parent], rtol=1e-5)
    if not network:  # a network's answer also depends on a feature of the topic's own
        np.testing.assert_allclose(after[0][:, 2], z[0][:, parent], rtol=1e-5)
        np.testing.assert_allclose(after[0] @ split.T, z[0] @ w.T, rtol=0.1, atol=0.1)
    train(fit, 10, rng=np.random.default_rng(1))
    z, w, _ = look()
    assert liveness(z[0], w.T).alive.all()
    assert revive(fit.stream, architecture, np.random.default_rng(0)) == 0


def test_other_fits_stay_as_they_are():
    fit = start(CORPUS, Architecture((3,), weights="normal"), key=jax.random.key(0))
    before = fit.weights()
    assert revive(fit.stream, fit.architecture, np.random.default_rng(0)) == 0
    np.testing.assert_array_equal(fit.weights(), before)
