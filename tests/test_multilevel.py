"""Levels above lambda, bits inside the prior, and a recursive auxiliary: fitted, saved and loaded; what they reach."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hivi
from cases import FAMILIES, TARGETS
from hivi._errors import FamilyError
from hivi._families.auxiliary import Link
from hivi._families.product import build_proposal

DEEP = ("hvm hvm", "hvm hvm hvm", "hvm planar, recursive", "hvm mixture")
NAMES = ["hvm hvm", "hvm hvm hvm", "codes", "hvm planar, recursive", "hvm mixture"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in DEEP else []) for n in NAMES])
def test_fitted_saved_and_loaded(name, tmp_path):
    target = TARGETS["pair"]()
    fit = hivi.fit(target, FAMILIES[name].family, key=jax.random.key(0), steps=20, samples=2, progress=False)
    again = hivi.load(fit.save(tmp_path / "run"), target=target)
    assert again.elbo(jax.random.key(2), samples=100) == fit.elbo(jax.random.key(2), samples=100)
    z = again.sample(jax.random.key(1), 20)
    np.testing.assert_array_equal(z["z"], fit.sample(jax.random.key(1), 20)["z"])
    assert np.isfinite(again.log_prob(z, key=jax.random.key(3), samples=8)).all()
    assert type(again.family) is type(FAMILIES[name].family)


def linear_state(dim: int) -> tuple[Any, Any, Link]:
    """A recursive auxiliary that is linear in nu, above a mean-field prior."""
    sites = TARGETS["pair"]().sites
    family = hivi.Hierarchical(prior=hivi.MeanField(), auxiliary=hivi.Recursive(dim=dim, layers=0))
    p: Any = build_proposal(family, sites, jax.random.key(0))
    return p, p.auxiliary, Link(sites)


@pytest.mark.parametrize("dim", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_linear_recursion_is_exact(dim):
    """Where nu moves means only, s is the posterior of nu: the bound on log r has no gap and no noise."""
    p, state, _ = linear_state(dim)
    z, (lam, context) = p.propose(jax.random.key(1))

    def log_r(key: Any) -> Any:
        terms = state.excess(z, lam, context, p.prior, key)
        return -sum(jnp.sum(t) for n, t in terms.items() if not n.startswith("prior"))

    found = jax.vmap(log_r)(jax.random.split(jax.random.key(2), 50))
    point = state._standardised(lam, context, p.prior, z)
    covariance = jnp.eye(2) + state.load @ state.load.T
    exact = jax.scipy.stats.multivariate_normal.logpdf(point.standard, jnp.zeros(2), covariance) + point.log_det
    np.testing.assert_allclose(found, exact, atol=1e-4)


def test_an_extra_draw_has_the_weight_of_the_pair():
    """E over (lambda, nu) ~ r of q(z,lambda) s / r is q(z), whatever s is: compared with quadrature-free mean-field counts."""
    p, state, link = linear_state(2)
    state = jax.tree.map(lambda x: x + 0.2, state)
    z = {"z": jnp.array([1, 0])}

    def weight(key: Any) -> Any:
        lam, excess = state.draw(z, p.prior, key)
        return jnp.exp(excess + sum(jnp.sum(t) for t in link.log_prob(lam, z).values()))

    def direct(key: Any) -> Any:
        _, (lam, _) = p.propose(key)
        return jnp.exp(sum(jnp.sum(t) for t in link.log_prob(lam, z).values()))

    keys = jax.random.split(jax.random.key(3), 40_000)
    a, b = (np.asarray(jax.jit(jax.vmap(f))(keys), float) for f in (weight, direct))
    stderr = np.hypot(a.std(), b.std()) / 200
    assert stderr < 0.01 * b.mean()
    assert abs(a.mean() - b.mean()) < 4 * stderr


def test_refusals():
    with pytest.raises(FamilyError, match=r"Recursive\(dim"):
        hivi.Recursive(dim=0)
