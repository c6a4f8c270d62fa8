"""How far a fit is to be trusted: figures, faults in words, and refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import hivi
from hivi._fit.result import check_key
from hivi._marginal import KHat

KEY = jax.random.key(0)
QUIET: dict[str, Any] = {"key": KEY, "progress": False}


def bernoulli() -> hivi.Target:
    """Figure 1 of the paper: log p(x) = 0, and mean-field lacks 0.2231."""
    table = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
    return hivi.from_log_joint(lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)})


def student() -> hivi.Target:
    return hivi.from_log_joint(lambda z: dist.StudentT(1.0).log_prob(z["x"]), {"x": hivi.Latent()})


def pinned() -> hivi.Target:
    """A count that an observation pins down."""
    return hivi.from_log_joint(
        lambda z: dist.Normal(1.0 * z["z"], 0.8).log_prob(17.2) + dist.Poisson(20.0).log_prob(z["z"]),
        {"z": hivi.Latent((), constraints.nonnegative_integer)},
    )


def test_a_good_fit_has_no_fault():
    target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, {"x": hivi.Latent()})
    found = hivi.trust(hivi.fit(target, hivi.MeanField(), **QUIET), key=KEY)
    assert found.faults == found.remarks == ()
    assert "no fault found" in str(found)
    assert abs(found.bound.mean - 0.5 * float(jnp.log(2 * jnp.pi))) < 0.01


def test_each_fault_has_its_words():
    loose = hivi.trust(hivi.fit(bernoulli(), hivi.MeanField(), **QUIET), key=KEY)
    assert loose.tighter is not None
    assert abs(loose.tighter.mean - loose.bound.mean - 0.22) < 0.06
    assert [f for f in loose.faults if "misses at least 0.2" in f]
    heavy = hivi.trust(hivi.fit(student(), hivi.MeanField(), **QUIET), key=KEY)
    assert [f for f in heavy.faults if "k-hat" in f]
    assert "hivi.compare" in " ".join(heavy.remarks)
    short = hivi.trust(hivi.fit(student(), hivi.MeanField(), steps=20, **QUIET), key=KEY)
    assert (
        short.faults[0]
        == "did not converge in 20 steps, too few to tell whether its bound is level: take at least 2000"
    )
    json.dumps(short.as_dict(), allow_nan=False)


@pytest.mark.slow
def test_counts_too_narrow_for_poissons_are_told_the_cure():
    found = hivi.trust(hivi.fit(pinned(), hivi.MeanField(), **QUIET), key=KEY)
    assert [r for r in found.remarks if "counts (z)" in r and "dispersed=True" in r]
    cured = hivi.trust(hivi.fit(pinned(), hivi.MeanField(dispersed=True), **QUIET), key=KEY)
    assert cured.faults == ()


def test_what_is_not_finite_is_null_in_json():
    fine = hivi.Estimate(-1.0, 0.1)
    found = hivi.Trust(fine, hivi.Estimate(math.nan, math.inf), KHat(math.inf, True, 0.0, 1000, 0), (), ())
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["khat"] is None
    assert plain["bound_of_64_draws"] == {"mean": None, "stderr": None}
    assert plain["bound"] == {"mean": -1.0, "stderr": 0.1}


def test_what_cannot_be_looked_at_is_said():
    def model(y):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    target = hivi.from_numpyro(model, jnp.arange(6.0), subsample={"data": 2})
    found = hivi.trust(hivi.fit(target, hivi.MeanField(), **QUIET), key=KEY)
    assert found.tighter is None
    assert found.khat is None
    assert "minibatches" in " ".join(found.remarks)
    assert "nothing could be looked at" in str(found)


def test_refusals(tmp_path):
    fit = hivi.fit(student(), hivi.MeanField(), steps=20, **QUIET)
    for call in (lambda: hivi.trust(fit, key=3), lambda: fit.sample(1000), lambda: fit.elbo(3)):
        with pytest.raises((hivi.FitError, jaxtyping.TypeCheckError)):  # the tests' own checks of types come first
            call()
    with pytest.raises(hivi.FitError, match=r"Fit.sample\(key=...\): found 1000; expected a JAX random key"):
        check_key("Fit.sample", 1000)
    with pytest.raises(hivi.FitError, match="at least 100"):
        hivi.trust(fit, key=KEY, samples=10)
    fit.save(tmp_path / "run")
    with pytest.raises(hivi.FitError, match="without its target"):
        hivi.trust(hivi.load(tmp_path / "run"), key=KEY)


def test_models_without_observations_and_lists_of_numbers():
    def model(x, y=None):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x * w, 1.0).to_event(1), obs=y)

    assert "nothing is observed" in hivi.explain(hivi.from_numpyro(model, jnp.ones(2)))
    assert "nothing is observed" not in hivi.explain(hivi.from_numpyro(model, jnp.ones(2), jnp.ones(2)))
    with pytest.raises(hivi.TargetError, match="argument 1: found a list of numbers"):
        hivi.from_numpyro(model, [1.0, 2.0], jnp.ones(2))
    with pytest.raises(hivi.TargetError, match="argument 'x'"):
        hivi.from_numpyro(model, y=jnp.ones(2), x=[1.0, 2.0])

    def broken(sizes):
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        raise TypeError

    with pytest.raises(TypeError):  # the lists are not at fault
        hivi.from_numpyro(broken, [1, 2])


def rows(y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(logits=w))
        numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)


@pytest.mark.parametrize("family", [hivi.MeanField(), {"w": hivi.MeanField(), "z": hivi.Hierarchical(hivi.FullRank())}])
def test_a_fit_in_minibatches_is_looked_at_with_all_rows(family, tmp_path):
    y = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
    small, whole = hivi.from_numpyro(rows, y, subsample={"row": 4}), hivi.from_numpyro(rows, y)
    fit = hivi.fit(small, family, steps=200, tolerance=None, **QUIET)
    with pytest.raises(hivi.HiviError, match="row"):
        fit.elbo(KEY, bound=hivi.ImportanceWeighted(8))
    path = fit.save(tmp_path / "run")
    again = hivi.load(path, target=whole)
    sampled, exact = fit.elbo(KEY, samples=4000), again.elbo(KEY, samples=4000)
    assert abs(exact.mean - sampled.mean) < 5 * np.hypot(exact.stderr, sampled.stderr)
    found = hivi.trust(again, key=KEY)
    assert found.tighter is not None
    assert found.khat is not None
    more = hivi.load(path, target=hivi.from_numpyro(rows, y, subsample={"row": 6})).elbo(KEY, samples=4000)
    assert abs(exact.mean - more.mean) < 5 * np.hypot(exact.stderr, more.stderr)
    with pytest.raises(hivi.LoadError, match="pass the target of the saved run"):
        hivi.load(path, target=hivi.from_numpyro(rows, y[:8]))


def pairs(y: jax.Array) -> None:
    """In each row the two units of the paper's Figure 1, whose mean-field lacks 0.2231 nats, and a constant."""
    table = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
    with numpyro.plate("row", len(y)):
        a = numpyro.sample("a", dist.Bernoulli(0.5))
        b = numpyro.sample("b", dist.Bernoulli(0.5))
        numpyro.factor("both", table[a, b] + y)


def test_minibatches_do_not_hide_what_the_bound_misses():
    """Rows differ by hundreds of nats: only bounds that see each of them as often as the others show so small a gap."""
    y = jnp.array([0.0, -300.0, 100.0, 50.0, -20.0, 400.0])
    fit = hivi.fit(hivi.from_numpyro(pairs, y, subsample={"row": 2}), hivi.MeanField(), steps=1500, **QUIET)
    found = hivi.trust(fit, key=KEY)
    assert found.tighter is not None
    assert fit.elbo(KEY).stderr > 1.0
    assert found.tighter.mean - found.bound.mean == pytest.approx(6 * 0.2231, abs=0.1)
    assert any("misses at least" in fault for fault in found.faults)


def test_bounds_too_noisy_to_tell_say_so():
    """Forty minibatches: one is looked at for each estimate."""
    y = jnp.asarray(10.0 * np.random.default_rng(0).normal(size=40), jnp.float32)
    fit = hivi.fit(hivi.from_numpyro(rows, y, subsample={"row": 1}), hivi.MeanField(), steps=200, **QUIET)
    found = hivi.trust(fit, key=KEY)
    assert any(
        "its bounds are noisy: a gap below" in remark and "hivi.load(folder, target=whole)" in remark
        for remark in found.remarks
    )


def test_a_bound_without_noise_is_level_when_it_rises_by_nothing():
    target = hivi.from_log_joint(
        lambda z: jnp.array([-1.0, -2.0, -0.5, -3.0])[z["k"]],
        {"k": hivi.Latent((), constraints.integer_interval(0, 3))},
    )
    fit = hivi.fit(target, steps=2000, **QUIET)
    assert fit.converged
    assert hivi.trust(fit, key=KEY).faults == ()
