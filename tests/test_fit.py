"""The fit loop: convergence, resumption, saving, devices, compilations, memory, failure."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import Mesh
from numpyro.distributions import constraints

import hivi
from hivi._fit import loop
from hivi._fit.step import run_chunk

TABLE = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
KEY = jax.random.key(0)


def bernoulli(table: jax.Array = TABLE) -> hivi.Target:
    """The table of the paper's Figure 1, with the table as data."""
    return hivi.from_log_joint(
        lambda z, t: t[z["z"][0], z["z"][1]], latents={"z": hivi.Latent((2,), constraints.boolean)}, data=table
    )


def gaussian(scale: jax.Array | None = None) -> hivi.Target:
    """Independent Gaussians, with log Z = sum log scale + n/2 log 2 pi."""
    data = jnp.array([0.5, 1.0, 2.0]) if scale is None else scale
    return hivi.from_log_joint(
        lambda z, s: -0.5 * (z["x"] / s) ** 2, latents={"x": hivi.Latent((3,), plates={"i": 0})}, data=data
    )


def same(a: object, b: object) -> bool:
    """Whether two PyTrees hold the same bits."""
    leaves = zip(
        jax.tree.leaves(eqx.filter(a, eqx.is_array)), jax.tree.leaves(eqx.filter(b, eqx.is_array)), strict=True
    )
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


def test_bound_reaches_the_known_normaliser() -> None:
    fit = hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=4000, progress=False)
    truth = 1.5 * np.log(2 * np.pi)
    found = fit.elbo(jax.random.key(1), 2000)
    assert fit.converged
    assert found.mean == pytest.approx(truth, abs=0.01)
    spread = np.asarray(fit.sample(jax.random.key(2), 4000)["x"]).std(0)
    assert spread == pytest.approx([0.5, 1.0, 2.0], rel=0.08)
    assert set(fit.history) >= {"step", "elbo"}
    assert len(fit.history["step"]) == len(fit.history["elbo"])


def test_a_settled_fit_stops_early_and_tolerance_none_does_not() -> None:
    early = hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=20_000, progress=False)
    assert early.converged
    assert len(early.history["step"]) < 15_000
    full = hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=700, tolerance=None, progress=False)
    assert len(full.history["step"]) == 700


def test_mean_field_on_the_table_is_uniform() -> None:
    fit = hivi.fit(bernoulli(), hivi.MeanField(), key=KEY, steps=3000, progress=False)
    every = {"z": jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])}
    assert np.exp(fit.log_prob(every, key=KEY)) == pytest.approx([0.25] * 4, abs=0.02)
    assert fit.elbo(KEY).mean == pytest.approx(-0.2231, abs=4 * fit.elbo(KEY).stderr)


def test_growing_from_mean_field_is_never_worse() -> None:
    """DESIGN: a hierarchy starts at the mean-field optimum and stays at least as good for its first thousand steps."""
    target = bernoulli()
    flat = hivi.fit(target, hivi.MeanField(), key=KEY, steps=3000, progress=False)
    grown = hivi.fit(
        target, hivi.Hierarchical(start=flat), key=KEY, steps=1000, samples=64, tolerance=None, progress=False
    )
    reference = flat.elbo(jax.random.key(1))
    chunks = grown.history["elbo"].reshape(10, 100)
    errors = np.hypot(chunks.std(1, ddof=1) / 10, reference.stderr)
    assert np.all(chunks.mean(1) - reference.mean > -4 * errors)
    assert np.all(errors < 0.02)


def test_one_run_equals_an_interrupted_one(tmp_path: Path) -> None:
    """A fit killed with SIGKILL and started again ends with the same bits as one that was not."""
    script = f"""
import jax, numpy as np
import hivi._fit.run as run
run.SAVE_EVERY = 0.0
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_fit import bernoulli
import hivi
family = hivi.Hierarchical(hivi.FullRank(), hivi.Linearised())
fit = hivi.fit(bernoulli(), family, key=jax.random.key(7), steps=8000, tolerance=None, checkpoint=sys.argv[1], progress=False)
fit.save(sys.argv[2])
"""
    # Two devices would change nothing; the environment is this process's own.
    env = {**os.environ, "HIVI_TYPECHECK": "0", "PYTHONPATH": str(Path(hivi.__file__).parent.parent)}
    command = [sys.executable, "-c", script]
    killed = subprocess.Popen([*command, str(tmp_path / "a"), str(tmp_path / "fit_a")], env=env)
    saved = tmp_path / "a" / "checkpoint.safetensors"
    deadline = time.monotonic() + 240
    while not saved.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert saved.exists()
    assert not (tmp_path / "fit_a").exists(), "the run ended before it was killed"
    for name in ("a", "b"):
        subprocess.run([*command, str(tmp_path / name), str(tmp_path / f"fit_{name}")], env=env, check=True)
    a, b = hivi.load(tmp_path / "fit_a"), hivi.load(tmp_path / "fit_b")
    assert same(a.proposal, b.proposal)
    assert np.array_equal(a.history["elbo"], b.history["elbo"])
    assert len(a.history["elbo"]) == 8000


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=100, checkpoint=tmp_path, progress=False)
    with pytest.raises(hivi.LoadError, match="another configuration"):
        hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=200, checkpoint=tmp_path, progress=False)
    with pytest.raises(hivi.LoadError, match="another configuration"):
        hivi.fit(gaussian(jnp.ones(3)), hivi.MeanField(), key=KEY, steps=100, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize(
    "family",
    [
        hivi.MeanField(),
        hivi.Mixture(3),
        pytest.param(hivi.Hierarchical(prior=hivi.Flow(2, "coupling")), marks=pytest.mark.slow),
        pytest.param(hivi.Hierarchical(prior=hivi.Mixture(2)), marks=pytest.mark.slow),
        pytest.param({"z": hivi.Hierarchical(prior=hivi.Hierarchical(prior=hivi.Flow(1)))}, marks=pytest.mark.slow),
    ],
    ids=lambda f: str(f)[:40],
)
def test_saved_fit_samples_the_same(family: object, tmp_path: Path) -> None:
    target = bernoulli()
    fit = hivi.fit(target, family, key=KEY, steps=100, progress=False)  # type: ignore[arg-type]
    again = hivi.load(fit.save(tmp_path))
    assert same(fit.proposal, again.proposal)
    assert np.array_equal(fit.sample(KEY, 50)["z"], again.sample(KEY, 50)["z"])
    assert not list(tmp_path.glob("*.pkl"))
    with pytest.raises(hivi.FitError, match="target"):
        again.elbo(KEY)
    assert hivi.load(tmp_path, target=target).elbo(KEY, 64) == fit.elbo(KEY, 64)
    more = hivi.fit(target, again.family, key=KEY, steps=100, start=again, progress=False)
    assert len(more.history["step"]) == 100


def test_constrained_supports_survive_saving(tmp_path: Path) -> None:
    supports = {
        "positive": constraints.positive,
        "unit": constraints.unit_interval,
        "simplex": constraints.simplex,
        "interval": constraints.interval(-1.0, 2.5),
        "ordered": constraints.ordered_vector,
        "vector": constraints.independent(constraints.greater_than(3.0), 1),
    }
    shapes = {"simplex": (3,), "ordered": (2,), "vector": (2,)}
    latents = {n: hivi.Latent(shapes.get(n, ()), s) for n, s in supports.items()}
    target = hivi.from_log_joint(lambda z: {n: -jnp.sum(v**2) for n, v in z.items()}, latents=latents)
    fit = hivi.fit(target, hivi.FullRank(), key=KEY, steps=100, progress=False)
    draws = hivi.load(fit.save(tmp_path)).sample(KEY, 20)
    for name, value in fit.sample(KEY, 20).items():
        assert np.array_equal(value, draws[name])
        assert np.all(supports[name](value))


def test_damaged_and_missing_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(hivi.LoadError, match="no saved run"):
        hivi.load(tmp_path)
    (tmp_path / "fit.safetensors").write_bytes(b"not a run")
    with pytest.raises(hivi.LoadError, match="damaged"):
        hivi.load(tmp_path)


def test_two_devices_give_the_same_fit() -> None:
    devices = np.array(jax.devices()[:2])
    assert len(devices) == 2
    options = {"key": KEY, "steps": 200, "samples": 8, "progress": False}
    family = hivi.Hierarchical(prior=hivi.Flow(2))
    one = hivi.fit(bernoulli(), family, **options)
    two = hivi.fit(bernoulli(), family, mesh=Mesh(devices, ("samples",)), **options)
    assert two.history["elbo"] == pytest.approx(one.history["elbo"], abs=1e-3)
    wide = jnp.linspace(0.5, 2.0, 64)
    target = hivi.from_log_joint(
        lambda z, s: -0.5 * (z["x"] / s) ** 2, latents={"x": hivi.Latent((64,), plates={"i": 0})}, data=wide
    )
    one = hivi.fit(target, hivi.MeanField(), **options)
    two = hivi.fit(target, hivi.MeanField(), mesh=Mesh(devices, ("i",)), **options)
    assert len(two.proposal.parameters()["x"].sharding.device_set) == 2
    assert two.history["elbo"] == pytest.approx(one.history["elbo"], rel=1e-4)
    with pytest.raises(hivi.FitError, match="no such plate"):
        hivi.fit(target, hivi.MeanField(), mesh=Mesh(devices, ("rows",)), **options)


@pytest.mark.parametrize("wrong", ["score", hivi.Score, {"z": hivi.Score}])
def test_what_is_no_strategy_is_refused(wrong: Any) -> None:
    with pytest.raises(hivi.FitError, match=r"estimator=.*core.*Cure: .*parentheses"):
        loop._resolve(wrong)


def test_what_is_no_bound_is_refused() -> None:
    with pytest.raises(hivi.FitError, match=r"bound=.*Elbo.*parentheses"):
        loop._bound(hivi.Elbo)


def test_second_fit_compiles_nothing() -> None:
    """New data of the same shapes, a new target, a new family object: no new program."""
    options = {"key": KEY, "steps": 100, "progress": False}
    hivi.fit(bernoulli(), hivi.Hierarchical(prior=hivi.Flow(2, "coupling")), **options)
    before = run_chunk.at("quick")._cached._cache_size()
    hivi.fit(bernoulli(TABLE.at[0, 0].add(0.3)), hivi.Hierarchical(prior=hivi.Flow(2, "coupling")), **options)
    assert run_chunk.at("quick")._cached._cache_size() == before


@pytest.mark.slow
def test_fifty_refits_do_not_grow_memory() -> None:
    def refit(k: int) -> None:
        hivi.fit(bernoulli(TABLE + 0.01 * k), hivi.MeanField(), key=KEY, steps=100, progress=False)

    for k in range(10):
        refit(k)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(50):
        refit(k)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # kB


def test_any_optax_optimiser() -> None:
    fit = hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=1500, optimizer=optax.adam(0.03), progress=False)
    assert fit.elbo(KEY, 500).mean == pytest.approx(1.5 * np.log(2 * np.pi), abs=0.1)


def test_divergence_is_recovered_from_or_raised() -> None:
    """A step size far too large is halved until it works; a hopeless model is refused, naming the factor."""
    wild = hivi.fit(gaussian(), hivi.MeanField(), key=KEY, steps=600, learning_rate=30.0, throw=False, progress=False)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(eqx.filter(wild.proposal, eqx.is_array)))

    def cliff(z: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {"slope": z["x"], "cliff": jnp.where(z["x"] > 1.0, jnp.nan, 0.0)}

    target = hivi.from_log_joint(cliff, latents={"x": hivi.Latent()})
    with pytest.raises(hivi.FitError, match=r"cliff.*Cure"):
        hivi.fit(target, hivi.MeanField(), key=KEY, steps=3000, learning_rate=0.05, progress=False)


def test_a_nan_at_the_start_names_the_factor_and_the_element() -> None:
    target = hivi.from_log_joint(
        lambda z, y: {"y": -((z["x"] - y) ** 2)}, latents={"x": hivi.Latent()}, data=jnp.array([0.0, jnp.nan])
    )
    with pytest.raises(hivi.TargetError, match=r"factor 'y'.*\[1\]"):
        hivi.fit(target, hivi.MeanField(), key=KEY, steps=100, progress=False)


def test_an_impossible_start_is_refused() -> None:
    target = hivi.from_log_joint(lambda z: {"never": z["x"] - jnp.inf}, latents={"x": hivi.Latent()})
    with pytest.raises(hivi.TargetError, match=r"never.*infinite"):
        hivi.fit(target, hivi.MeanField(), key=KEY, steps=100, progress=False)


def test_bad_arguments_are_named() -> None:
    target = gaussian()
    for options, match in (
        ({"steps": 0}, "steps"),
        ({"samples": -1}, "samples"),
        ({"estimator": hivi.LocalExpectation(), "steps": 1}, None),
    ):
        if match is None:  # a finite-support strategy on a continuous site: the pathwise gradient is taken
            assert hivi.fit(target, hivi.MeanField(), key=KEY, progress=False, **options).strategies == {
                "x": "Pathwise"
            }
        else:
            with pytest.raises(hivi.FitError, match=match):
                hivi.fit(target, hivi.MeanField(), key=KEY, progress=False, **options)
    with pytest.raises(hivi.FamilyError, match="'y'"):
        hivi.fit(target, {"y": hivi.MeanField()}, key=KEY, progress=False)
    with pytest.raises(hivi.FamilyError, match="discrete"):
        hivi.fit(bernoulli(), hivi.FullRank(), key=KEY, progress=False)
    with pytest.raises(hivi.FitError, match="Pathwise"):
        hivi.fit(bernoulli(), hivi.MeanField(), key=KEY, estimator={"z": hivi.Pathwise()}, progress=False)


def test_default_family_follows_the_supports() -> None:
    assert hivi.fit(gaussian(), key=KEY, steps=1, progress=False).family == hivi.Standardised()
    assert hivi.fit(bernoulli(), key=KEY, steps=1, progress=False).family == hivi.Mixture(8)
    count = hivi.Latent((), constraints.nonnegative_integer)
    counts = hivi.from_log_joint(lambda z: -1.0 * z["z"], {"z": count})
    assert loop.default_family(counts) == hivi.Mixture(8, dispersed=True)
    many = hivi.from_log_joint(
        lambda z: 0.1 * jnp.sum(z["z"]), {"z": hivi.Latent((loop.MIXTURE_LIMIT + 1,), constraints.boolean)}
    )
    assert loop.default_family(many) == hivi.MeanField()
    table = jnp.zeros((60, 1000))
    words = hivi.from_numpyro(lambda: numpyro.sample("z", dist.Categorical(logits=table).to_event(1)))
    assert loop.default_family(words) == hivi.MeanField()


def clusters(batch: int | None = None) -> hivi.Target:
    """200 data of two clusters that overlap, without an order."""
    rng = np.random.default_rng(1)
    x = np.where(rng.random(200) < 0.4, rng.normal(-1.0, 0.7, 200), rng.normal(1.2, 0.7, 200))

    def model(x: Any) -> None:
        means = numpyro.sample("means", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
        with numpyro.plate("data", len(x)):
            which = numpyro.sample("which", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(means[which], 0.7), obs=x)

    return hivi.from_numpyro(model, jnp.asarray(x), subsample={"data": batch} if batch else None)


@pytest.mark.parametrize(
    ("family", "batch"),
    [
        pytest.param(hivi.MeanField(), None, id="mean-field"),
        pytest.param(None, None, marks=pytest.mark.slow, id="default"),
        pytest.param(hivi.MeanField(), 50, marks=pytest.mark.slow, id="mean-field in minibatches"),
        pytest.param(None, 50, id="default in minibatches"),
    ],
)
def test_clusters_that_start_alike_part(family, batch) -> None:
    """Where means start at one place and the steps are short, they stay there, 30 nats lower."""
    fit = hivi.fit(clusters(batch), family, key=KEY, progress=False)
    if batch and family is None:
        assert fit.family == {"which": hivi.Mixture(4, equal=True), ".*": hivi.MeanField()}
    assert fit.proposal.learning_rate == 0.05
    found = np.sort(fit.sample(KEY, 500)["means"], 1).mean(0)
    assert found == pytest.approx([-1.0, 1.2], abs=0.4)


def test_supports_that_depend_on_latents_survive_saving(tmp_path: Path) -> None:
    def model() -> None:
        top = numpyro.sample("top", dist.HalfNormal(2.0))
        numpyro.sample("inside", dist.Uniform(0.0, top))

    fit = hivi.fit(hivi.from_numpyro(model), hivi.FullRank(), key=KEY, steps=100, progress=False)
    draws, again = fit.sample(KEY, 30), hivi.load(fit.save(tmp_path)).sample(KEY, 30)
    assert np.all(draws["inside"] < draws["top"])
    for name, value in draws.items():
        assert np.asarray(again[name]) == pytest.approx(np.asarray(value), rel=1e-5)
