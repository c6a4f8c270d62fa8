"""Bounds taken apart by rows: they add up, and each row's is its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.scipy.special import logsumexp

import hivi

KEY = jax.random.key(0)
Y = np.array([-1.0, 0.2, 1.9, 2.2, 0.9, -0.3, 3.1], np.float32)
QUICK: dict[str, Any] = {"key": KEY, "progress": False, "tolerance": None}


def mixture(y: Any) -> None:
    """A cluster for each row: mean-field is exact."""
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)


def log_evidence() -> np.ndarray:
    """Of each row."""
    each = [np.log(p) + dist.Normal(m, 1.0).log_prob(Y) for p, m in ((0.7, 0.0), (0.3, 2.0))]
    return np.asarray(logsumexp(jnp.stack(each), 0))


def pairs(y: Any) -> None:
    """Two units a row, and a location outside the plate: mean-field is not exact."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(mu + 2.0 * z[..., 0] * z[..., 1], 0.5), obs=y)


@pytest.mark.parametrize("batch", [None, 3])
def test_rows_have_their_own_evidence(batch):
    """Seven rows in minibatches of three: the last begins anew, and no row is lost or counted twice."""
    target = hivi.from_numpyro(mixture, jnp.asarray(Y), subsample=batch and {"rows": batch})
    fit = hivi.fit(target, hivi.MeanField(), steps=1500, learning_rate=0.1, **QUICK)
    found = fit.pointwise(jax.random.key(1), "rows", samples=20)
    assert found.rows.shape == (20, 7)
    np.testing.assert_allclose(found.rest, 0.0)
    np.testing.assert_allclose(found.mean(), log_evidence(), atol=2e-3)
    assert found.total().mean == pytest.approx(float(log_evidence().sum()), abs=5e-3)


@pytest.mark.parametrize(
    ("batch", "family"),
    [(None, hivi.MeanField()), (3, hivi.MeanField()), (3, hivi.Mixture(2, equal=True))],
    ids=["whole", "minibatch", "mixture"],
)
def test_rows_and_rest_add_up_to_the_bound(batch, family):
    """Of a mixture, too, whose ELBO has its components outside the logarithm."""
    target = hivi.from_numpyro(pairs, jnp.asarray(Y), subsample=batch and {"rows": batch})
    fit = hivi.fit(target, {"mu": hivi.MeanField(), "z": family}, steps=200, **QUICK)
    one, many = (fit.pointwise(jax.random.key(1), "rows", draws=d, samples=1000) for d in (None, 32))
    assert one.rest.std() > 0.01
    for found, bound in ((one, hivi.Elbo()), (many, hivi.ImportanceWeighted(32, plate="rows"))):
        whole, total = fit.elbo(jax.random.key(2), 1000, bound), found.total()
        assert abs(total.mean - whole.mean) < 4.5 * np.hypot(total.stderr, whole.stderr)
    error = np.hypot(one.stderr(), many.stderr())
    assert np.all(many.mean() > one.mean() - 4.5 * error), "more draws are no looser, row by row"
    assert np.any(many.mean() > one.mean() + 4.5 * error)


def beside(y: Any, w: Any) -> None:
    """Data in the plate that touch no latent of their row."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * z + mu, 1.0), obs=y)
        numpyro.sample("w", dist.Normal(mu, 1.0), obs=w)


def test_data_that_touch_no_row_are_all_counted():
    y, w = jnp.asarray(Y[:6]), jnp.array([0.0, 0.0, 0.0, 3.0, 3.0, 3.0])
    target = hivi.from_numpyro(beside, y, w, subsample={"rows": 3})
    fit = hivi.fit(target, hivi.MeanField(), steps=300, **QUICK)
    found, whole = fit.pointwise(jax.random.key(1), "rows", samples=2000).total(), fit.elbo(jax.random.key(2), 4000)
    assert abs(found.mean - whole.mean) < 4.5 * np.hypot(found.stderr, whole.stderr)
    uneven = hivi.from_numpyro(beside, y, w, subsample={"rows": 4})
    with pytest.raises(hivi.FitError, match=r"plate 'rows'.*6 rows of which some terms touch no latent.*subsample"):
        hivi.fit(uneven, hivi.MeanField(), steps=5, **QUICK).pointwise(KEY, "rows", samples=4)


def test_what_it_refuses(tmp_path):
    def crossed(y: Any) -> None:
        with numpyro.plate("columns", 4), numpyro.plate("rows", 6):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)

    fit = hivi.fit(hivi.from_numpyro(mixture, jnp.asarray(Y)), hivi.MeanField(), steps=5, **QUICK)
    with pytest.raises(hivi.FitError, match=r"plate 'row' of Fit.pointwise.*'rows'"):
        fit.pointwise(KEY, "row")
    with pytest.raises(hivi.FitError, match=r"Fit.pointwise\(draws=...\).*at least 1"):
        fit.pointwise(KEY, "rows", draws=0)
    with pytest.raises(hivi.FitError, match=r"Fit.pointwise\(samples=...\).*at least 2"):
        fit.pointwise(KEY, "rows", samples=1)
    fit.save(tmp_path / "run")
    with pytest.raises(hivi.FitError, match=r"Fit.pointwise.*without its target"):
        hivi.load(tmp_path / "run").pointwise(KEY, "rows")
    target = hivi.from_numpyro(crossed, jnp.zeros((6, 4)), subsample={"columns": 2})
    columns = hivi.fit(target, hivi.MeanField(), steps=5, **QUICK)
    with pytest.raises(hivi.FitError, match=r"subsampled plate 'columns'.*Fit.pointwise of the plate 'rows'"):
        columns.pointwise(KEY, "rows")
    assert columns.pointwise(KEY, "columns", samples=2).rows.shape == (2, 4)
    with pytest.raises(hivi.FitError, match=r"subsampled plate 'columns'"):
        columns.elbo(KEY, 2, bound=hivi.ImportanceWeighted(2, plate="rows"))
