"""`from_numpyro` against NumPyro's own log-density, its minibatches against the whole, and what it refuses."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions import constraints
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import potential_energy
from numpyro.primitives import mutable
from scipy.stats import norm

import hivi
from hivi._errors import TargetError
from hivi._target.base import Target, explain
from hivi.interop.numpyro import from_numpyro

Y = np.array([0.3, -1.2, 0.8, 2.1, -0.4, 0.9], np.float32)
X = np.array([1.0, 0.5, -0.3, 0.7, -1.1, 0.2], np.float32)
COUNTS = np.array([0, 2, 1, 4, 0, 3])


def point(target: Target, seed: int = 0) -> dict[str, jax.Array]:
    """Some values of all latents, at full size."""
    rng = np.random.default_rng(seed)
    z = {}
    for s in target.sites:
        if s.discrete:
            z[s.name] = jnp.asarray(s.values.low + rng.integers(0, min(s.values.count or 3, 3), s.shape), s.dtype)
        else:
            z[s.name] = jnp.asarray(0.4 * rng.standard_normal(s.shape), s.dtype)
    return z


def reference(model, args, z, target: Target) -> float:
    """NumPyro's own log-density in unconstrained coordinates."""
    integers = {s.name: z[s.name] for s in target.sites if s.discrete}
    model = handlers.substitute(handlers.seed(model, 0), data=integers)
    reals = {k: v for k, v in z.items() if k not in integers}
    return -float(jax.jit(lambda u: potential_energy(model, args, {}, u))(reals))


def site(target: Target, name: str):
    return target.site(name)


# Models that agree with NumPyro -----------------------------------------------------------------------------------


def plain(x, y):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    noise = numpyro.sample("noise", dist.HalfNormal(1))
    with numpyro.plate("data", len(y)):
        numpyro.deterministic("line", slope * x)
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def nested(y):
    scale = numpyro.sample("scale", dist.Gamma(2.0, 1.0))
    with numpyro.plate("columns", 3, dim=-1):
        col = numpyro.sample("col", dist.Normal(0, 1))
        with numpyro.plate("rows", 2, dim=-2):
            mean = numpyro.sample("mean", dist.Normal(col, scale))
            numpyro.sample("y", dist.Normal(mean, 1), obs=y.reshape(2, 3))


def crossed(y):
    rows, columns = numpyro.plate("rows", 2, dim=-2), numpyro.plate("columns", 3, dim=-1)
    with rows:
        a = numpyro.sample("a", dist.Normal(0, 1))
    with columns:
        b = numpyro.sample("b", dist.Exponential(1.0))
    with rows, columns:
        numpyro.sample("y", dist.Normal(a * b, 1), obs=y.reshape(2, 3))


def events(y):
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([2, 3]).to_event(2))
    with numpyro.plate("n", 2):
        numpyro.sample("w", dist.Gamma(2.0, jnp.ones(3)).to_event(1))
        numpyro.sample("y", dist.Normal(loc, 1).to_event(1), obs=y.reshape(2, 3))


def masked(y):
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([2]))
    mask = jnp.array([True, False])
    with numpyro.plate("n", 2), handlers.mask(mask=mask):
        numpyro.sample("y", dist.Normal(loc[:, None], 1).expand([2, 3]).to_event(1), obs=y.reshape(2, 3))
        numpyro.factor("f", -(loc**2))
    with handlers.mask(mask=False):
        numpyro.sample("off", dist.Normal(loc[0], 1), obs=3.0)


def scaled(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with handlers.scale(scale=3.0), numpyro.plate("n", 6):
        z = numpyro.sample("z", dist.Poisson(2.0))
        with handlers.scale(scale=jnp.arange(1.0, 7.0)):
            numpyro.sample("y", dist.Normal(a * z, 1), obs=y)
        with handlers.scale(scale=jnp.exp(a)):
            numpyro.factor("f", -0.1 * z)


def supports():
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
    low = numpyro.sample("low", dist.LKJCholesky(3, 1.0))
    m = numpyro.sample("m", dist.MultivariateNormal(jnp.zeros(3), scale_tril=low))
    walk = numpyro.sample("walk", dist.GaussianRandomWalk(0.5, 4))
    unit = numpyro.sample("unit", dist.Beta(2, 2))
    between = numpyro.sample("between", dist.Uniform(-1.0, 3.0))
    above = numpyro.sample("above", dist.TruncatedNormal(0.0, 1.0, low=-1.0))
    angle = numpyro.sample("angle", dist.VonMises(0.0, 1.0))
    numpyro.sample("y", dist.Normal(m * p + walk[:3], 1).to_event(1), obs=jnp.array([unit, between, above]) + angle)


def dynamic(y):
    a = numpyro.sample("a", dist.HalfNormal(1))
    b = numpyro.sample("b", dist.Uniform(0, a))
    with numpyro.plate("n", 3):
        numpyro.sample("c", dist.Uniform(-b, y.max()))
    numpyro.sample("d", dist.TruncatedNormal(0.0, 1.0, high=a))


def mixture(y):
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones(2)))
    rate = numpyro.sample("rate", dist.Gamma(jnp.ones(2), 1.0).to_event(1))
    with numpyro.plate("n", len(y)):
        k = numpyro.sample("k", dist.Categorical(p), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Poisson(rate[k]), obs=y)


def counts():
    with numpyro.plate("n", 4):
        b = numpyro.sample("b", dist.Bernoulli(0.3))
        g = numpyro.sample("g", dist.Geometric(0.4))
        s = numpyro.sample("s", dist.Binomial(jnp.array([5, 5, 5, 5]), 0.3))
        r = numpyro.sample("r", dist.NegativeBinomial2(3.0, 2.0))
        u = numpyro.sample("u", dist.DiscreteUniform(2, 5))
        i = numpyro.sample("i", dist.ZeroInflatedPoisson(0.2, 2.0))
        numpyro.sample("y", dist.Normal(b + g * s - r + u * i, 1), obs=jnp.ones(4))


def improper(y):
    loc = numpyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
    rate = numpyro.sample("rate", dist.ImproperUniform(constraints.positive, (), ()))
    cuts = numpyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
    numpyro.factor("hold", -(cuts**2))
    numpyro.sample("y", dist.Normal(loc, rate), obs=y)


def hmm(y):
    p = numpyro.sample("p", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
    loc = numpyro.sample("loc", dist.Normal(0, 1).expand([2]).to_event(1))

    def step(before, now):
        z = numpyro.sample("z", dist.Categorical(p[before]))
        w = numpyro.sample("w", dist.Gamma(1.0 + z, 1.0))
        numpyro.sample("y", dist.Normal(loc[z], w), obs=now)
        return z, None

    scan(step, 0, y)


def scan_bounds(y):
    def step(before, now):
        k = numpyro.sample("k", dist.DiscreteUniform(0, 5))
        b = numpyro.sample("b", dist.Binomial(5, jax.nn.sigmoid(before)))
        u = numpyro.sample("u", dist.Uniform(0.0, 5.0))
        numpyro.sample("y", dist.Normal(k + b + u, 1), obs=now)
        return u, None

    scan(step, 0.5, y)


def scan_plate(y):
    first = numpyro.sample("first", dist.HalfNormal(1))

    def step(before, now):
        with numpyro.plate("batch", 2):
            z = numpyro.sample("z", dist.Uniform(0, before + 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=now)
        return z.sum(), None

    scan(step, first, y.reshape(3, 2))


def branches():
    c = numpyro.sample("c", dist.Normal(0, 1))
    x = cond(
        c > 0,
        lambda _: numpyro.sample("x", dist.Gamma(2.0, 1.0)),
        lambda _: numpyro.sample("x", dist.Gamma(3.0, 1.0)),
        None,
    )
    numpyro.sample("y", dist.Normal(x, 1), obs=0.3)


def wrapped(y):
    centred = handlers.reparam(config={"theta": LocScaleReparam(0.0)})
    with handlers.scope(prefix="in"), centred, numpyro.plate("n", len(y)):
        theta = numpyro.sample("theta", dist.Normal(1.0, 2.0))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(theta, 1), obs=y)
    fixed = numpyro.sample("fixed", dist.Delta(theta[0] * 2, log_density=-1.5))
    numpyro.factor("f", fixed)


def repeats():
    z = numpyro.sample("z", dist.Gamma(2.0, 1.0), sample_shape=(4,))
    numpyro.sample("y", dist.Normal(z, 1), obs=jnp.ones(4))


AGREE = {
    "plain": (plain, X, Y),
    "nested plates": (nested, Y),
    "crossed plates": (crossed, Y),
    "to_event": (events, Y),
    "mask": (masked, Y),
    "scale": (scaled, Y),
    "supports": (supports,),
    "dynamic supports": (dynamic, Y),
    "mixture": (mixture, COUNTS),
    "counts": (counts,),
    "improper": (improper, Y),
    "scan": (hmm, Y),
    "bounds in scan": (scan_bounds, Y),
    "plate in scan": (scan_plate, Y),
    "cond": (branches,),
    "handlers": (wrapped, Y),
    "condition": (handlers.condition(plain, {"noise": jnp.array(1.5)}), X, Y),
    "substitute": (handlers.substitute(plain, {"slope": jnp.array(0.5)}), X, Y),
    "sample_shape": (repeats,),
}


@pytest.mark.parametrize("case", AGREE)
def test_log_joint_is_numpyros(case):
    model, *args = AGREE[case]
    target = from_numpyro(model, *args)
    assert from_numpyro(model, *args).factored.program == target.factored.program
    z = point(target)
    reals = {s.name: z[s.name] for s in target.sites if not s.discrete}
    value, gradient = jax.jit(jax.value_and_grad(lambda u: target.log_joint({**z, **u})))(reals)
    assert float(value) == pytest.approx(reference(model, args, z, target), rel=2e-5)
    assert all(bool(jnp.isfinite(g).all()) for g in gradient.values())


def test_sites_say_what_the_model_says():
    target = from_numpyro(scan_plate, Y)
    z = site(target, "z")
    assert (z.shape, z.support, z.plates) == ((3, 2), None, (("batch", 1),))
    target = from_numpyro(counts)
    kinds = {s.name: (s.values.kind, s.values.low, s.values.count) for s in target.sites}
    assert kinds["b"] == ("finite", 0, 2)
    assert kinds["g"] == kinds["r"] == kinds["i"] == ("count", 0, 0)
    assert kinds["s"] == ("finite", 0, 6)
    assert kinds["u"] == ("finite", 2, 4)
    assert all(isinstance(b, int) for s in target.sites for b in jax.tree.leaves(s.support))
    target = from_numpyro(supports)
    assert (site(target, "p").shape, site(target, "p").constrained_shape) == ((2,), (3,))
    assert (site(target, "low").shape, site(target, "low").constrained_shape) == ((3,), (3, 3))
    assert all(s.support is not None for s in target.sites)
    target = from_numpyro(crossed, Y)
    assert site(target, "a").shape == (2, 1)
    assert site(target, "a").plates == (("rows", 0),)
    target = from_numpyro(events, Y)
    assert (site(target, "w").shape, site(target, "w").plates) == ((2, 3), (("n", 0),))


def test_locality_survives_to_event_masks_and_scans():
    program = from_numpyro(masked, Y).factored.program
    assert not program.losses
    text = explain(from_numpyro(hmm, Y))
    assert "z[i-1] and z[i]" in text
    text = explain(from_numpyro(events, Y))
    assert re.search(r"y .*loc\[i, j\]", text)


def test_constrain_replays_supports_that_depend_on_latents():
    target = from_numpyro(dynamic, Y)
    z = point(target)
    model = handlers.seed(dynamic, 0)
    values = target.constrain(z)
    assert target.constrainer is not None
    assert float(values["a"]) == pytest.approx(float(jnp.exp(z["a"])))
    assert float(values["b"]) == pytest.approx(float(values["a"] * jax.nn.sigmoid(z["b"])), rel=1e-5)
    assert bool(((values["c"] > -values["b"]) & (values["c"] < Y.max())).all())
    batch = jax.jit(jax.vmap(target.constrain))({k: jnp.stack([v, v + 0.1]) for k, v in z.items()})
    assert batch["c"].shape == (2, 3)
    np.testing.assert_allclose(batch["c"][0], values["c"], rtol=1e-5)
    trace = handlers.trace(handlers.substitute(model, data=values)).get_trace(Y)
    assert set(values) <= set(trace)
    assert from_numpyro(plain, X, Y).constrainer is None
    assert from_numpyro(dynamic, Y[::-1] * 2).constrainer.program == target.constrainer.program


@pytest.mark.parametrize("reverse", [False, True])
def test_scanned_latents_are_in_the_order_of_xs(reverse):
    def model(y):
        def step(before, now):
            z = numpyro.sample("z", dist.LogNormal(before, 1.0))
            numpyro.sample("y", dist.Normal(z, 1), obs=now)
            return z, None

        scan(step, 0.5, y, reverse=reverse)

    trace = handlers.trace(handlers.seed(model, 1)).get_trace(Y[:4])
    expected = sum(float(s["fn"].log_prob(s["value"]).sum()) for s in trace.values() if s["type"] == "sample")
    target = from_numpyro(model, Y[:4])
    u = jnp.log(trace["z"]["value"])
    assert float(target.log_joint({"z": u})) == pytest.approx(expected + float(u.sum()), rel=1e-5)


def test_scales_multiply_densities_but_not_jacobians():
    def model(half):
        with handlers.scale(scale=2.0):
            numpyro.sample("z", dist.HalfNormal(half))

    target = from_numpyro(model, jnp.array(2.0))
    u = jnp.array(0.3)
    expected = 2.0 * float(dist.HalfNormal(2.0).log_prob(jnp.exp(u))) + 0.3
    assert float(target.log_joint({"z": u})) == pytest.approx(expected, rel=1e-5)


def test_condition_makes_a_latent_observed():
    target = from_numpyro(handlers.condition(plain, {"slope": jnp.array(0.5)}), X, Y)
    assert [s.name for s in target.sites] == ["noise"]


def test_delta_latents_are_values():
    target = from_numpyro(wrapped, Y)
    assert [s.name for s in target.sites] == ["in/theta_decentered"]


def test_notes_say_what_was_decided():
    assert any("'k'" in n and "enumerate" in n for n in from_numpyro(mixture, COUNTS).notes)
    assert from_numpyro(plain, X, Y).notes == ()


def test_arguments_are_the_models():
    with pytest.raises(TargetError, match=r"found missing a required argument: '\w+'; expected arguments for plain\("):
        from_numpyro(plain, X)
    with pytest.raises(TargetError, match="found an unexpected keyword argument 'sigma'"):
        from_numpyro(plain, X, Y, sigma=1.0)


# Missing values and masks ----------------------------------------------------------------------------------------


def holes(y, mask):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("n", 2):
        numpyro.sample("y", dist.Gamma(jnp.exp(loc), jnp.ones(3)).mask(mask).expand((2, 3)).to_event(1), obs=y)


def test_masked_nan_has_a_finite_gradient():
    y = np.abs(Y).reshape(2, 3)
    y[1, 1] = np.nan
    mask = ~np.isnan(y)
    target = from_numpyro(holes, y, mask)
    value, gradient = jax.value_and_grad(target.log_joint)({"loc": jnp.array(0.2)})
    rest = dist.Gamma(jnp.exp(0.2), 1.0).log_prob(y[mask]).sum() + dist.Normal(0, 1).log_prob(0.2)
    assert float(value) == pytest.approx(float(rest), rel=1e-5)
    assert bool(jnp.isfinite(gradient["loc"]))


def test_nan_observations_are_refused():
    y = np.abs(Y).reshape(2, 3)
    y[1, 1] = np.nan
    with pytest.raises(TargetError, match=r"'y'.*index \[1, 1\].*Cure: .*mask"):
        from_numpyro(holes, y, np.ones((2, 3), bool))
    with pytest.raises(TargetError, match=r"'y'.*index \[4\].*Cure: .*mask"):
        from_numpyro(hmm, y.ravel())


def seen(fn, y, mask=True):
    numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("n", 3):
        numpyro.sample("y", fn.mask(mask), obs=y)


IMPOSSIBLE = {
    "negative count": (dist.Poisson(1.0), [1, -2, 3]),
    "half a count": (dist.Poisson(1.0), [1, 2.5, 3]),
    "binary 2": (dist.Bernoulli(0.5), [1, 2, 0]),
    "category 3": (dist.Categorical(jnp.ones(3) / 3), [0, 3, 2]),
    "more than all": (dist.Binomial(2, 0.5), [0, 3, 2]),
    "negative time": (dist.Exponential(1.0), [1.0, -1.0, 2.0]),
    "outside the interval": (dist.Uniform(0.0, 1.0), [0.5, 1.5, 0.5]),
    "multinomial of another total": (dist.Multinomial(2, jnp.ones(2) / 2), [[1, 1], [2, 1], [0, 2]]),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_observations_are_refused_unless_they_are_masked(case):
    fn, y = IMPOSSIBLE[case]
    with pytest.raises(TargetError, match=r"'y'.*outside the support of \w+, first at index \[1\];.*Cure: "):
        from_numpyro(seen, fn, jnp.array(y))
    from_numpyro(seen, fn, jnp.array(y), np.array([True, False, True]))


def test_the_ends_of_a_support_and_supports_that_depend_on_latents_are_allowed():
    for fn, y in ((dist.Exponential(1.0), [0.0, 1.0, 2.0]), (dist.Uniform(0.0, 1.0), [0.0, 1.0, 0.5])):
        assert [s.name for s in from_numpyro(seen, fn, jnp.array(y)).sites] == ["loc"]

    def model(y):
        end = numpyro.sample("end", dist.Exponential(1.0))
        numpyro.sample("y", dist.Uniform(-1.0, end).expand([3]).to_event(1), obs=y)

    assert [s.name for s in from_numpyro(model, jnp.array([0.0, 5.0, 0.5])).sites] == ["end"]


def test_supports_that_are_not_the_distributions_own_refuse_nothing():
    """Periodic, zero-inflated and censored ones, and totals that change inside a scan."""
    for fn, y in (
        (dist.VonMises(0.0, 1.0), [0.5, 4.0, 6.2]),
        (dist.ZeroInflatedDistribution(dist.DiscreteUniform(1, 5), gate=0.3), [0, 2, 3]),
        (dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), dist.Normal(jnp.zeros(2), 1.0)), [0.0, 9.0, -9.0]),
    ):
        assert [s.name for s in from_numpyro(seen, fn, jnp.array(y)).sites] == ["loc"]

    def totals(y):
        rate = numpyro.sample("rate", dist.Normal(0, 1))

        def one(carry, x):
            logits = jnp.stack([rate, 0.0])
            numpyro.sample("y", dist.MultinomialLogits(logits, x.sum(), total_count_max=5), obs=x)
            return carry, None

        scan(one, 0, y)

    assert [s.name for s in from_numpyro(totals, jnp.array([[1, 2], [2, 0], [3, 1]])).sites] == ["rate"]


def test_observations_that_are_no_array_or_of_another_shape_are_refused():
    with pytest.raises(TargetError, match=r"'y'.*a list.*Cure: obs=jnp.asarray\(y\)"):
        from_numpyro(seen, dist.Poisson(1.0), [1, 2, 3])
    with pytest.raises(TargetError, match=r"'y'.*shape \(2,\); expected a shape like \(3,\).*Cure: "):
        from_numpyro(seen, dist.Poisson(1.0), jnp.array([1, 2]))


def imputed(y, seen):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    with numpyro.plate("n", 6):
        full = numpyro.sample("y", dist.Gamma(jnp.exp(loc), 1.0), obs=y, obs_mask=seen)
    numpyro.sample("total", dist.Normal(full.sum(), 1), obs=3.0)


def test_obs_mask_gives_unused_coordinates_their_prior():
    y, seen = np.abs(Y), np.array([True, True, False, True, False, True])
    y[~seen] = np.nan
    target = from_numpyro(imputed, y, seen)
    z = point(target)
    own = dist.Gamma(jnp.exp(z["loc"]), 1.0).log_prob(jnp.exp(z["y_unobserved"]))
    own = own + z["y_unobserved"]  # NumPyro masks the Jacobian, too
    expected = reference(imputed, (np.where(seen, y, 1.0), seen), z, target) + float(own[seen].sum())
    assert float(target.log_joint(z)) == pytest.approx(expected, rel=1e-5)
    assert any("y_unobserved" in n for n in target.notes)


def test_masked_vectors_keep_their_event_axis():
    def model(y, mask):
        loc = numpyro.sample("loc", dist.Normal(jnp.zeros(3), 1).to_event(1))
        with numpyro.plate("n", 2), handlers.mask(mask=mask):
            numpyro.sample("y", dist.MultivariateNormal(loc, jnp.eye(3)), obs=y)

    y = Y.reshape(2, 3).copy()
    y[1] = np.nan
    target = from_numpyro(model, y, np.array([True, False]))
    gradient = jax.grad(target.log_joint)({"loc": jnp.zeros(3)})
    np.testing.assert_allclose(gradient["loc"], y[0], rtol=1e-5)


def test_masked_chain_keeps_its_prior():
    def model(y, length):
        def step(before, xs):
            t, now = xs
            with handlers.mask(mask=t < length):
                z = numpyro.sample("z", dist.Normal(before, 1.0))
                numpyro.sample("y", dist.Normal(z, 1), obs=now)
            return z, None

        scan(step, 0.0, (jnp.arange(6), y))

    target = from_numpyro(model, Y, np.array(4))
    z = point(target)
    prior = dist.Normal(z["z"][:-1], 1.0).log_prob(z["z"][1:])
    expected = reference(model, (Y, jnp.array(4)), z, target) + float(prior[3:].sum())
    assert float(target.log_joint(z)) == pytest.approx(expected, rel=1e-5)


# Data that changes, and data that Python looks at ------------------------------------------------------------------


def test_new_data_of_equal_shape_make_an_equal_program():
    one, two = from_numpyro(plain, X, Y), from_numpyro(plain, 2 * X, jnp.asarray(-Y))
    assert one.factored.program == two.factored.program
    assert hash(one.factored.program) == hash(two.factored.program)
    assert one.sites == two.sites
    traces = []

    @jax.jit
    def total(target, z):
        traces.append(1)
        return target.log_joint(z)

    z = point(one)
    assert float(total(one, z)) != float(total(two, z))
    assert len(traces) == 1


def test_arrays_in_a_closure_are_not_part_of_the_program():
    def build(data, width):
        def model():
            loc = numpyro.sample("loc", dist.Normal(0, width))
            numpyro.sample("y", dist.Normal(loc, 1), obs=data)

        return from_numpyro(model)

    one, two = build(Y, 1.0), build(X, 1.0)
    assert one.factored.program == two.factored.program
    assert all(isinstance(c, jax.Array) for c in one.factored.consts)
    assert float(one.log_joint(point(one))) != float(two.log_joint(point(two)))
    assert build(Y, 2.0).factored.program != one.factored.program


def test_python_that_looks_at_data_makes_it_constant():
    def model(y, group):
        count = len(np.unique(group))
        effect = numpyro.sample("effect", dist.Normal(0, 1).expand([count]))
        with numpyro.plate("n", len(y)):
            numpyro.sample("y", dist.Normal(effect[group], 1), obs=y)

    group = np.array([0, 0, 2, 1, 1, 2])
    target = from_numpyro(model, Y, group)
    assert site(target, "effect").shape == (3,)
    assert len(target.data) == 1
    assert any("group" in n and "constants" in n for n in target.notes)
    z = point(target)
    assert float(target.log_joint(z)) == pytest.approx(reference(model, (Y, group), z, target), rel=1e-5)

    def branch(y):
        loc = numpyro.sample("loc", dist.Normal(0, 1) if y.sum() > 0 else dist.Normal(5, 1))
        numpyro.sample("y", dist.Normal(loc, 1), obs=y)

    target = from_numpyro(branch, jnp.asarray(Y))
    z = point(target)
    assert float(target.log_joint(z)) == pytest.approx(reference(branch, (Y,), z, target), rel=1e-5)
    assert target.data == []


def test_shapes_that_jax_cannot_trace_name_the_cure():
    def model(group):
        numpyro.sample("effect", dist.Normal(0, 1).expand([len(jnp.unique(group))]))

    with pytest.raises(TargetError, match=r"'model'.*Cure: .*numpy instead of jax.numpy"):
        from_numpyro(model, np.array([0, 1]))


def test_double_precision(x64):
    target = from_numpyro(by_rows, Y, X)
    assert target.data[0].dtype == jnp.float32
    z = {"a": jnp.array(0.3), "z": jnp.ones(2)}
    assert target.log_joint(z, {"n": jnp.array([0, 3])}).dtype == jnp.float64


# Minibatches ------------------------------------------------------------------------------------------------------


def by_rows(y, x, n=6):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", n, subsample_size=2) as i:
        z = numpyro.sample("z", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Normal(a * z * x[i], 1), obs=y[i])


def by_subsample(y, x):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Poisson(2.0))
        xs, ys = numpyro.subsample(x, event_dim=0), numpyro.subsample(y, event_dim=0)
        numpyro.sample("y", dist.Normal(a * z * xs, 1), obs=ys)


def by_length(y, x):
    a = numpyro.sample("a", dist.HalfNormal(1))
    with numpyro.plate("n", len(y)):
        with handlers.scale(scale=0.5):
            z = numpyro.sample("z", dist.Gamma(2.0, jnp.ones(2)).to_event(1))
        numpyro.sample("y", dist.Normal(a * z.sum(-1) * x, 1), obs=y)
    numpyro.factor("f", -(a**2))


def by_index(y, x):
    effect = numpyro.sample("effect", dist.Normal(0, 1).expand([6]))
    with numpyro.plate("n", 6) as i:
        numpyro.sample("y", dist.Normal(effect[i] * x[i], 1), obs=y[i])


def scanned(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    rows = numpyro.plate("n", y.shape[1])

    def step(before, now):
        with rows:
            z = numpyro.sample("z", dist.Normal(a * before, 1))
            numpyro.sample("y", dist.Normal(z, 1), obs=now)
        return z, None

    scan(step, jnp.zeros(y.shape[1]), y)


def by_group(data, n):
    effect = numpyro.sample("effect", dist.Normal(0, 1).expand([3]))
    with numpyro.plate("n", n), handlers.scale(scale=0.5):
        numpyro.sample("y", dist.Normal(effect[data["group"]], 1), obs=data["y"])


def grid(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("rows", y.shape[0], dim=-2):
        r = numpyro.sample("r", dist.Normal(a, 1))
        with numpyro.plate("columns", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(r, 1), obs=y)


SUBSAMPLED = {
    "rows": (by_rows, (Y, X), None),
    "subsample": (by_subsample, (Y, X), {"n": 2}),
    "sliced": (by_length, (Y, X), {"n": 3}),
    "single rows": (by_length, (Y, X), {"n": 1}),
    "global by index": (by_index, (Y, X), {"n": 2}),
    "plate inside scan": (scanned, (np.outer(X[:3], Y),), {"n": 2}),
    "dict of arguments": (by_group, ({"y": Y, "group": np.arange(6) % 3}, 6), {"n": 2}),
    "one of two": (grid, (np.outer(Y[:4], X),), {"rows": 2}),
    "two plates": (grid, (np.outer(Y[:4], X),), {"rows": 2, "columns": 3}),
}


@pytest.mark.parametrize("case", SUBSAMPLED)
def test_minibatches_average_to_the_whole(case):
    model, args, sizes = SUBSAMPLED[case]
    target = from_numpyro(model, *args, subsample=sizes)
    assert target.plates
    whole = from_numpyro(model, *args, subsample={p.name: p.size for p in target.plates})
    assert not whole.plates
    z = point(whole)
    parts = [np.random.default_rng(1).permutation(p.size).reshape(-1, p.batch) for p in target.plates]
    values = []
    for chosen in itertools.product(*parts):
        rows = {p.name: jnp.asarray(r) for p, r in zip(target.plates, chosen, strict=True)}
        local = {s.name: jnp.take(z[s.name], rows[s.local[0].name], s.local[1]) for s in target.sites if s.local}
        values.append(float(target.log_joint({**z, **local}, rows)))
    assert np.std(values) > 0
    assert np.mean(values) == pytest.approx(float(whole.log_joint(z)), rel=1e-5)


def test_local_sites_know_their_plate():
    target = from_numpyro(by_length, Y, X, subsample={"n": 3})
    z = site(target, "z")
    assert (z.shape, z.batch_shape, z.scale) == ((6, 2), (3, 2), 2.0)
    assert [p.name for p in target.plates] == ["n"]
    assert site(target, "a").local is None
    assert sum("is sliced along plate 'n'" in n for n in target.notes) == 2
    again = from_numpyro(by_length, 2 * Y, X, subsample={"n": 3})
    assert again.factored.program == target.factored.program
    assert from_numpyro(by_rows, Y, X).site("z").batch_shape == (2,)
    assert from_numpyro(by_rows, Y, X).site("z").shape == (6,)


def test_dynamic_supports_of_local_sites_are_mapped_at_full_size():
    def model(y):
        a = numpyro.sample("a", dist.HalfNormal(1))
        with numpyro.plate("n", len(y)):
            z = numpyro.sample("z", dist.Uniform(0, a))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

    target = from_numpyro(model, Y, subsample={"n": 2})
    assert target.constrain(point(target))["z"].shape == (6,)


def forgets_x(y, x):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", 6) as i:
        numpyro.sample("y", dist.Normal(a * x, 1), obs=y[i])


def standardises(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a, 1), obs=(y - y.mean()) / y.std())


def standardises_rows(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", 6) as i:
        numpyro.sample("y", dist.Normal(a, 1), obs=y[i] - y[i].sum())


def uses_twice(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a, 1), obs=y)
    numpyro.factor("f", -a * y.sum())


def uses_length(y):
    a = numpyro.sample("a", dist.Normal(0, 1 / len(y)))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a, 1), obs=y)


def uses_batch(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", 6) as i:
        numpyro.sample("y", dist.Normal(a, 1 / len(i)), obs=y[i])


def uses_position(y):
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(a * jnp.arange(len(y)), 1), obs=y)


def mixes_rows(y):
    with numpyro.plate("n", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z - z.max(), 1), obs=y)


def leaves_plate(y):
    with numpyro.plate("n", len(y)) as i:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1), obs=y[i])
    numpyro.factor("f", -(z.sum() ** 2))


def outside_plate(y):
    with numpyro.plate("n", 6) as i:
        pass
    z = numpyro.sample("z", dist.Normal(0, 1).expand(i.shape))
    numpyro.sample("y", dist.Normal(z, 1), obs=y[i])


def both_plates(y):
    with numpyro.plate("n", 6, dim=-2), numpyro.plate("m", 2, dim=-1):
        numpyro.sample("z", dist.Normal(0, 1))


SUBSAMPLED_WRONGLY = {
    "unknown plate": (plain, (X, Y), {"rows": 2}, r"plate 'rows'.*\['data'\]"),
    "too large": (plain, (X, Y), {"data": 7}, r"plate 'data'.*7.*1 to 6"),
    "empty": (plain, (X, Y), {"data": 0}, r"plate 'data'.*1 to 6"),
    "partly by rows": (forgets_x, (Y, X), {"n": 2}, "plate 'n'"),
    "whole-data statistics": (standardises, (Y,), {"n": 2}, "plate 'n'"),
    "statistics of rows": (standardises_rows, (Y,), {"n": 2}, "'y'.*other rows"),
    "used outside": (uses_twice, (Y,), {"n": 2}, "plate 'n'.*outside the plate"),
    "length": (uses_length, (Y,), {"n": 2}, "plate 'n'.*number of its rows"),
    "batch size": (uses_batch, (Y,), {"n": 2}, "plate 'n'.*number of its rows"),
    "position": (uses_position, (Y,), {"n": 2}, "'y'.*other rows"),
    "mixed rows": (mixes_rows, (Y,), {"n": 2}, "'y'.*other rows"),
    "latent leaves the plate": (leaves_plate, (Y,), {"n": 2}, "'f'.*minibatch"),
    "latent outside": (outside_plate, (Y,), {"n": 2}, "site 'z'"),
    "two plates": (both_plates, (Y,), {"n": 2, "m": 1}, "site 'z'.*'m' and 'n'"),
}


@pytest.mark.parametrize("case", SUBSAMPLED_WRONGLY)
def test_minibatches_that_would_be_biased_are_refused(case):
    model, args, sizes, match = SUBSAMPLED_WRONGLY[case]
    with pytest.raises(TargetError, match=f"(?s){match}.*Cure: "):
        from_numpyro(model, *args, subsample=sizes)


# Refusals ---------------------------------------------------------------------------------------------------------


def of(body):
    """A model with one good latent and something wrong."""

    def model(y=None):
        body(numpyro.sample("z", dist.Bernoulli(0.5)))

    return model


def twice(z):
    numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("w", dist.Normal(0, 1))


def twice_in_scan(z):
    scan(lambda c, x: (twice(z), None), None, jnp.arange(3))


def nested_scan(z):
    def inner(c, x):
        return numpyro.sample("w", dist.Normal(c, 1)), None

    scan(lambda c, x: (scan(inner, c, None, length=2)[0], None), 0.0, None, length=3)


def param_in_scan(z):
    scan(lambda c, x: (numpyro.param("w", 0.0), None), 0.0, None, length=3)


def hidden(z):
    with handlers.block():
        numpyro.sample("w", dist.Normal(0, 1))


def masked_and_used(z):
    with handlers.mask(mask=False):
        w = numpyro.sample("w", dist.Normal(0, 1))
    numpyro.sample("x", dist.Normal(w, 1), obs=1.0)


def mask_by_latent(z):
    with handlers.mask(mask=z == 1):
        numpyro.sample("w", dist.Normal(0, 1))


def two_sizes(z):
    for n in (2, 3):
        with numpyro.plate("w", n):
            numpyro.sample(f"x{n}", dist.Normal(0, 1))


def plate_around_scan(z):
    with numpyro.plate("w", 2):
        scan(lambda c, x: (c, None), 0.0, None, length=3)


def network(z):
    init, apply = (lambda key, shape: (shape, jnp.zeros(shape))), (lambda p, x: p * x)
    numpyro.module("w", (init, apply), input_shape=(2,))


REFUSED = {
    "param": (lambda z: numpyro.param("w", 0.0), "site 'w'.*numpyro.param"),
    "param in scan": (param_in_scan, "site 'w'.*numpyro.param"),
    "module": (network, r"site 'w\$params'"),
    "mutable": (lambda z: mutable("w", {"value": 1.0}), "site 'w'"),
    "prng_key": (lambda z: numpyro.prng_key(), "prng_key"),
    "no bijection": (lambda z: numpyro.sample("w", dist.ProjectedNormal(jnp.ones(3))), "site 'w'.*bijection"),
    "improper without bijection": (
        lambda z: numpyro.sample("w", dist.ImproperUniform(constraints.sphere, (), (3,))),
        "site 'w'.*bijection",
    ),
    "improper and free": (
        lambda z: numpyro.sample("w", dist.ImproperUniform(constraints.positive, (), ())),
        "site 'w'.*nothing holds",
    ),
    "multinomial": (lambda z: numpyro.sample("w", dist.Multinomial(3, jnp.ones(3) / 3)), "site 'w'.*discrete"),
    "latent bounds": (lambda z: numpyro.sample("w", dist.Binomial(z + 1, 0.5)), "site 'w'.*other latents"),
    "if on a latent": (lambda z: numpyro.factor("f", 1.0 if z == 1 else 0.0), "model.*control flow"),
    "range of a latent": (lambda z: [numpyro.factor(f"f{k}", 1.0) for k in range(z)], "model.*control flow"),
    "duplicate": (twice, "site 'w'.*second"),
    "duplicate in scan": (twice_in_scan, "site 'w'.*second"),
    "nested scan": (nested_scan, "scan, cond or subsampled plate inside a scan"),
    "nested scan with keys": (lambda z: handlers.seed(nested_scan, 0)(z), "site 'w'.*nested"),
    "hidden": (hidden, "hidden by handlers.block"),
    "masked and used": (masked_and_used, "site 'w'.*'x'"),
    "mask by a latent": (mask_by_latent, "site 'w'.*mask"),
    "two sizes": (two_sizes, "plate 'w'.*2 and 3"),
    "complex": (lambda z: numpyro.factor("w", jnp.array(1j)), "'w'.*complex"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case):
    body, match = REFUSED[case]
    with pytest.raises(TargetError, match=f"(?s){match}.*Cure: "):
        from_numpyro(of(body), Y)


def test_no_latents():
    with pytest.raises(TargetError, match=r"'model'.*no latent.*Cure: "):
        from_numpyro(handlers.condition(of(lambda z: None), {"z": jnp.array(1)}))


def test_the_models_own_errors_are_not_hidden():
    def wrong(z):
        assert z.shape == (3,), "mine"

    with pytest.raises(AssertionError, match="mine"):
        from_numpyro(of(wrong), Y)
    with pytest.raises(NotImplementedError, match="control flow"):
        from_numpyro(of(plate_around_scan), Y)


def grouped(group, y):
    with numpyro.plate("groups", 4):
        a = numpyro.sample("a", dist.Bernoulli(0.3))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(1.0 * a[group], 1.0), obs=y)


def test_indices_that_are_arguments_are_read():
    group, y = np.array([0, 3, 1, 1, 2, 0]), np.array([0.1, 1.2, -0.3, 0.4, 2.0, 0.9], np.float32)
    first, second = (from_numpyro(grouped, jnp.asarray(g), y) for g in (group, group[::-1].copy()))
    assert not first.factored.program.losses
    assert first.factored.program == from_numpyro(grouped, group, 2 * y).factored.program
    assert first.factored.program != second.factored.program
    for target, index in ((first, group), (second, group[::-1])):
        z = jnp.array([0, 1, 1, 0], jnp.int32)
        found = target.factored.differences("a", (1 - z)[None], {"a": z}, target.data, target.all_rows())[0]
        signal = target.factored.signal("a", (4,), target.terms({"a": z}))
        for k in range(4):
            own = [norm.logpdf(y[index == k], v) for v in (z[k], 1 - z[k])]
            prior = [np.log([0.7, 0.3])[v] for v in (z[k], 1 - z[k])]
            assert float(found[k]) == pytest.approx(own[1].sum() - own[0].sum() + prior[1] - prior[0], rel=1e-5)
            assert float(signal[k]) == pytest.approx(own[0].sum() + prior[0], rel=1e-5)
    assert from_numpyro(
        grouped, group, y, subsample={"data": 2}
    ).factored.program.losses  # which rows, only a draw tells


def test_indices_are_read_for_discrete_sites_alone():
    """Where nothing is gained for them, a program does not depend on the values of its data."""

    def lost(group, y):
        z = numpyro.sample("z", dist.Bernoulli(0.5).expand([4]).to_event(1))
        alpha = numpyro.sample("alpha", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        numpyro.factor("f", -(jnp.cumsum(z) ** 2).sum())
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(alpha[group], 1.0), obs=y)

    group, y = jnp.array([0, 3, 1, 1, 2, 0]), jnp.ones(6)
    first, second = (from_numpyro(lost, g, y).factored.program for g in (group, group[::-1]))
    assert first == second
    target = hivi.from_log_joint(
        lambda z, data: {"y": dist.Normal(1.0 * z["a"][data], 1.0).log_prob(0.5)},
        {"a": hivi.Latent((4,), dist.constraints.boolean)},
        data=group,
    )
    z = jnp.array([0, 1, 1, 0], jnp.int32)
    found = target.factored.differences("a", (1 - z)[None], {"a": z}, target.data, {})[0]
    rows = np.bincount(np.asarray(group), minlength=4)
    np.testing.assert_allclose(found, rows * (norm.logpdf(0.5, 1 - z) - norm.logpdf(0.5, z)), atol=1e-6)


@pytest.mark.parametrize(("shape", "said"), [((5,), False), ((5, 1), True), ((1,), False), ((), False)])
def test_observations_that_are_broadcast_are_noted(shape, said):
    """As NumPyro does; but (5, 1) under a plate of 5 is seldom meant."""

    def model(y):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        with numpyro.plate("row", 5):
            numpyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=y)

    text = "site 'y': observations of shape (5, 1) are broadcast to (5, 5), as NumPyro does: each counts 5 times"
    assert (text in hivi.explain(hivi.from_numpyro(model, jnp.ones(shape)))) == said
