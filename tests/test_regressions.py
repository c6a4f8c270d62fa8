"""Defects found in review, each with the run that showed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

import hivi
from hivi._compile import compiled
from hivi._fit import store
from hivi._fit.loop import _check_kinds
from hivi._fit.stopping import levelled
from hivi._likelihoods.binomial import BinomialLikelihood
from hivi._target.base import distinct_rows

KEY = jax.random.key(0)
QUICK = {"key": KEY, "steps": 50, "progress": False}


@pytest.mark.parametrize("kind", [float, jnp.asarray, lambda b: jnp.full(2, b)], ids=["number", "scalar", "array"])
def test_draws_follow_the_targets_own_bounds(kind) -> None:
    """Two targets with other bounds share shapes and program, but never a compiled map to the model's space."""
    for bound in (1.0, 5.0):
        latents = {"x": hivi.Latent((2,), constraints.interval(0.0, kind(bound)))}
        target = hivi.from_log_joint(lambda z: jnp.sum(z["x"]) * 0.0, latents=latents)
        draws = hivi.fit(target, hivi.MeanField(), **QUICK).sample(KEY, 2000)["x"]
        assert bound / 2 < float(draws.max()) <= bound


def test_numpyro_bounds_from_a_closure() -> None:
    for bound in (1.0, 7.0):
        high = jnp.array(bound)
        target = hivi.from_numpyro(lambda high=high: numpyro.sample("x", dist.Uniform(0.0, high)))
        draws = hivi.fit(target, hivi.MeanField(), **QUICK).sample(KEY, 2000)["x"]
        assert bound / 2 < float(draws.max()) <= bound


def test_log_prob_is_refused_where_the_support_moves() -> None:
    def model() -> None:
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("b", dist.Uniform(a, a + 1.0))

    fit = hivi.fit(hivi.from_numpyro(model), hivi.MeanField(), **QUICK)
    with pytest.raises(hivi.TargetError, match="'b'"):
        fit.log_prob({"a": jnp.array(0.0), "b": jnp.array(0.5)}, key=KEY)


def test_stored_programs_are_compiled_like_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options that keep off the compiler's known faults, for any number of draws."""
    seen = []

    def recorded(fn: Any) -> Any:
        seen.append(fn)
        return compiled(fn)

    monkeypatch.setattr(store, "compiled", recorded)
    example = {"x": jax.ShapeDtypeStruct((40,), jnp.float32)}
    store.write_program(tmp_path, "sums", lambda z: {"sum": jnp.sum(jnp.exp(z["x"]))}, example)
    program = store.read_program(tmp_path, "sums")
    assert program is not None
    assert len(seen) == 1
    for count in (1, 20_000):
        draws = jax.random.normal(KEY, (count, 40))
        right = np.exp(np.asarray(draws, float)).sum(-1)
        np.testing.assert_allclose(program({"x": draws})["sum"], right, rtol=1e-5)
    assert store.read_program(tmp_path, "nothing") is None


def normal_mean(x: jax.Array) -> None:
    """Normal data with unknown mean."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_multi_sample_bounds_on_minibatches_are_refused() -> None:
    x = np.random.default_rng(0).normal(size=100)
    target = hivi.from_numpyro(normal_mean, x, subsample={"data": 2})
    fit = hivi.fit(target, hivi.MeanField(), **QUICK)
    with pytest.raises(hivi.FitError, match="data"):
        fit.elbo(KEY, 64, bound=hivi.ImportanceWeighted(outer=64))
    with pytest.raises(hivi.FitError, match="data"):
        hivi.fit(target, hivi.MeanField(), bound=hivi.ImportanceWeighted(outer=2), **QUICK)
    assert np.isfinite(fit.elbo(KEY, 64, bound=hivi.ImportanceWeighted(outer=1, inner=2)).mean)


def test_increment_of_a_dominating_draw_is_not_clipped() -> None:
    bound, log_pi = hivi.ImportanceWeighted(outer=2), jnp.zeros(1)
    log_w = jnp.array([0.0, -100.0]).reshape(1, 2, 1)
    change = jnp.array([-50.0, 30.0]).reshape(1, 2, 1)
    found = bound.increment(log_w, log_pi, change)
    before = bound.value(log_w, log_pi)
    for draw in range(2):
        moved = log_w.at[0, draw, 0].add(change[0, draw, 0])
        assert float(found[0, draw, 0]) == pytest.approx(float((bound.value(moved, log_pi) - before)[0]), abs=1e-4)


def test_one_bad_step_neither_stops_a_rise_nor_hides_a_plateau() -> None:
    rising = np.linspace(-1000.0, 0.0, 1200)
    rising[-5] = -np.inf
    assert not levelled(rising, 1.0)
    flat = np.random.default_rng(1).normal(size=2000)
    flat[-5] = np.nan
    assert levelled(flat, 5.0)


def test_going_on_keeps_the_family(tmp_path: Path) -> None:
    target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent((2,))})
    first = hivi.fit(target, hivi.MeanField(), **QUICK)
    again = hivi.fit(target, start=first, **QUICK)
    assert again.family == hivi.MeanField()
    assert hivi.load(again.save(tmp_path)).sample(KEY, 3)["x"].shape == (3, 2)
    with pytest.raises(hivi.FitError, match="start"):
        hivi.fit(target, hivi.FullRank(), start=first, **QUICK)


def test_checkpoints_tell_scales_and_optimisers_apart(tmp_path: Path) -> None:
    def scaled(scale: float) -> hivi.Target:
        return hivi.from_numpyro(numpyro.handlers.scale(normal_mean, scale=scale), jnp.ones(3))

    hivi.fit(scaled(2.0), hivi.MeanField(), checkpoint=tmp_path / "a", **QUICK)
    with pytest.raises(hivi.LoadError, match="another configuration"):
        hivi.fit(scaled(5.0), hivi.MeanField(), checkpoint=tmp_path / "a", **QUICK)
    hivi.fit(scaled(2.0), hivi.MeanField(), checkpoint=tmp_path / "b", optimizer=optax.sgd(1e-3), **QUICK)
    with pytest.raises(hivi.LoadError, match="another configuration"):
        hivi.fit(scaled(2.0), hivi.MeanField(), checkpoint=tmp_path / "b", optimizer=optax.sgd(1e-6), **QUICK)


def test_a_saturated_binomial_has_a_gradient() -> None:
    kind = BinomialLikelihood(0, 101)
    gradient = jax.grad(lambda lam: kind.move_weights(lam, jnp.array([100]))[0, 0])(jnp.array([[18.0]]))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(("size", "batch"), [(50, 7), (5_000, 64), (1_000_000, 256)])
def test_minibatch_rows_are_distinct_and_uniform(size: int, batch: int) -> None:
    draw = jax.jit(jax.vmap(lambda k: distinct_rows(k, size, batch)))
    rows = np.asarray(draw(jax.random.split(KEY, 400)))
    assert rows.min() >= 0
    assert rows.max() < size
    assert all(len(set(r)) == batch for r in rows)
    shares = np.histogram(rows, bins=10, range=(0, size))[0] / rows.size
    width = np.sqrt(0.1 * 0.9 / rows.size) if size > 100 else 0.02
    assert np.abs(shares - 0.1).max() < 5 * width


def mixture(x: jax.Array) -> None:
    """Two known components, one unknown shift; a Bernoulli per row."""
    shift = numpyro.sample("shift", dist.Normal(0.0, 3.0))
    with numpyro.plate("row", x.shape[0]):
        member = numpyro.sample("member", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(shift + 2.0 * member, 1.0), obs=x)


@pytest.mark.slow
def test_minibatches_with_local_discrete_sites_keep_the_bound() -> None:
    """Parameters fitted on minibatches of a quarter give the whole data's bound."""
    x = np.random.default_rng(2).normal(size=64) + 2.0 * (np.arange(64) % 5 < 2)
    whole = hivi.fit(hivi.from_numpyro(mixture, x), hivi.MeanField(), key=KEY, steps=800, progress=False)
    small = hivi.from_numpyro(mixture, x, subsample={"row": 16})
    part = hivi.fit(small, hivi.MeanField(), key=KEY, steps=1200, progress=False)
    a, b = whole.elbo(KEY, 2000), part.elbo(KEY, 2000)
    assert b.stderr < 0.5
    assert abs(a.mean - b.mean) < 4 * np.hypot(a.stderr, b.stderr) + 0.3
    grown = hivi.fit(small, {"shift": hivi.MeanField(), "member": hivi.Hierarchical(start=part)}, **QUICK)
    c = grown.elbo(KEY, 2000)
    assert c.mean > b.mean - 4 * np.hypot(b.stderr, c.stderr) - 20 * abs(b.mean) * 1e-2
    assert grown.sample(KEY, 10)["member"].shape == (10, 64)


def test_unknown_sites_of_an_estimator_are_refused() -> None:
    target = hivi.from_log_joint(lambda z: 0.3 * z["z"], latents={"z": hivi.Latent((2,), constraints.boolean)})
    with pytest.raises(hivi.TargetError, match="typo"):
        hivi.fit(target, hivi.MeanField(), estimator={"typo": hivi.Score()}, **QUICK)
    named = hivi.fit(target, hivi.MeanField(), estimator={"z": hivi.Score()}, **QUICK)
    assert named.strategies == {"z": "Score"}


def test_explain_says_what_coordinates_are_and_keeps_columns() -> None:
    long = "a_name_longer_than_its_column"
    latents = {
        "u": hivi.Latent(),
        long: hivi.Latent((3,), constraints.unit_interval, {"item": 0}),
        "s": hivi.Latent((3,), constraints.simplex),
        "i": hivi.Latent((), constraints.interval(-1.0, 2.5)),
        "k": hivi.Latent((), constraints.boolean),
    }
    target = hivi.from_log_joint(lambda z: z["k"] * sum(jnp.sum(v) for v in z.values()), latents=latents)
    text = hivi.explain(target)
    sites, factors = (block.splitlines()[1:] for block in text.split("\n\n")[1:3])
    found = {line.split()[0]: line for line in sites}
    assert "real  " in found["u"]
    assert "unconstrained" not in found["u"]
    assert "real, unconstrained from unit_interval " in found[long]
    assert "shape (2,)" in found["s"]
    assert "real, unconstrained from simplex of shape (3,)" in found["s"]
    assert "real, unconstrained from interval(-1.0, 2.5)" in found["i"]
    assert "integers 0 to 1" in found["k"]
    assert "item (axis 0)" in found[long]
    assert len({line.index("shape") for line in [*sites]}) == 1
    assert len({line.index("touches") for line in factors}) == 1
    (row,) = [line for line in factors if line.split()[0] == f"jacobian({long})"]  # -softplus(x) - softplus(-x)
    assert row.endswith("(2 alike)")
    moving = hivi.from_numpyro(lambda: numpyro.sample("b", dist.Uniform(0.0, numpyro.sample("a", dist.Gamma(2.0)))))
    assert "unconstrained from a support that depends on latents" in hivi.explain(moving)


# What newcomers do


def test_newcomers_mistakes_are_named(tmp_path: Path) -> None:
    """A model that is no target, a seed that is no key, a latent misspelt, a shape that is no tuple: each with its cure."""
    target = hivi.from_log_joint(lambda z: -0.5 * z["tau"] ** 2, {"tau": hivi.Latent()})
    with pytest.raises(hivi.FitError, match=r"found a function; expected a hivi target.*from_numpyro"):
        _check_kinds(lambda: None, jax.random.key(0))  # `fit` itself, before the tests' own checks of types
    with pytest.raises(hivi.FitError, match="found 0; expected a JAX random key"):
        _check_kinds(target, 0)
    with pytest.raises(hivi.TargetError, match=r"a look-up of 'w'.*one of \['z'\]"):
        hivi.from_log_joint(lambda z: z["w"], {"z": hivi.Latent()})
    with pytest.raises(hivi.TargetError, match=r"latent 'z'.*shape=\(0,\).*tuple"):
        hivi.from_log_joint(lambda z: z["z"], {"z": hivi.Latent(shape=(0,))})
    vector = hivi.from_log_joint(lambda z: z["z"], {"z": hivi.Latent((np.int64(3),))})
    assert vector.site("z").shape == (3,)
    assert "array of shape (3,)" in hivi.explain(vector)
    assert target.notes == ()
    with pytest.raises(hivi.FamilyError, match=r"family key 'taw'.*did you mean 'tau'"):
        hivi.fit(target, {"taw": hivi.MeanField()}, key=jax.random.key(0))
    with pytest.raises(hivi.TargetError, match="did you mean 'tau'"):
        hivi.fit(target, estimator={"taw": hivi.Pathwise()}, key=jax.random.key(0))
    assert repr(target) == "Target('log_joint': tau real (); 1 terms)"
    fit = hivi.fit(target, hivi.MeanField(), **QUICK)
    with pytest.raises(hivi.FitError, match="at least 1"):
        fit.sample(jax.random.key(0), -3)
    saved = fit.save(tmp_path / "run") / "fit.safetensors"
    assert saved.stat().st_mode & 0o044 == saved.parent.stat().st_mode & 0o044
