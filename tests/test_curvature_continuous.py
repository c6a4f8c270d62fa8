"""The second-order test with continuous and mixed sites, against the Hessian by quadrature and enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.optimize
from jaxtyping import Array

import hivi
from hivi._curvature import curvature
from hivi._likelihood import likelihood
from test_curvature import at

PRECISION = np.array([[2.0, -0.9, 0.3], [-0.9, 1.0, 0.1], [0.3, 0.1, 5.0]])


def gaussian() -> hivi.Target:
    """Correlated; its mean-field optimum is known."""
    return hivi.from_log_joint(lambda z: -0.5 * z["x"] @ jnp.asarray(PRECISION) @ z["x"], {"x": hivi.Latent((3,))})


def independent() -> hivi.Target:
    scale = jnp.array([0.1, 1.0, 30.0])
    return hivi.from_log_joint(lambda z: -0.5 * (z["x"] / scale) ** 2, {"x": hivi.Latent((3,))})


def funnel() -> hivi.Target:
    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {
            "v": dist.Normal(0.0, 1.2).log_prob(z["v"]),
            "x": dist.Normal(0.0, jnp.exp(z["v"] / 2)).log_prob(z["x"]),
        }

    return hivi.from_log_joint(log_joint, {"v": hivi.Latent(), "x": hivi.Latent()})


def ard() -> hivi.Target:
    """Automatic relevance determination: the log precision of one weight, and the weight, which the data hardly hold."""

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        return {
            "log alpha": 2.0 * z["log alpha"] - 2.0 * jnp.exp(z["log alpha"]),
            "w": dist.Normal(0.0, jnp.exp(-0.5 * z["log alpha"])).log_prob(z["w"]),
            "y": dist.Normal(z["w"], 1.5).log_prob(0.4),
        }

    return hivi.from_log_joint(log_joint, {"log alpha": hivi.Latent(), "w": hivi.Latent()})


def switch() -> hivi.Target:
    """A Bernoulli that moves the mean of a Normal and, a little, its scale."""

    def log_joint(z: dict[str, Array]) -> dict[str, Array]:
        on = z["on"] * 1.0
        return {"on": 0.4 * on, "x": dist.Normal(1.1 * on, 1.0 + 0.3 * on).log_prob(z["x"])}

    return hivi.from_log_joint(log_joint, {"on": hivi.Latent((), dist.constraints.boolean), "x": hivi.Latent()})


def by_quadrature(target: hivi.Target) -> tuple[hivi.Fit, np.ndarray]:
    """The mean-field optimum, and the Hessian there in the units of `curvature`: Gauss-Hermite nodes, states enumerated."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    axes = [range(2) if s.discrete else range(len(nodes)) for s in target.sites for _ in range(int(np.prod(s.shape)))]
    cells = np.array(list(itertools.product(*axes)))
    where, start = {}, 0
    for s in target.sites:
        where[s.name] = slice(start, start + int(np.prod(s.shape)))
        start = where[s.name].stop
    reals = [k for s in target.sites if not s.discrete for k in range(where[s.name].start, where[s.name].stop)]
    mass = jnp.asarray(np.prod([(weights / weights.sum())[cells[:, k]] for k in reals], 0))

    def parts(flat: Array) -> dict[str, Array]:
        out, at_ = {}, 0
        for s in target.sites:
            size = int(np.prod(s.shape)) * likelihood(s).width
            out[s.name] = flat[at_ : at_ + size].reshape(*s.shape, -1)
            at_ += size
        return out

    def points(lam: dict[str, Array]) -> dict[str, Array]:
        z = {}
        for s in target.sites:
            index = cells[:, where[s.name]].reshape(-1, *s.shape)
            own = lam[s.name]
            z[s.name] = (
                jnp.asarray(index) if s.discrete else own[..., 0] + jnp.exp(own[..., 1]) * jnp.asarray(nodes)[index]
            )
        return z

    def log_q(lam: dict[str, Array], z: dict[str, Array], discrete: bool | None = None) -> Array:
        chosen = [s for s in target.sites if discrete is None or s.discrete == discrete]
        terms = [jax.vmap(lambda v, s=s: jnp.sum(likelihood(s).log_prob(lam[s.name], v)))(z[s.name]) for s in chosen]
        return sum(terms, jnp.zeros(len(cells)))

    def mean(flat: Array, fixed: Array | None = None) -> Array:
        """E of log p - log q, with q inside held at `fixed`."""
        lam = parts(flat)
        z = points(lam)
        inside = log_q(lam if fixed is None else parts(fixed), z)
        weight = mass * jnp.exp(log_q(lam, z, discrete=True))
        return jnp.sum(weight * (jax.vmap(target.log_joint)(z) - inside))

    width = sum(int(np.prod(s.shape)) * likelihood(s).width for s in target.sites)
    value = jax.jit(jax.value_and_grad(lambda f: -mean(f)))
    solved = scipy.optimize.minimize(
        lambda f: [np.asarray(v, float) for v in value(f)], 0.1 * np.ones(width), jac=True, options={"gtol": 1e-10}
    )
    mu = jnp.asarray(solved.x)
    hessian = jax.hessian(lambda f: mean(f, mu))(mu)
    unit = jnp.concatenate(
        [
            (
                jnp.ones_like(v)
                if target.site(n).discrete
                else jnp.stack([jnp.exp(v[..., 1]), jnp.ones_like(v[..., 1])], -1)
            ).reshape(-1)
            for n, v in parts(mu).items()
        ]
    )
    return at(target, parts(mu)), np.asarray(hessian * unit[:, None] * unit)


@pytest.mark.parametrize(
    "make",
    [ard, *(pytest.param(f, marks=pytest.mark.slow) for f in (gaussian, funnel, switch))],
    ids=lambda f: f.__name__,
)
def test_against_the_hessian_by_quadrature(make: Callable[[], hivi.Target], x64):
    fit, exact = by_quadrature(make())
    found = curvature(fit, key=jax.random.key(0), samples=8192, top=2)
    vectors = np.concatenate([found.vectors[s.name].reshape(2, -1) for s in fit.sites], 1)
    expected = np.einsum("ki,ij,kj->k", vectors, exact, vectors)
    scale = np.abs(np.linalg.eigvalsh(exact)).max()
    assert np.all(found.stderr < 0.06 * scale)
    np.testing.assert_array_less(np.abs(found.eigenvalues - expected), 4 * found.stderr + 1e-6)
    assert expected[0] > 0.9 * np.linalg.eigvalsh(exact)[-1]
    assert found.share == 1.0
    assert found.warning == ""


def test_gaussians_directions_are_exact():
    """With locations in standard deviations M is minus the scaled precision, without its diagonal; no noise from the draws."""
    sd = 1 / np.sqrt(np.diagonal(PRECISION))
    exact = -PRECISION * sd[:, None] * sd
    np.fill_diagonal(exact, 0.0)
    lam = jnp.stack([jnp.zeros(3), jnp.log(jnp.asarray(sd, jnp.float32))], -1)
    found = curvature(at(gaussian(), {"x": lam}), key=jax.random.key(0))
    vector = found.vectors["x"][0]
    assert found.eigenvalues[0] == pytest.approx(np.linalg.eigvalsh(exact)[-1], rel=0.02)
    assert vector[:, 0] @ exact @ vector[:, 0] == pytest.approx(np.linalg.eigvalsh(exact)[-1], rel=0.02)
    assert found.couples[0].startswith("x[0] (+0.7")
    assert "x[1] (+0." in found.couples[0]
    scaled = found.directions.vectors["x"][0, :, 0]
    np.testing.assert_allclose(scaled, vector[:, 0] * sd, rtol=1e-5)


def test_independent_sites_have_no_direction():
    lam = jnp.stack([jnp.zeros(3), jnp.log(jnp.array([0.1, 1.0, 30.0]))], -1)
    found = curvature(at(independent(), {"x": lam}), key=jax.random.key(0))
    assert found.share == 0.0
    assert "locally best" in str(found)


def test_a_funnel_couples_a_location_with_a_log_scale(x64):
    fit, _ = by_quadrature(funnel())
    found = curvature(fit, key=jax.random.key(0))
    assert "v (" in found.couples[0]
    assert "log sd of x (" in found.couples[0]
    assert str(found).splitlines()[-1].startswith("Mixing along")


def test_ard_couples_a_precision_with_the_log_scale_of_its_weight(x64):
    """The entry between them is exactly minus the expected change of alpha w^2 / 2: negative, and not small."""
    fit, exact = by_quadrature(ard())
    order = {s.name: 2 * k for k, s in enumerate(fit.sites)}
    assert exact[order["log alpha"], order["w"] + 1] < -0.2
    found = curvature(fit, key=jax.random.key(0), samples=8192, top=3)
    assert any("log alpha (" in c and "log sd of w (" in c for c in found.couples[:2]), found.couples


@pytest.mark.slow
def test_a_hierarchy_along_a_gaussians_direction_gains():
    target = gaussian()
    fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=3000, progress=False)
    found = curvature(fit, key=jax.random.key(1))
    assert found.gain_to_expect.mean > 0.02
    better = hivi.fit(
        target, hivi.Hierarchical(prior=hivi.FullRank(), start=found), key=jax.random.key(2), steps=1500, progress=False
    )
    before, after = (f.elbo(jax.random.key(3), 16_384) for f in (fit, better))
    assert after.mean > before.mean + 4 * np.hypot(before.stderr, after.stderr)


def test_rows_of_a_plate():
    """Each row's pair of Normals is coupled, more in some rows than in others; rows are told apart."""
    strength = jnp.linspace(0.0, 0.9, 8)

    def model(strength: Array) -> None:
        with numpyro.plate("rows", 8, subsample_size=4) as rows:
            c = strength[rows]
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            numpyro.sample("b", dist.Normal(c * a, jnp.sqrt(1 - c**2)))

    target = hivi.from_numpyro(model, strength, subsample={"rows": 4})
    sd = jnp.sqrt(1 - strength**2)  # of either, given the other
    lam = jnp.stack([jnp.zeros(8), jnp.log(sd)], -1)
    found = curvature(at(target, {"a": lam, "b": lam}), key=jax.random.key(0), rows=range(8), samples=8192, top=1)
    np.testing.assert_allclose(found.eigenvalues[:, 0], strength, atol=0.12)
    assert set(range(3, 8)) <= set(found._found().tolist())


@pytest.mark.slow
def test_sites_by_name(x64):
    fit, _ = by_quadrature(switch())
    assert set(curvature(fit, key=jax.random.key(0), sites=["on"]).vectors) == {"on"}
    with pytest.raises(hivi.TargetError, match="off"):
        curvature(fit, key=jax.random.key(0), sites=["off"])
    full = hivi.fit(gaussian(), hivi.FullRank(), key=jax.random.key(0), steps=5, progress=False)
    with pytest.raises(hivi.FitError, match=r"'x'.*no mean-field q"):
        curvature(full, key=jax.random.key(0))
