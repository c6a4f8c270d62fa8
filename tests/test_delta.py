"""Points: maxima a posteriori against closed forms, variational EM, and what is said of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from hivi.diagnostics import marginal_khat

KEY = jax.random.key(0)
COUNTS = jnp.array([3, 0, 4, 2, 6])


def fitted(target: hivi.Target, family: Any, steps: int = 1500, **options: Any) -> hivi.Fit:
    return hivi.fit(target, family, key=KEY, steps=steps, progress=False, **options)


def rates(x: Array) -> None:
    """A rate of its own for each row, and a simplex: maxima in the model's own coordinates, not in the engine's."""
    w = numpyro.sample("w", dist.Dirichlet(jnp.array([2.0, 3.0, 5.0])))
    with numpyro.plate("rows", len(x)):
        r = numpyro.sample("r", dist.Gamma(3.0, 1.0))
        numpyro.sample("x", dist.Poisson(r * 2.0), obs=x)
    numpyro.factor("none", 0.0 * w[0])


@pytest.mark.parametrize("batch", [2, 5])
def test_the_point_is_the_maximum_a_posteriori(batch):
    fit = fitted(hivi.from_numpyro(rates, COUNTS, subsample={"rows": batch}), hivi.Delta())
    found = {n: np.asarray(v[0]) for n, v in fit.sample(KEY, 2).items()}
    np.testing.assert_allclose(found["r"], (3.0 - 1.0 + COUNTS) / (1.0 + 2.0), rtol=0.02)
    np.testing.assert_allclose(found["w"], (np.array([2.0, 3.0, 5.0]) - 1) / 7, atol=0.01)


def loadings(x: Array) -> None:
    """Factor analysis with one factor and known noise."""
    w = numpyro.sample("w", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None] * w, 1.0).to_event(1), obs=x)


def test_variational_em_reaches_the_penalised_likelihood():
    """Each row's posterior is Normal, so that the bound is log p(x, w) itself, and its maximum that of EM."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(60, 1)) * np.array([1.5, -1.0]) + rng.normal(size=(60, 2)), jnp.float32)

    def log_p(w: Array) -> Array:
        rows = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2) + jnp.outer(w, w)).log_prob(x)
        return jnp.sum(rows) + jnp.sum(dist.Normal(0.0, 3.0).log_prob(w))

    best, slope = jnp.array([1.0, -1.0]), jax.jit(jax.grad(log_p))
    for _ in range(300):
        best = best + 0.01 * slope(best)
    fit = fitted(hivi.from_numpyro(loadings, x), {"w": hivi.Delta(), "z": hivi.MeanField()}, 1500)
    w = fit.sample(KEY, 2)["w"][0]
    w = w * jnp.sign(w[0])
    np.testing.assert_allclose(w, best, atol=0.05)
    bound = fit.elbo(KEY, samples=2000)
    assert bound.stderr < 0.05
    assert abs(bound.mean - float(log_p(w))) < 4 * bound.stderr + 0.05


def test_draws_density_and_saving(tmp_path):
    target = hivi.from_numpyro(loadings, jnp.ones((4, 2)))
    fit = fitted(target, {"w": hivi.Delta(), "z": hivi.MeanField()}, 20)
    draws = fit.sample(KEY, 3)
    np.testing.assert_array_equal(draws["w"][0], draws["w"][2])
    assert np.isfinite(fit.log_prob(draws, key=KEY)).all()
    elsewhere = {**draws, "w": draws["w"] + 0.5}
    assert np.isneginf(fit.log_prob(elsewhere, key=KEY)).all()
    fit.save(tmp_path / "run")
    loaded = hivi.load(tmp_path / "run", target=target)
    np.testing.assert_array_equal(loaded.sample(KEY, 3)["w"], draws["w"])
    assert loaded.elbo(KEY, samples=32) == fit.elbo(KEY, samples=32)


def test_symmetric_sites_start_apart():
    """Weights of units that start at one place stay there."""

    def model(x: Array) -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.3 * jnp.ones(3)).to_event(1))
            numpyro.sample("x", dist.Normal(z @ w, 0.3), obs=x)

    fit = fitted(hivi.from_numpyro(model, jnp.array([1.0, 2.0])), {"w": hivi.Delta(), "z": hivi.MeanField()}, 1)
    w = fit.sample(KEY, 2)["w"][0]
    assert len(np.unique(np.round(w, 3))) == 3


def test_what_is_said_of_points():
    fit = fitted(hivi.from_numpyro(loadings, jnp.ones((4, 2))), {"w": hivi.Delta(), "z": hivi.MeanField()}, 20)
    assert any("'w' at a point" in line for line in hivi.trust(fit, key=KEY, samples=200).remarks)


def test_no_khat_of_points_alone():
    fit = fitted(hivi.from_numpyro(loadings, jnp.ones((4, 2))), hivi.Delta(), 5)
    with pytest.raises(hivi.FitError, match="a point for every site"):
        marginal_khat(fit, key=KEY)
    assert hivi.trust(fit, key=KEY, samples=100).khat is None


def test_refusals():
    boolean = hivi.from_log_joint(lambda z: 1.0 * z["b"], {"b": hivi.Latent((), constraints.boolean)})
    with pytest.raises(hivi.FamilyError, match=r"Delta\(\) at site 'b'.*discrete"):
        fitted(boolean, hivi.Delta())

    def moving() -> None:
        low = numpyro.sample("low", dist.Normal(0.0, 1.0))
        numpyro.sample("u", dist.Uniform(low, low + 1.0))

    with pytest.raises(hivi.TargetError, match=r"site 'u'.*depends on other latents"):
        fitted(hivi.from_numpyro(moving), hivi.Delta())
    with pytest.raises(hivi.FamilyError, match=r"Structured\(\) at group 'b'.*follow earlier draws"):
        fitted(hivi.from_log_joint(lambda z: -z["a"] ** 2 - z["b"] ** 2, {"a": hivi.Latent(), "b": hivi.Latent()}),
               hivi.Structured({"a": hivi.MeanField(), "b": hivi.Delta()}))  # fmt: skip
    with pytest.raises(
        hivi.FamilyError, match=r"Hierarchical\(prior=...\): found Delta\(\); expected a distribution of"
    ):
        fitted(boolean, hivi.Hierarchical(prior=hivi.Delta()))


def test_points_are_not_compared_with_distributions():
    """Wherever the point is, by whatever key."""
    target = hivi.from_numpyro(loadings, jnp.ones((4, 2)))
    families = {
        "mean-field": hivi.MeanField(),
        "em": {"w": hivi.Delta(), "z": hivi.MeanField()},
        "inside": hivi.Structured({"w": hivi.Delta(), "z": hivi.MeanField()}),
    }
    found = hivi.compare(target, families, key=KEY, steps=20, progress=False)
    assert found.best == "mean-field"
    for name in ("em", "inside"):
        assert "holds ['w'] at a point, mean-field no site" in found[name].error
    other_way = {"em": families["em"], "mean-field": hivi.MeanField()}
    assert (
        "holds no site at a point"
        in hivi.compare(target, other_way, key=KEY, steps=20, progress=False)["mean-field"].error
    )
    del families["mean-field"]
    families["other"] = {"w.*": hivi.Delta(), "z": hivi.MeanField()}
    assert not any(row.error for row in hivi.compare(target, families, key=KEY, steps=20, progress=False).rows)


def test_points_of_rows_that_are_not_subsampled():
    """The bound row by row takes the Jacobian of each row."""
    fit = fitted(hivi.from_numpyro(rates, COUNTS), hivi.Delta(), 5, bound=hivi.ImportanceWeighted(2, plate="rows"))
    assert np.isfinite(fit.elbo(KEY, samples=4).mean)
    assert fit.elbo(KEY, samples=4).mean == pytest.approx(fit.elbo(KEY, samples=4, bound=hivi.Elbo()).mean, rel=1e-5)
