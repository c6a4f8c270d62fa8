"""Inference networks for the plates of ordinary targets: one gradient scale, unseen rows, saving without data, refusals."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jaxtyping import Array
from numpyro.distributions import constraints

import hivi
from cases import perturbed
from hivi._errors import FamilyError, FitError, LoadError
from hivi._families.product import build_proposal
from test_unbiased import (
    BATCH,
    OBSERVED,
    assert_agreement_over_minibatches,
    assert_agrees,
    grouped,
    means,
    strategies,
)

FEATURES = np.stack([OBSERVED, OBSERVED**2], 1)


def network(**options: Any) -> dict[str, Any]:
    """Mean-field for the global site, a network for the rows."""
    return {"z": hivi.Amortised(hivi.MeanField(), data=FEATURES, hidden=3, **options), "g": hivi.MeanField()}


@pytest.mark.parametrize("kind", ["exact", "score"])
def test_minibatches_average_to_the_full_gradient(kind):
    """In the network's weights, too."""
    assert_agreement_over_minibatches(network(), kind)


def rows_of_two(x: Array) -> None:
    """Two bits and a number for each row, observed through one noisy number."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", x.shape[0]):
        z = numpyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
        h = numpyro.sample("h", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(b + z[..., 0] + z[..., 1] + h, 0.5), obs=x)


X = np.random.default_rng(0).normal(size=12).astype(np.float32)


def fitted(family: Any, **options: Any) -> hivi.Fit:
    target = hivi.from_numpyro(rows_of_two, X, subsample={"data": 4})
    settings = {"key": jax.random.key(0), "steps": 20, "samples": 1, "progress": False, **options}
    return hivi.fit(target, {"b": hivi.MeanField(), ".*": family}, **settings)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(hivi.MeanField(), id="mean-field"),
        pytest.param(
            hivi.Hierarchical(prior=hivi.Flow(layers=1, kind="coupling"), shared=True),
            id="shared hierarchy",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_unseen_rows_need_no_fitting(family, tmp_path):
    """Draws, densities and bounds of other rows; saved without data, and asked again with it."""
    fit = fitted(hivi.Amortised(family, data=X[:, None], hidden=3))
    new = X[:3] + 1
    target = hivi.from_numpyro(rows_of_two, new)
    there = fit.rows(new[:, None], target=target)
    draws = there.sample(jax.random.key(1), 6)
    assert {n: d.shape for n, d in draws.items()} == {"b": (6,), "z": (6, 3, 2), "h": (6, 3)}
    assert np.isfinite(there.log_prob(draws, key=jax.random.key(2), samples=4)).all()
    bound = there.elbo(jax.random.key(3), samples=200)
    assert -60 < bound.mean < 0
    folder = fit.save(tmp_path / "run")
    assert (folder / "fit.safetensors").stat().st_size < 60_000
    again = hivi.load(folder)
    with pytest.raises(FamilyError, match=r"no data of its rows.*fit.rows\(x\)"):
        again.sample(jax.random.key(1), 2)
    same = again.rows(new[:, None], target=target)
    assert same.elbo(jax.random.key(3), samples=200) == bound
    on = hivi.fit(target, start=same, key=jax.random.key(0), steps=2, samples=1, progress=False)
    assert len(on.history["elbo"]) == 2


def test_the_same_rows_again_are_the_same_fit():
    """`rows` of the training features is the fit itself; with row parameters that the features do not tell apart alike."""
    fit = fitted(hivi.Amortised(hivi.MeanField(), data=X[:, None], hidden=3))
    again = fit.rows(X[:, None], target=fit.target)
    assert again.elbo(jax.random.key(3), samples=50) == fit.elbo(jax.random.key(3), samples=50)
    lam = fit.proposal.gather({"data": jnp.arange(12)}).parameters()["h"]
    other = fit.rows(X[::-1, None]).proposal.gather({}).parameters()["h"]
    np.testing.assert_allclose(other[::-1], lam, rtol=1e-5, atol=1e-6)
    assert np.ptp(lam[:, 0]) > 1e-4


def test_rows_of_two_plates_keep_their_own_features():
    def model(x: Array, y: Array) -> None:
        with numpyro.plate("left", len(x)):
            numpyro.sample("x", dist.Normal(numpyro.sample("a", dist.Normal()), 1.0), obs=x)
        with numpyro.plate("right", len(y)):
            numpyro.sample("y", dist.Normal(numpyro.sample("b", dist.Normal()), 1.0), obs=y)

    x, y = jnp.arange(4.0), jnp.arange(6.0)
    family = {
        "a": hivi.Amortised(data=x[:, None], hidden=3, plate="left"),
        "b": hivi.Amortised(data=y[:, None], hidden=3, plate="right"),
    }
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 2, "samples": 1, "progress": False}
    fit = hivi.fit(hivi.from_numpyro(model, x, y), family, **options)
    new, target = {"left": x[:2, None] + 1, "right": y[:3, None] + 2}, hivi.from_numpyro(model, x[:2] + 1, y[:3] + 2)
    there = fit.rows(new, target=target)
    for name, plate in (("a", "left"), ("b", "right")):
        np.testing.assert_array_equal(there.family[name].data, new[plate])
    on = hivi.fit(target, start=there, **options)
    assert {n: d.shape for n, d in on.sample(jax.random.key(1), 5).items()} == {"a": (5, 2), "b": (5, 3)}


def test_features_are_no_parameters():
    """An optimiser that decays weights leaves them as they are."""
    fit = fitted(
        hivi.Amortised(hivi.MeanField(), data=X[:, None], hidden=3), optimizer=optax.adamw(0.01, weight_decay=1.0)
    )
    part = next(p for p in fit.proposal.parts if p.amortised)
    np.testing.assert_array_equal(part.features.value, X[:, None])


class Pictures(eqx.Module):
    """An encoder of one's own, of features with two axes."""

    weight: Array

    def __call__(self, picture: Array) -> Array:
        return self.weight @ jnp.ravel(picture)


def test_an_encoder_of_ones_own(tmp_path):
    data = np.stack([X, X**2, X**3, np.ones_like(X)], 1).reshape(-1, 2, 2)
    family = hivi.Amortised(hivi.MeanField(), data=data, encoder=Pictures(0.01 * jnp.ones((4, 4))))
    fit = fitted(family)
    folder = fit.save(tmp_path / "run")
    with pytest.raises(LoadError, match=r"network of your own \(Pictures\).*family="):
        hivi.load(folder)
    again = hivi.load(folder, family=fit.family).rows(data[:2])
    assert again.sample(jax.random.key(0), 3)["h"].shape == (3, 2)
    with pytest.raises(FamilyError, match="a vector of 4 parameters"):
        fitted(hivi.Amortised(hivi.MeanField(), data=data, encoder=Pictures(jnp.ones((5, 4)))))


def test_a_log_joint_with_plates():
    """No subsampling: the plate of the sites is enough, and where there are several the family names one."""

    def log_joint(z: dict[str, Array], x: Array) -> dict[str, Array]:
        return {"prior": -0.5 * z["w"] ** 2, "x": -0.5 * (x - z["w"]) ** 2}

    latents = {"w": hivi.Latent((2, 12), constraints.real, plates={"group": 0, "data": 1})}
    target = hivi.from_log_joint(log_joint, latents, data=X)
    family = hivi.Amortised(hivi.MeanField(), data=X[:, None], plate="data", hidden=4)
    options: dict[str, Any] = {"key": jax.random.key(0), "progress": False}
    fit = hivi.fit(target, family, steps=400, samples=4, learning_rate=0.03, tolerance=None, **options)
    exact = 2 * float(np.sum(-0.25 * X**2) + 12 * 0.5 * np.log(np.pi))  # of an unnormalised target
    assert abs(fit.elbo(jax.random.key(1), samples=500).mean - exact) < 0.6
    assert fit.rows(X[:5, None]).sample(jax.random.key(1), 2)["w"].shape == (2, 2, 5)
    with pytest.raises(FamilyError, match=r"the plates \['data', 'group'\].*plate="):
        hivi.fit(target, hivi.Amortised(hivi.MeanField(), data=X[:, None]), **options)


def test_refusals():
    target = hivi.from_numpyro(rows_of_two, X, subsample={"data": 4})
    options: dict[str, Any] = {"key": jax.random.key(0), "steps": 1, "progress": False}
    with pytest.raises(FamilyError, match=r"\['b'\].*without a plate"):
        hivi.fit(target, hivi.Amortised(hivi.MeanField(), data=X[:, None]), **options)
    with pytest.raises(FamilyError, match="12 rows"):
        fitted(hivi.Amortised(hivi.MeanField(), data=X[:5, None]))
    with pytest.raises(FamilyError, match="no data of its rows"):
        fitted(hivi.Amortised(hivi.MeanField(), features=1))
    with pytest.raises(FamilyError, match=r"y\[:, None\]"):
        hivi.Amortised(data=X)
    with pytest.raises(FamilyError, match="flatten the features"):
        hivi.Amortised(data=X.reshape(-1, 2, 2))
    with pytest.raises(FamilyError, match="no start"):
        hivi.Amortised(hivi.Hierarchical(start=object()), data=X[:, None])
    with pytest.raises(FamilyError, match="equal=True"):
        fitted(hivi.Amortised(hivi.Mixture(2), data=X[:, None]))


def test_refusals_at_unseen_rows():
    with pytest.raises(FitError, match="without an inference network"):
        fitted(hivi.MeanField()).rows(X[:, None])
    fit = fitted(hivi.Amortised(hivi.MeanField(), data=X[:, None], hidden=3))
    with pytest.raises(FitError, match=r"\(rows, 1\)"):
        fit.rows(np.ones((4, 2)))
    with pytest.raises(FitError, match="as many rows as features"):
        fit.rows(X[:3, None], target=hivi.from_numpyro(rows_of_two, X[:4]))
    target = hivi.from_numpyro(rows_of_two, X, subsample={"data": 4})
    family = {"h": hivi.MeanField(), "z": hivi.Amortised(data=X[:, None], hidden=3), "b": hivi.MeanField()}
    mixed = hivi.fit(target, family, key=jax.random.key(0), steps=1, samples=1, progress=False)
    with pytest.raises(FamilyError, match="site 'h' at other rows"):
        mixed.rows(X[:, None])


@pytest.mark.parametrize("kind", ["exact", "score"])
def test_a_mixture_of_equal_weights_is_stratified_row_by_row(kind):
    """Every row has every component in some branch; the gradient has the right mean over all draws of all branches."""
    target = hivi.from_numpyro(grouped, OBSERVED, subsample={"data": BATCH})
    family = {"z": hivi.Mixture(2, equal=True), "g": hivi.MeanField()}
    proposal = perturbed(build_proposal(family, target.sites, jax.random.key(0)), jax.random.key(1), 0.5)
    assert proposal.branches == 2
    assert_agrees(means(target, proposal, strategies(target, kind), hivi.Elbo()))
    rows = proposal.gather(target.all_rows())
    lam = [rows.conditionals(rows.propose(jax.random.key(3), b)[1])["z"].lam for b in (0, 1)]
    assert not np.isclose(lam[0], lam[1]).any()
