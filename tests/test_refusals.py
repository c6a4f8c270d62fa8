"""What users get wrong, and what they are told: indices outside, impossible counts and values, arguments of the wrong kind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import hivi

KEY = jax.random.key(0)
SHORT: dict[str, Any] = {"key": KEY, "steps": 10, "progress": False}
GROUPS = 3


def by_argument(y: Any, group: Any) -> None:
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)) as i:
        numpyro.sample("y", dist.Normal(a[group[i]], 1), obs=y[i])


def of_a_function_of_discrete_ones(y: Any, group: Any) -> None:
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Bernoulli(0.3))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(jnp.exp(1.0 * a)[group], 1), obs=y)


def one_element(y: Any, group: Any) -> None:
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(a[3], 1), obs=1.0)


def clipped_on_purpose(y: Any, group: Any) -> None:
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Normal(0, 1))
    here = a.at[group].get(mode="clip") + a[-1] + a[jnp.array([-3, 2, 1, 0])]
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(here, 1), obs=y)


@pytest.mark.parametrize(
    ("model", "batch"),
    [(by_argument, None), (by_argument, 2), (of_a_function_of_discrete_ones, None), (one_element, None)],
)
def test_indices_outside_are_refused(model: Callable[..., None], batch: int | None) -> None:
    """JAX takes the last element without a word; in minibatches, also where the row is not among the first."""
    subsample = {"data": batch} if batch else {}
    target = hivi.from_numpyro(model, jnp.ones(4), jnp.array([0, 2, 1, 3]), subsample=subsample)
    with pytest.raises(
        hivi.TargetError, match=r"index into 'a' .*shape \(3,\)\): found 3; expected 0 to 2.*count from 1"
    ):
        hivi.fit(target, hivi.MeanField(), **SHORT)


def test_indices_inside_and_clipped_ones_are_taken() -> None:
    for model, group in ((by_argument, [0, 2, 1, -1]), (clipped_on_purpose, [0, 2, 1, 3])):
        target = hivi.from_numpyro(model, jnp.ones(4), jnp.array(group))
        assert np.isfinite(hivi.fit(target, hivi.MeanField(), **SHORT).history["elbo"]).all()


def guarded(y: Any, group: Any) -> None:
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Normal(0, 1))
    after = jnp.stack([jnp.where(t < GROUPS - 1, a[jnp.array(t + 1)], 0.0) for t in range(GROUPS)])
    numpyro.sample("y", dist.Normal(jnp.sum(after), 1), obs=1.0)


def padded(y: Any, group: Any) -> None:
    with numpyro.plate("groups", GROUPS):
        a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("data", len(y)), numpyro.handlers.mask(mask=group < GROUPS):
        numpyro.sample("y", dist.Normal(a[group], 1), obs=y)


@pytest.mark.parametrize("model", [guarded, padded])
def test_what_is_read_outside_and_thrown_away_does_no_harm(model: Callable[..., None]) -> None:
    target = hivi.from_numpyro(model, jnp.ones(4), jnp.array([0, 2, 1, 3]))
    assert np.isfinite(hivi.fit(target, hivi.MeanField(), **SHORT).history["elbo"]).all()


def test_booleans_have_a_density() -> None:
    target = hivi.from_log_joint(lambda z: 0.0 * jnp.sum(z["b"]), {"b": hivi.Latent((2,), constraints.boolean)})
    fit = hivi.fit(target, hivi.MeanField(), **SHORT)
    assert float(fit.log_prob({"b": jnp.array([[True, False]])}, key=KEY)[0]) == pytest.approx(2 * np.log(0.5), abs=0.1)


def test_indices_in_a_log_joint_are_looked_at_again_where_the_data_are_new() -> None:
    latents = {"a": hivi.Latent((GROUPS,))}
    log_joint = lambda z, d: -0.5 * jnp.sum(z["a"] ** 2) - jnp.sum((d["y"] - z["a"][d["group"]]) ** 2)  # noqa: E731
    target = hivi.from_log_joint(log_joint, latents, data={"y": jnp.ones(2), "group": jnp.array([0, 2])})
    hivi.fit(target, hivi.MeanField(), **SHORT)
    with pytest.raises(hivi.TargetError, match="found 7"):
        hivi.fit(
            hivi.from_log_joint(log_joint, latents, data={"y": jnp.ones(2), "group": jnp.array([0, 7])}),
            hivi.MeanField(), **SHORT,
        )  # fmt: skip


@pytest.mark.parametrize("constant", [True, False])
def test_a_count_that_data_bound_is_refused_with_its_cure(constant: bool) -> None:
    seen = np.array([3, 4, 2, 5])

    def model(y: Any = seen) -> None:
        n = numpyro.sample("n", dist.Poisson(2.0))
        numpyro.sample("y", dist.Binomial(n, 0.5).expand([4]).to_event(1), obs=y)

    target = hivi.from_numpyro(model) if constant else hivi.from_numpyro(model, jnp.asarray(seen))
    with pytest.raises(hivi.TargetError, match=r"factor 'y'.*data bound a count \('n'\).*take n - y as the latent"):
        hivi.fit(target, **SHORT)


def test_categories_without_probability_are_refused_with_their_cure() -> None:
    left_right = jnp.array([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]])

    def chain(y: Any) -> None:
        first = numpyro.sample("first", dist.Categorical(left_right[0]))
        numpyro.sample("second", dist.Categorical(left_right[first]))
        numpyro.sample("y", dist.Normal(first, 1.0), obs=y)

    with pytest.raises(
        hivi.HiviError, match=r"values of 'first', 'second' no probability \(a zero of a transition matrix\)"
    ):
        hivi.fit(hivi.from_numpyro(chain, jnp.array(1.0)), **SHORT)


def test_values_outside_the_support_have_no_density() -> None:
    latents = {
        "w": hivi.Latent((20,), constraints.simplex), "r": hivi.Latent((), constraints.positive),
        "n": hivi.Latent((), constraints.nonnegative_integer), "b": hivi.Latent((2,), constraints.boolean),
    }  # fmt: skip
    target = hivi.from_log_joint(
        lambda z: jnp.sum(jnp.log(z["w"])) - z["r"] - 1.0 * z["n"] - 1.0 * jnp.sum(z["b"]), latents
    )
    fit = hivi.fit(target, hivi.MeanField(), **SHORT)
    draws = fit.sample(KEY, 200)
    assert np.isfinite(fit.log_prob(draws, key=KEY)).all()
    for site, value in {"r": -1.0, "n": -1, "b": 2}.items():
        wrong = {**draws, site: draws[site].at[0].set(value)}
        found = np.asarray(fit.log_prob(wrong, key=KEY))
        assert found[0] == -np.inf
        assert np.isfinite(found[1:]).all()
    half = {n: x[:1] for n, x in draws.items()} | {"n": jnp.array([0.5])}
    assert fit.log_prob(half, key=KEY)[0] == -np.inf


WRONG = {
    'hivi.Hierarchical(prior="flow")': r"Hierarchical\(prior=.*found 'flow'; expected a family",
    'hivi.Hierarchical(auxiliary="x")': r"Hierarchical\(auxiliary=.*expected an auxiliary",
    "hivi.Hierarchical(spread=0.0)": r"Hierarchical\(spread=.*found 0.0; expected a positive",
    "hivi.LowRank(True)": r"LowRank\(rank=.*found True.*at least 1",
    'hivi.Mixture("4")': r"Mixture\(components=.*found '4'.*at least 1",
    'hivi.Flow(kind="radial")': r"Flow\(kind=.*found 'radial'; expected one of planar",
    "hivi.InverseFlow(layers=-1)": r"InverseFlow\(layers=.*found -1; expected an integer, at least 0",
    "hivi.Mixture(spread=0.0)": r"Mixture\(spread=.*found 0.0; expected a positive",
    "hivi.Copula(levels=0)": r"Copula\(levels=.*found 0; expected at least 1",
    "hivi.Flow(layers=0.5)": r"Flow\(layers=.*found 0.5.*at least 1",
    'hivi.from_log_joint(square, {"x": hivi.Latent(support="boolean")})': "'x': found support='boolean'; expected a NumPyro",
    "hivi.from_log_joint(lambda z: None, {'x': hivi.Latent()})": "log_joint.*found None; expected a number",
    'hivi.MeanField(dispersed="yes")': r"dispersed=.*found 'yes'; expected True or False",
    "hivi.Mixture(4, concentration=-1.0)": r"concentration=.*found -1.0.*positive",
    "hivi.Score(baseline=hivi.LeaveOneOut)": r"Score\(baseline=.*expected LeaveOneOut\(\)",
    "hivi.MovingAverage(decay=2.0)": r"MovingAverage\(decay=.*found 2.0; expected a number from 0 and below 1",
    "hivi.Learned(hidden=0)": r"Learned\(hidden=.*found 0; expected an integer, at least 1",
    "hivi.Enumeration(values='a')": r"Enumeration\(values=.*found 'a'; expected an integer, at least 2",
    "hivi.LocalExpectation(coupled='x')": r"LocalExpectation\(coupled=.*found 'x'",
    "hivi.Auto(budget='x')": r"Auto\(budget=.*found 'x'",
    "hivi.ImportanceWeighted(outer=True)": r"ImportanceWeighted\(outer=.*found True",
    "hivi.MeanField(concentration='a')": r"concentration=.*found 'a'.*positive",
    "quick.sample(key, 100.0)": r"Fit.sample\(samples=.*found 100.0; expected an integer, at least 1",
    'hivi.fit(target, {"x": hivi.MeanField}, key=key)': r"family key 'x'.*a class: call it",
    "quick.elbo(key, bound='iw')": r"Fit.elbo\(bound=.*found 'iw'; expected a bound",
    "hivi.ImportanceWeighted(2, plate=3)": r"ImportanceWeighted\(plate=.*found 3; expected the name of a plate",
    "quick.elbo(key, samples=1)": r"Fit.elbo\(samples=.*found 1; expected an integer, at least 2",
    "quick.log_prob(quick.sample(key, 3), key=key, samples=0)": r"Fit.log_prob\(samples=.*at least 1",
    "hivi.trust(target, key=key)": r"trust\(fit\).*found a Target; expected what hivi.fit returns",
    "hivi.fit(target, key=key, learning_rate=-1.0)": r"fit\(learning_rate=.*found -1.0; expected a positive number",
}
RIGHT = (
    "hivi.Mixture(np.int64(4)).build(sites, key)",
    "hivi.Hierarchical(spread=np.float32(0.5))",
    "hivi.ImportanceWeighted(outer=np.int64(2))",
    "hivi.MeanField(concentration=np.float64(2.0)).build(sites, key)",
    "hivi.fit(target, hivi.MeanField(), key=key, steps=10, progress=False, learning_rate=np.float32(0.01))",
    "hivi.fit(target, hivi.MeanField(), key=key, steps=np.int64(10), samples=np.int64(2), progress=False)",
    "quick.sample(key, np.int64(3))",
)
"""NumPy's numbers, as a search over a grid gives them."""
SCRIPT = """
import json, sys
import hivi, jax, numpy as np
key, square = jax.random.key(0), lambda z: -0.5 * z["x"] ** 2
target = hivi.from_log_joint(square, {"x": hivi.Latent()})
sites, found = target.sites, {}
quick = hivi.fit(target, hivi.MeanField(), key=key, steps=10, progress=False)
for text in json.load(sys.stdin):
    try:
        eval(text)
    except hivi.HiviError as error:
        found[text] = f"{type(error).__name__} {error}"
print(json.dumps(found))
"""


def test_arguments_of_the_wrong_kind_are_named() -> None:
    """In a process of its own, without the run-time checks of annotations that the tests have and users do not."""
    run = [sys.executable, "-c", SCRIPT]
    environment = {**os.environ, "HIVI_TYPECHECK": "0"}
    done = subprocess.run(
        run, input=json.dumps([*WRONG, *RIGHT]), capture_output=True, text=True, env=environment, check=True
    )
    found = json.loads(done.stdout)
    for text in RIGHT:
        assert text not in found, found[text]
    for text, pattern in WRONG.items():
        assert re.search(pattern, found.get(text, "no error")), f"{text}: {found.get(text)}"


@pytest.mark.parametrize(
    ("log_joint", "data", "cure"),
    [
        (lambda z, x: z["a"] + x, None, r"data=\.\.\."),
        (lambda z: z["a"], jnp.ones(2), "second argument"),
        (lambda: 0.0, None, "a function of the dict of latents"),
    ],
)
def test_log_joints_of_other_arguments(log_joint, data, cure):
    with pytest.raises(hivi.TargetError, match=rf"log_joint.*the arguments \(.*{cure}"):
        hivi.from_log_joint(log_joint, {"a": hivi.Latent()}, data=data)
