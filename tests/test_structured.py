"""Structured products: gradients by enumeration, with discrete and continuous groups first; what they keep; refusals."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array

import hivi
from cases import BOUNDS, TARGETS, built, perturbed
from hivi._errors import FamilyError, FitError
from hivi._estimators.base import Evaluation
from hivi._estimators.hierarchical_score import HierarchicalScore
from hivi._estimators.measured import Setting, moments
from hivi._families.product import build_proposal
from hivi._space import Latents
from test_unbiased import BATCH, OBSERVED, Means, assert_agrees, grouped, means


def forced(own: Any, key: Array, branch: Array | int, given: Latents) -> tuple[Latents, Any]:
    """A draw whose discrete values are given: later groups are drawn below them."""
    return own.redrawn(given, key, branch)


def chosen(target: hivi.Target, proposal: Any) -> dict[str, Any]:
    """What `Auto` takes, which never chooses a local signal for a site on which others depend."""
    return hivi.Auto(cheap=1000).resolve(target, proposal, hivi.Elbo())


def solve(family: str, target: str, bound: str = "elbo", samples: int = 2, most: int = 4) -> Means:
    model = TARGETS[target]()
    proposal = built(family, model, scale=0.4)
    return means(model, proposal, chosen(model, proposal), BOUNDS[bound], samples, most, forced)


@pytest.mark.parametrize(
    ("family", "target", "bound", "samples"),
    [
        ("structured mean-field", "mixed", "elbo", 2),  # a bit above two real sites
        ("structured backwards", "mixed", "elbo", 2),  # two real sites above a bit
        pytest.param("structured hvm", "mixed", "inner 2", 1, marks=pytest.mark.slow),
        ("structured mean-field", "mixed", "outer 3", 1),
        ("structured mixture first", "mixed", "elbo", 1),
    ],
)
def test_gradient_has_the_right_mean(family, target, bound, samples):
    assert_agrees(solve(family, target, bound, samples))


@pytest.mark.parametrize("family", ["structured mean-field", "structured hvm"])
def test_discrete_groups_below_a_discrete_group(family):
    assert_agrees(solve(family, "sites", samples=1, most=13))


ABOVE = {
    "local expectation": hivi.LocalExpectation(),
    "score": hivi.Score(),
    "moving average": hivi.Score(baseline=hivi.MovingAverage()),
    "learned": hivi.Score(baseline=hivi.Learned()),
}


def of_a_bit_above(strategy: Any, bound: str = "elbo") -> Means:
    """The draws below a moved bit have the noise of the draw itself, so that the mean over the bit is exact."""
    model = TARGETS["mixed"]()
    proposal = built("structured mean-field", model, scale=0.4)
    given = {**chosen(model, proposal), "z": strategy}
    return means(model, proposal, given, BOUNDS[bound], 1, 13, forced)


@pytest.mark.parametrize("name", ABOVE)
def test_strategies_of_a_bit_above_others(name):
    assert_agrees(of_a_bit_above(ABOVE[name]))


def test_local_expectation_of_a_bit_above_others_with_a_multi_sample_bound():
    assert_agrees(of_a_bit_above(ABOVE["local expectation"], "outer 3"))


def above_others(name: str) -> tuple[hivi.Target, Any, str]:
    """Targets whose first site has others below it: a count, a categorical, bits within a product, rows of a plate."""
    finite = dist.constraints.integer_interval(0, 3)
    support: Any = dist.constraints.nonnegative_integer if name == "count" else finite
    shape = (2,) if name == "codes" else ()

    def log_joint(z: Latents) -> Array:
        return (
            jnp.sum(0.7 * z["a"] - 0.3 * z["a"] ** 2)
            - 0.5 * jnp.sum((z["x"] - z["a"]) ** 2)
            - 0.1 * jnp.sum(z["x"] ** 2)
        )

    latents = {"a": hivi.Latent(shape, support), "x": hivi.Latent(shape)}
    parts = {"a": hivi.MeanField(), "x": hivi.MeanField()}
    if name == "codes":
        return hivi.from_log_joint(log_joint, latents), {"a": hivi.Codes(bits=2), "x": hivi.MeanField()}, "code of a"
    if name == "rows":
        return (
            hivi.from_numpyro(rows_model, jnp.array([0.5, 2.0, 4.0]), subsample={"data": 2}),
            hivi.Structured(parts),
            "a",
        )
    return hivi.from_log_joint(log_joint, latents), hivi.Structured(parts), "a"


def rows_model(y: Array) -> None:
    with numpyro.plate("data", len(y)):
        a = numpyro.sample("a", dist.Poisson(1.0))
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(a, 1.0)), 1.0), obs=y)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("count", hivi.Difference()),
        ("categorical", hivi.LocalExpectation()),
        pytest.param("categorical", hivi.DisARM(), marks=pytest.mark.slow),
        pytest.param("codes", hivi.LocalExpectation(), marks=pytest.mark.slow),
        pytest.param("rows", hivi.Difference(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_strategies_above_others_have_the_mean_of_the_score(name, strategy):
    """By simulation, against the score of the whole log-weight, whose mean is exact by enumeration elsewhere."""
    model, family, site = above_others(name)
    proposal = perturbed(build_proposal(family, model.sites, jax.random.key(0)), jax.random.key(1), 0.3)
    chosen = hivi.Auto(cheap=1000).resolve(model, proposal, hivi.Elbo())
    found, count = [], 20_000
    for number, own in enumerate((HierarchicalScore(), strategy)):
        setting = Setting(model, proposal, hivi.Elbo(), 4)
        mean, variance = moments(setting, {**chosen, site: own}, jax.random.key(number), count)
        found.append((mean, variance / count))
    (a, va), (b, vb) = found
    assert float(jnp.sqrt(jnp.sum(va + vb))) < 0.08 * float(jnp.linalg.norm(a)), "not precise enough to judge"
    noisy = va + vb > 1e-12
    assert float(jnp.max(jnp.abs(a - b)[noisy] / jnp.sqrt(va + vb)[noisy])) < 4.5
    np.testing.assert_allclose(a[~noisy], b[~noisy], atol=1e-5)


def test_too_many_redraws_are_refused():
    latents = {"a": hivi.Latent((100,), dist.constraints.integer_interval(0, 3)), "x": hivi.Latent()}
    model = hivi.from_log_joint(lambda z: -0.5 * (z["x"] - jnp.sum(z["a"])) ** 2, latents)
    family = hivi.Structured({"a": hivi.MeanField(), "x": hivi.MeanField()})
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 1, "progress": False}
    with pytest.raises(FitError, match="300 moves would draw all of them anew"):
        hivi.fit(model, family, estimator={"a": hivi.LocalExpectation()}, **options)


def test_control_draws_below_a_moved_bit_must_move(monkeypatch):
    """Local expectation that holds the draws below a bit fixed has another gradient."""
    own = Evaluation._replace
    monkeypatch.setattr(Evaluation, "_replace", lambda self, **new: own(self, **{**new, "above": None}))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_agrees(of_a_bit_above(ABOVE["local expectation"]))


def test_auto_says_why_and_others_are_refused():
    model = TARGETS["mixed"]()
    family = hivi.Structured({"z": hivi.MeanField(), "x": hivi.MeanField()})
    assert "other draws depend on it" in hivi.Auto().explain(model, family)
    assert isinstance(chosen(model, build_proposal(family, model.sites, jax.random.key(0)))["z"], HierarchicalScore)
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 1, "progress": False}
    for strategy in (hivi.LocalExpectation(coupled=True), hivi.Enumeration(), hivi.DoubleControlVariates()):
        with pytest.raises(FitError, match="other draws depend on it"):
            hivi.fit(model, family, estimator={"z": strategy}, **options)


def exact_of_mixed() -> float:
    """log of the integral of `mixed`, by quadrature over its two real coordinates."""
    grid = jnp.linspace(-5, 5, 401)
    target, cell = TARGETS["mixed"](), float((grid[1] - grid[0]) ** 2)
    points = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    at = jax.jit(jax.vmap(lambda z, x: target.log_joint({"z": z, "x": x}), (None, 0)))
    return float(np.log(sum(np.exp(np.asarray(at(jnp.array(b), points), float)).sum() * cell for b in (0, 1))))


@pytest.mark.slow
def test_it_keeps_what_the_product_loses(tmp_path):
    """A bit that sets the location of two numbers: the product cannot follow it, the structure does; saved and loaded."""
    target, log_z = TARGETS["mixed"](), exact_of_mixed()
    groups = {"z": hivi.MeanField(), "x": hivi.FullRank()}
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 3000, "samples": 8, "progress": False}
    gap = {}
    for name, family in (("product", groups), ("structured", hivi.Structured(groups))):
        fit = hivi.fit(target, family, learning_rate=0.03, **options)
        gap[name] = log_z - fit.elbo(jax.random.key(1)).mean
    assert gap["product"] > 0.15
    assert -0.01 < gap["structured"] < 0.1
    again = hivi.load(fit.save(tmp_path / "run"), target=target)
    assert again.elbo(jax.random.key(2), samples=500) == fit.elbo(jax.random.key(2), samples=500)
    assert [name for name, _ in again.family.groups] == ["z", "x"]


class Cubic(eqx.Module):
    """A network of one's own."""

    weight: Array

    def __call__(self, given: Array) -> Array:
        return self.weight @ jnp.concatenate([given, given**3])


@pytest.mark.parametrize("networks", [None, {"w": Cubic(0.1 * jnp.ones((6, 2)))}], ids=["linear", "network"])
def test_it_starts_as_the_product_and_takes_networks(networks):
    target = hivi.from_log_joint(
        lambda z: -0.5 * z["a"] ** 2 - 0.5 * jnp.sum((z["w"] - jnp.sin(z["a"])) ** 2),
        latents={"a": hivi.Latent(), "w": hivi.Latent((3,))},
    )
    family = hivi.Structured({"a": hivi.MeanField(), "w": hivi.MeanField()}, networks)
    p = build_proposal(family, target.sites, jax.random.key(0))
    z, context = p.propose(jax.random.key(1))
    plain = {**p.groups[0].propose(jax.random.split(jax.random.key(1))[0])[0]}
    plain |= p.groups[1].propose(jax.random.split(jax.random.key(1))[1])[0]
    np.testing.assert_allclose(jnp.concatenate([jnp.ravel(z[n]) for n in "aw"]),
                               jnp.concatenate([jnp.ravel(plain[n]) for n in "aw"]), rtol=1e-6)  # fmt: skip
    moved = perturbed(p, jax.random.key(2))
    z, context = moved.propose(jax.random.key(1))
    of_draw = sum(jnp.sum(t) for t in moved.log_q(z, context, jax.random.key(3)).values())
    np.testing.assert_allclose(moved.log_density(z, jax.random.key(3)), of_draw, rtol=1e-5)


@pytest.mark.slow
def test_rows_below_a_global_group():
    """W of each row travels with the row, and its terms carry N/B."""
    target = hivi.from_numpyro(grouped_normals, OBSERVED, subsample={"data": BATCH})
    family = hivi.Structured({"g": hivi.MeanField(), "z": hivi.Hierarchical(prior=hivi.MeanField())})
    p = perturbed(build_proposal(family, target.sites, jax.random.key(0)), jax.random.key(1))
    rows = jnp.array([3, 1])
    own, local = p.maps[0].weights, p.gather({"data": rows}).maps[0].weights
    for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(local), strict=True):
        np.testing.assert_array_equal(x[rows], y)
    z, context = p.gather({"data": rows}).propose(jax.random.key(0))
    names = p.gather({"data": rows}).log_q(z, context, jax.random.key(0))
    assert {n for n in names if n.endswith("#1")} <= {n for n, v in p.scales().items() if v == 2.0}
    assert_agrees(means(target, p, chosen(target, p.gather(target.all_rows())), hivi.Elbo(), 1, 13, forced))


def grouped_normals(y: Array) -> None:
    """A number for all rows, and a bit in each row."""
    up = numpyro.sample("g", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(OBSERVED)):
        z = numpyro.sample("z", dist.Bernoulli(logits=0.8 * up - 0.2))
        numpyro.sample("y", dist.Normal(1.5 * z - 0.5 * up, 1.0), obs=y)


@pytest.mark.slow
def test_rows_with_a_structure_of_their_own():
    """All sites in one plate: structured row by row, also below an inference network."""

    def model(y: Array) -> None:
        with numpyro.plate("data", y.shape[0]):
            a = numpyro.sample("a", dist.Bernoulli(0.5))
            w = numpyro.sample("w", dist.Normal(2.0 * a, 1.0))
            numpyro.sample("y", dist.Normal(w, 1.0), obs=y)

    target = hivi.from_numpyro(model, OBSERVED, subsample={"data": 2})
    structure = hivi.Structured({"a": hivi.MeanField(), "w": hivi.MeanField()})
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 40, "samples": 2, "progress": False}
    for family in (structure, hivi.Amortised(structure, data=OBSERVED[:, None], hidden=4)):
        fit = hivi.fit(target, family, **options)
        assert fit.strategies["a"] == "HierarchicalScore"
        assert np.isfinite(fit.elbo(jax.random.key(1), samples=20).mean)


def test_refusals():
    mixed = TARGETS["mixed"]()
    key = jax.random.key(0)
    with pytest.raises(FamilyError, match="two groups"):
        hivi.Structured({"z": hivi.MeanField()})
    with pytest.raises(FamilyError, match="no later group"):
        hivi.Structured({"z": hivi.MeanField(), "x": hivi.MeanField()}, {"z": Cubic(jnp.ones((1, 1)))})
    with pytest.raises(FamilyError, match="make it the first group"):
        build_proposal(hivi.Structured({"z": hivi.MeanField(), "x": hivi.Mixture(2)}), mixed.sites, key)
    family = hivi.Structured({"z": hivi.MeanField(), "x": hivi.MeanField()}, {"x": Cubic(jnp.ones((3, 2)))})
    with pytest.raises(FamilyError, match="vector of 4 parameters"):
        build_proposal(family, mixed.sites, key)
    rows = hivi.from_numpyro(grouped, OBSERVED, subsample={"data": BATCH})
    with pytest.raises(FamilyError, match="put global groups first"):
        build_proposal(hivi.Structured({"z": hivi.MeanField(), "g": hivi.MeanField()}), rows.sites, key)
