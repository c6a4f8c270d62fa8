"""Every family keeps its one promise: a draw z and a number log q with E[g(z) exp(-log q)] = the integral of g.

`g` is a normalised density near q, so that the mean is 1; parameters are perturbed, so that no flow is the identity and no
auxiliary exact. Densities at any point are held to the same draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array
from numpyro.distributions import Binomial, Normal, Poisson

import hivi
from cases import FAMILIES, INNER_REFUSED, KINDS, TARGETS, built, quick, states, total
from hivi._compile import compiled
from hivi._families.base import AbstractProposal, Layout
from hivi._families.codes import CodesProposal
from hivi._families.hierarchical import HierarchicalProposal
from hivi._families.mixture import MixtureProposal
from hivi._families.product import ProductProposal
from hivi._space import Latents

DRAWS = 20_000
PRECISE = 0.03
SCALE = 0.1
DEEP = ("hvm hvm hvm",)
"""Families whose weights have heavy tails unless they are near their start."""
HEAVY = ("normal", "constrained", "mixed", "binomial")
"""Targets on which the weights of a semi-implicit r without further draws have hardly a variance."""


def density(target: hivi.Target, proposal: AbstractProposal, key: Array) -> Callable[[Latents], Array]:
    """Log of a normalised density that is near q and has lighter tails: independent coordinates."""
    weights = jnp.exp(proposal.log_weights())
    keys = jax.random.split(key, 1000)
    draws = [quick(jax.vmap(lambda k, b=b: proposal.propose(k, b)[0]))(keys) for b in range(proposal.branches)]
    moments = {}
    for s in target.sites:
        z = jnp.stack([d[s.name] for d in draws]).astype(float)
        mean = jnp.einsum("b,bn...->...", weights, z) / 1000
        moments[s.name] = mean, jnp.sqrt(jnp.einsum("b,bn...->...", weights, (z - mean) ** 2) / 1000)

    def log_g(z: Latents) -> Array:
        parts = []
        for s in target.sites:
            (mean, spread), value = moments[s.name], z[s.name]
            if s.values.kind == "real":
                parts.append(Normal(mean, 0.7 * spread).log_prob(value))
            elif s.values.kind == "finite":
                parts.append(jnp.full(value.shape, -jnp.log(s.values.count)))
            elif s.values.kind == "count":
                parts.append(Poisson(0.7 * mean).log_prob(value))
            else:
                number = s.values.count - 1
                parts.append(Binomial(number, jnp.clip(mean / number, 0.01, 0.99)).log_prob(value))
        return sum((jnp.sum(p) for p in parts), jnp.zeros(()))

    return log_g


def overlapping(proposal: AbstractProposal) -> AbstractProposal:
    """Mixture components widened, codes' effects shrunk: where q has gaps, 1/q has no variance and the check no power."""
    if isinstance(proposal, CodesProposal):
        return eqx.tree_at(lambda p: p.effect, proposal, 0.3 * proposal.effect)
    if isinstance(proposal, ProductProposal):
        return eqx.tree_at(lambda p: p.parts, proposal, tuple(overlapping(p) for p in proposal.parts))
    if not isinstance(proposal, MixtureProposal):
        if isinstance(proposal, HierarchicalProposal):
            return eqx.tree_at(lambda p: p.prior, proposal, overlapping(proposal.prior))
        return proposal
    lam = {s.name: proposal.lam[s.name] for s in proposal.sites}
    real = {n: x.at[..., 0].multiply(0.3).at[..., 1].add(1.0) for n, x in lam.items() if x.shape[-1] == 2}
    return eqx.tree_at(lambda p: p.lam, proposal, {**lam, **real})


def ratios(
    proposal: AbstractProposal, log_g: Callable[[Latents], Any], inner: int, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """g(z) exp(-log q) of independent draws, all branches of each summed with their weights."""

    def one(key: Array) -> Array:
        k_draw, k_inner = jax.random.split(key)

        def of(branch: Array) -> Array:
            z, context = proposal.propose(k_draw, branch)
            return jnp.exp(log_g(z) - total(proposal.log_q(z, context, k_inner, inner)))

        weights = jnp.exp(proposal.log_weights())
        return jnp.einsum("b,b...->...", weights, jax.vmap(of)(jnp.arange(proposal.branches)))

    return np.asarray(quick(jax.vmap(one))(jax.random.split(jax.random.key(seed), draws)), np.float64)


def stderr(ratio: np.ndarray) -> np.ndarray:
    return ratio.std(0, ddof=1) / np.sqrt(len(ratio))


def assert_mean_is_one(ratio: np.ndarray, limit: float = 4.0) -> None:
    error = stderr(ratio)
    assert error.max() < PRECISE, f"not precise enough to judge: {error.max():.3f}"
    assert (np.abs(ratio.mean(0) - 1) < limit * error + 1e-4).all(), (ratio.mean(0), error)


def one_dimensional(target: str, family: str) -> bool:
    """Coupling and MAF flows need two coordinates."""
    return target in ("count", "binomial") and any(k in family for k in ("coupling", "maf"))


ROWS = [
    (target, family, inner)
    for target in TARGETS
    for family, row in FAMILIES.items()
    for inner in (0, 2)
    if row.takes(TARGETS[target]())
    and not one_dimensional(target, family)
    and not (inner and (not family.startswith(("hvm", "copula")) or family in INNER_REFUSED))
    and not (not inner and "semi-implicit" in family and target in HEAVY)
    and not (("product" in family or "structured" in family) and target == "constrained")
]
DEFAULT_ROWS = [
    *(("pair", f, 0) for f in ("mean-field", "mixture", "hvm planar", "hvm full-rank", "hvm mixture", "hvm hvm")),
    *(("pair", f, 2) for f in ("hvm planar", "hvm mean-field", "hvm full-rank, semi-implicit")),
    *((t, "mean-field", 0) for t in ("count", "binomial", "mixed")),
    *(
        ("normal", f, 0)
        for f in (
            "full-rank",
            "low-rank",
            "copula",
            "copula vine",
            "copula vine, frank",
            "flow planar",
            "flow coupling",
            "flow maf",
            "flow spline",
        )
    ),
    ("mixed", "hvm full-rank", 0),
    ("pair", "hvm low-rank", 2),
    ("count", "hvm mean-field", 0),
    ("sites", "product", 0),
    ("pair", "copula", 0),
    ("pair", "copula vine", 2),
    ("binomial", "copula", 0),
    ("mixed", "copula", 2),
    ("pair", "hvm planar, recursive", 0),
    ("pair", "hvm full-rank, recursive", 2),
    ("mixed", "structured backwards", 0),
    ("sites", "structured hvm", 0),
]


def rows(chosen: list[tuple[str, str, int]]) -> list[Any]:
    """Parameters of a test, with the known failures marked."""
    return [pytest.param(*r, id=" - ".join(map(str, r))) for r in chosen]


def check(target: str, family: str, inner: int) -> None:
    model = TARGETS[target]()
    proposal = overlapping(built(family, model, scale=0.3 * SCALE if family in DEEP else SCALE))
    log_g = density(model, proposal, jax.random.key(7))
    found = ratios(proposal, log_g, inner)
    if stderr(found).max() >= PRECISE:
        found = ratios(proposal, log_g, inner, 8 * DRAWS)
    assert_mean_is_one(found)


@pytest.mark.parametrize(("target", "family", "inner"), rows(DEFAULT_ROWS))
def test_properly_weighted(target, family, inner):
    check(target, family, inner)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "family", "inner"), rows([r for r in ROWS if r not in DEFAULT_ROWS]))
def test_properly_weighted_everywhere(target, family, inner):
    check(target, family, inner)


@pytest.mark.parametrize("family", ["mixture", "hvm full-rank", "product of mixtures"])
def test_properly_weighted_at_every_state(family):
    """g the indicator of one state: the mean is 1 for each."""
    model = TARGETS["sites" if family.startswith("product") else "categorical"]()
    proposal = built(family, model, scale=0.3)
    grid = states(model.sites, 2)

    def indicator(z: Latents) -> Array:
        same = [jnp.all((v == z[n]).reshape(len(v), -1), 1) for n, v in grid.items()]
        return jnp.where(jnp.all(jnp.stack(same), 0), 0.0, -jnp.inf)

    assert_mean_is_one(ratios(proposal, indicator, 0, 60_000), limit=4.5)


def test_a_wrong_weight_is_noticed():
    """The check can fail: here the base density of the flow is forgotten in log q."""
    model = TARGETS["pair"]()
    proposal = built("hvm planar", model, scale=SCALE)
    log_g = density(model, proposal, jax.random.key(7))
    with pytest.raises(AssertionError):
        assert_mean_is_one(1.1 * ratios(proposal, log_g, 0))


# Densities

COPULAS = ["copula", "copula vine", "copula vine, frank"]
EXACT = ["mean-field", "mixture", "full-rank", "low-rank", *COPULAS, *(f"flow {k}" for k in KINDS)]


@pytest.mark.parametrize("family", EXACT)
def test_exact_density_is_that_of_the_draws(family):
    """log q of a draw, and the density at the same point computed from nothing but the point."""
    model = TARGETS["constrained"]()
    proposal = built(family, model)

    def both(key: Array) -> tuple[Array, Array]:
        z, context = proposal.propose(key)
        return total(proposal.log_q(z, context, key)), proposal.log_density(z, key)

    of_draw, at_point = quick(jax.vmap(both))(jax.random.split(jax.random.key(0), 500))
    np.testing.assert_allclose(at_point, of_draw, rtol=1e-4, atol=1e-2 if "spline" in family else 1e-4)


DENSITY = ["mixture", "hvm full-rank", "hvm mixture"]


def check_density(family: str, samples: int) -> None:
    """E exp(log_density) adds up to 1 over all states, and is how often each is drawn."""
    model = TARGETS["pair"]()
    proposal = built(family, model, scale=SCALE)
    grid = states(model.sites)["z"]
    keys = jax.random.split(jax.random.key(2), DRAWS)
    at_states = jax.vmap(lambda z, k: proposal.log_density({"z": z}, k, samples), (0, None))
    found = np.exp(np.asarray(quick(jax.vmap(lambda k: at_states(grid, k)))(keys), np.float64))
    assert_mean_is_one(found.sum(1))
    weights = np.exp(np.asarray(proposal.log_weights()))
    drawn = np.zeros(4)
    for b, w in enumerate(weights):
        z = np.asarray(quick(jax.vmap(lambda k, b=b: proposal.propose(k, b)[0]["z"]))(keys))
        drawn += w * np.bincount(z @ [2, 1], minlength=4) / DRAWS
    stderr = np.sqrt(found.var(0) / DRAWS + drawn * (1 - drawn) / DRAWS)
    assert (np.abs(found.mean(0) - drawn) < 4.5 * stderr).all()


@pytest.mark.parametrize("family", DENSITY)
def test_density_is_unbiased(family):
    check_density(family, samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in DENSITY and FAMILIES[f].takes(TARGETS["pair"]())])
def test_density_is_unbiased_everywhere(family):
    check_density(family, samples=16)


# Coordinates of priors

PRIORS = ["mean-field", "full-rank", "low-rank", *COPULAS, "mixture", *(f"flow {k}" for k in KINDS), "hvm full-rank"]


@pytest.mark.parametrize(
    "family", [f if f != "copula vine, frank" else pytest.param(f, marks=pytest.mark.slow) for f in PRIORS]
)
def test_coordinates_go_there_and_back(family):
    """`from_coordinates` inverts `coordinates`; log-dets are opposite, and that of the Jacobian."""
    model = TARGETS["normal"]()
    proposal = built(family, model)
    layout = Layout(proposal.sites)

    def there(base: Array) -> Array:
        return layout.flatten(proposal.from_coordinates(base)[0])

    def both(base: Array) -> tuple[Array, ...]:
        value, log_det = proposal.from_coordinates(base)
        back = proposal.coordinates(value, None)
        return back.base, back.log_det, log_det, jnp.linalg.slogdet(jax.jacfwd(there)(base))[1]

    bases = jax.random.normal(jax.random.key(0), (50, 2))
    back, back_log_det, log_det, right = quick(jax.vmap(both))(bases)
    rounding = 1e-2 if "spline" in family else 2e-3 if "copula" in family else 1e-3
    np.testing.assert_allclose(back, bases, atol=rounding)
    np.testing.assert_allclose(back_log_det, -log_det, atol=rounding)
    np.testing.assert_allclose(log_det, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["full-rank", "low-rank", *COPULAS, *(f"flow {k}" for k in KINDS)])
def test_coordinates_of_a_draw_are_its_base(family):
    model = TARGETS["normal"]()
    proposal = built(family, model)
    z, context = proposal.propose(jax.random.key(3))
    known, found = proposal.coordinates(z, context), proposal.coordinates(z, None)
    np.testing.assert_allclose(found.base, known.base, atol=1e-3)
    np.testing.assert_allclose(found.log_det, known.log_det, atol=1e-3)
    value, log_det, log_q = proposal.density_at(known.base, jax.random.key(0))
    np.testing.assert_allclose(value["x"], z["x"], atol=1e-5)
    np.testing.assert_allclose(log_det, -known.log_det, atol=1e-4)
    np.testing.assert_allclose(log_q, proposal.log_density(z, jax.random.key(0)), atol=2e-3)


@pytest.mark.parametrize("kind", ["coupling", "maf", "spline"])
def test_flows_of_both_precisions_in_one_process(kind):
    """A flow built in double precision leaves nothing behind for the same one in single precision."""
    family = hivi.Flow(layers=3, kind=kind)  # no other test's flow, which this would spoil
    for wide in (True, False):
        with jax.enable_x64(wide):
            proposal = family.build(TARGETS["normal"]().sites, jax.random.key(0))
            z, _ = proposal.propose(jax.random.key(1))
            assert z["x"].dtype == (jnp.float64 if wide else jnp.float32)


@pytest.mark.parametrize("family", PRIORS)
def test_recentre_moves_a_prior(family):
    """Its draws get (about) the location and the scale that were asked for."""
    model = TARGETS["normal"]()
    location, scale = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.1])
    proposal = built(family, model, scale=0.0).recentre(location, scale)
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jnp.concatenate(
        [quick(jax.vmap(lambda k, b=b: proposal.propose(k, b)[0]["x"]))(keys) for b in range(proposal.branches)]
    )
    assert (jnp.abs(draws.mean(0) - location) < 0.15 * scale).all()
    assert (jnp.abs(jnp.log(draws.std(0) / scale)) < 0.35).all()


def test_compiled_weights_are_right():
    """`compiled` log q over a large batch, as in `fit.elbo`, gives what separate compilation gives."""
    model = TARGETS["normal"]()
    proposal = built("hvm planar", model, scale=0.0)

    def log_q(key: Array) -> Array:
        z, context = proposal.propose(key)
        return total(proposal.log_q(z, context, key))

    keys = jax.random.split(jax.random.key(1), 20_000)
    np.testing.assert_allclose(compiled(jax.vmap(log_q))(keys), quick(jax.vmap(log_q))(keys), atol=1e-2)
