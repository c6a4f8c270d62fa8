"""The record of a fit's steps: what it keeps, and when it calls a chunk a collapse."""

from __future__ import annotations

import numpy as np
import pytest

from hivi._fit.history import History

CHUNK = 10


def collapsed(elbo: np.ndarray) -> bool:
    """The definition, from all steps: the last chunk's median against the best earlier one's."""
    chunks = elbo.reshape(-1, CHUNK)
    if len(chunks) < 3:
        return False
    middle = np.nanmedian(chunks, axis=1)
    noise = np.nanmedian(np.abs(chunks - middle[:, None]), axis=1)
    best = int(np.argmax(middle[:-1]))
    fall = middle[best] - middle[-1]
    return bool(fall > 100 * max(noise[best], 1e-3) and fall > 10 + abs(middle[best]))


def runs() -> np.ndarray:
    """(runs, steps): some rise, some fall off at once or by little, with a few steps lost."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 8 * CHUNK)) * rng.choice([1e-4, 0.01, 1.0], size=(200, 1))
    rise = -5.0 * np.exp(-np.arange(8 * CHUNK) / 20)
    falls = (np.arange(8 * CHUNK) >= rng.integers(1, 8, size=(200, 1)) * CHUNK) * rng.choice(
        [0, 5, 30, 1e4], size=(200, 1)
    )
    return np.where(rng.random(noise.shape) < 0.02, np.nan, rise + noise - falls)


def test_every_step_is_kept_and_the_last_chunk_may_be_short() -> None:
    found, elbo = History(CHUNK), np.arange(47.0)
    for start in range(0, 47, CHUNK):
        found.add(elbo[start : start + CHUNK], -elbo[start : start + CHUNK])
    assert len(found) == 47
    np.testing.assert_array_equal(found.elbo, elbo)
    np.testing.assert_array_equal(found.stderr, -elbo)


def test_a_collapse_is_what_all_steps_together_say() -> None:
    said = []
    for elbo in runs():
        found = History(CHUNK)
        for start in range(0, len(elbo), CHUNK):
            chunk = elbo[start : start + CHUNK]
            said.append(found.collapsed(chunk))
            assert said[-1] == collapsed(elbo[: start + CHUNK])
            found.add(chunk, chunk)
    assert 100 < sum(said) < len(said) - 100


def test_a_short_chunk_is_never_a_collapse_and_no_finite_step_is_none_either() -> None:
    found = History(CHUNK)
    for _ in range(3):
        found.add(np.zeros(CHUNK), np.zeros(CHUNK))
    assert found.collapsed(np.full(CHUNK, -1e6))
    assert not found.collapsed(np.full(CHUNK - 1, -1e6))
    assert not found.collapsed(np.full(CHUNK, np.nan))


def test_infinite_steps_count_no_more_than_missing_ones() -> None:
    plain, found = History(CHUNK), History(CHUNK)
    for elbo in np.random.default_rng(0).normal(size=(3, CHUNK)):
        plain.add(elbo[:-1].repeat(2)[:CHUNK], elbo)
        found.add(np.where(np.arange(CHUNK) == 4, -np.inf, elbo), elbo)
    assert plain.best == pytest.approx(found.best, abs=2.0)
    assert np.isfinite(found.best)
    assert not found.collapsed(np.full(CHUNK, -np.inf))


def test_a_record_taken_up_again_judges_as_before() -> None:
    said = []
    for elbo in runs():
        for behind in range(2, 7):
            steady, resumed = History(CHUNK), History(CHUNK)
            for start in range(0, behind * CHUNK, CHUNK):
                steady.add(elbo[start : start + CHUNK], elbo[start : start + CHUNK])
            resumed.add(elbo[: behind * CHUNK], elbo[: behind * CHUNK])
            np.testing.assert_array_equal(steady.elbo, resumed.elbo)
            last = elbo[behind * CHUNK : (behind + 1) * CHUNK]
            assert steady.collapsed(last) == resumed.collapsed(last)
            said.append(resumed.collapsed(last))
    assert 20 < sum(said) < len(said) - 20
