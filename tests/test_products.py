"""Where a latent enters through a matrix product, one colour updates the product instead of computing it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jaxtyping import Array

import hivi
from cases import quick
from hivi._factored import Factored, factorise

ROWS, TOPICS, WORDS = 3, 4, 5
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.gamma(1.0, 1.0, (TOPICS, WORDS)), jnp.float32)
DEEP = jnp.asarray(RNG.normal(size=(ROWS, TOPICS, WORDS)), jnp.float32)
X = jnp.asarray(RNG.poisson(2.0, (ROWS, WORDS)), jnp.float32)


def likelihood(eta: Array) -> Array:
    return X * jnp.log(eta + 0.1) - eta


USED: dict[str, Callable[[Array], Any]] = {
    "poisson": lambda z: likelihood(z @ W),
    "with a prior": lambda z: likelihood(z @ W).sum() - jax.lax.lgamma(z + 1.0).sum(),
    "from the left": lambda z: likelihood((W.T @ z.T).T),
    "a function of the latent": lambda z: likelihood(jnp.sqrt(z + 1.0) @ W),
    "one matrix a row": lambda z: jnp.sin(jnp.einsum("rk,rkv->rv", z, DEEP)),
    "every matrix for every row": lambda z: jnp.sin(jnp.einsum("sk,rkv->rsv", z, DEEP)),
    "some of the columns": lambda z: likelihood(z[:, 1:] @ W[1:]),
    "columns backwards": lambda z: likelihood(z[:, ::-1] @ W),
    "every other column": lambda z: likelihood(z[:, 1::2] @ W[:2]),
    "blocks of columns": lambda z: likelihood(z[:, :2] @ W[:2]).sum() + jnp.sin(z[:, 2:] @ W[2:]).sum(),
    "blocks that share a column": lambda z: likelihood(z[:, :2] @ W[:2]).sum() + jnp.sin(z[:, 1:3] @ W[2:]).sum(),
    "neighbours in rows": lambda z: jnp.cos((z[1:] @ W) * (z[:-1] @ W)),
    "rows that share a term": lambda z: likelihood(z @ W).sum() + jnp.where(z[1:] == z[:-1], 1.0, 0.2).sum(),
    "twice": lambda z: likelihood(z @ W) + jnp.sin((z * 2) @ W),
    "two layers": lambda z: jnp.tanh(jnp.tanh(z @ W - 3.0) @ W.T),
    "held where it may be infinite": lambda z: jnp.tanh(jax.lax.clamp(-9.0, jnp.log(z * 1.0), 9.0) @ W),
    "integers": lambda z: jnp.sqrt((z @ jnp.arange(TOPICS * 2).reshape(TOPICS, 2)) + 1.0),
}
MIXED = {
    "counts": (hivi.Mixture(3), dist.constraints.nonnegative_integer),
    "free spread": (hivi.Mixture(3, dispersed=True), dist.constraints.nonnegative_integer),
    "categories": (hivi.Mixture(3), dist.constraints.integer_interval(0, 3)),
    "bits": (hivi.Mixture(3), dist.constraints.boolean),
}
UNUSED: dict[str, Callable[[Array], Any]] = {
    "perhaps infinite": lambda z: jnp.tanh(jnp.log(z * 1.0) @ W),  # -inf at 0, and finite after a move
    "both operands": lambda z: jnp.sin(z @ z.T),
    "mixed before": lambda z: jnp.sin(jnp.cumsum(z, 1) @ W),
    "normalised before": lambda z: jnp.sin(jax.nn.softmax(z * 1.0, 1) @ W),
    "along rows": lambda z: jnp.sin(jax.nn.one_hot(z.sum(1), WORDS) @ W.T),
}


def traced(fn: Callable[[Array], Any], z: Array) -> Factored:
    return factorise(lambda z: {"log p": jnp.asarray(fn(z["z"]), jnp.float32)}, {"z": z})


def updated(factored: Factored, z: Array) -> int:
    """How many products are updated."""
    program = factored.program
    keep = program.groups("z", z.shape, program.touching("z"))
    count = 0
    for group in keep:
        part, used = program.restrict(group)
        position = sum(used[: len(factored.consts)])
        count += len(part.moves("z", position, z.shape).plan.products)
    return count


def brute(fn: Callable[[Array], Any], z: Array, moved: Array) -> np.ndarray:
    whole = quick(lambda z: jnp.sum(fn(z)))
    right = np.zeros(moved.shape)
    for m, *index in np.ndindex(moved.shape):
        right[(m, *index)] = whole(z.at[tuple(index)].set(moved[(m, *index)])) - whole(z)
    return right


@pytest.mark.parametrize("name", [*USED, *UNUSED])
def test_differences_are_those_of_direct_evaluation(name):
    fn = {**USED, **UNUSED}[name]
    z = jnp.asarray(RNG.integers(0, 4, (ROWS, TOPICS)), jnp.int32)
    moved = jnp.stack([z + 1, jnp.maximum(z - 1, 0), jnp.asarray(RNG.integers(0, 9, z.shape), jnp.int32)])
    factored = traced(fn, z)
    assert (updated(factored, z) > 0) == (name in USED)
    found = quick(lambda z, moved: factored.differences("z", moved, {"z": z}))(z, moved)
    np.testing.assert_allclose(found, brute(fn, z, moved), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", MIXED)
def test_a_mixtures_density_is_updated(name):
    """Each component's sum over coordinates changes by one coordinate's part."""
    family, support = MIXED[name]
    sites = hivi.from_log_joint(lambda z: 0.1 * z["z"].sum(), {"z": hivi.Latent((2, 3), support)}).sites
    proposal = family.build(sites, jax.random.key(0))
    z = jax.random.randint(jax.random.key(1), (2, 3), 0, 2)
    factored = factorise(lambda v: {"q": proposal.log_density(v, jax.random.key(0))}, {"z": z})
    assert updated(factored, z) == 1
    found = factored.differences("z", (1 - z)[None], {"z": z})[0]
    for at in np.ndindex(2, 3):
        there = z.at[at].set(1 - z[at])
        right = sum(s * proposal.log_density({"z": v}, jax.random.key(0)) for s, v in ((1.0, there), (-1.0, z)))
        assert float(found[at]) == pytest.approx(float(right), abs=1e-5)


def test_draws_are_batched():
    z = jnp.asarray(RNG.integers(0, 4, (6, ROWS, TOPICS)), jnp.int32)
    factored = traced(USED["with a prior"], z[0])
    found = quick(jax.vmap(lambda z: factored.differences("z", (z + 1)[None], {"z": z})))(z)
    one = quick(lambda z: factored.differences("z", (z + 1)[None], {"z": z}))
    np.testing.assert_allclose(found, jnp.stack([one(x) for x in z]), rtol=1e-5, atol=1e-5)


def test_factors_of_few_colours_do_not_wait_for_those_of_many():
    z = jnp.zeros((ROWS, TOPICS), jnp.int32)
    program = traced(USED["with a prior"], z).program
    few, many = program.groups("z", z.shape, program.touching("z"))
    assert [program.factors[k].shape for k in few] == [(ROWS, TOPICS)]
    assert {program.factors[k].shape for k in many} == {(ROWS, WORDS)}


def test_a_numpyro_model_updates_its_product():
    def model(x: Array) -> None:
        with numpyro.plate("rows", ROWS):
            z = numpyro.sample("z", dist.Poisson(jnp.ones(TOPICS)).to_event(1))
            numpyro.sample("x", dist.Poisson(z @ W + 0.1).to_event(1), obs=x)

    target = hivi.from_numpyro(model, X.astype(int))
    z = {"z": jnp.asarray(RNG.integers(0, 4, (ROWS, TOPICS)), jnp.int32)}
    program = target.factored.program
    _, many = program.groups("z", (ROWS, TOPICS), program.touching("z"))
    part, used = program.restrict(many)
    plan = part.moves("z", sum(used[: len(target.factored.consts)]), (ROWS, TOPICS)).plan
    assert len(plan.products) == 1
    assert "dot_general" not in [e.primitive.name for e in plan.early]
    # what depends on the data alone is evaluated once
    assert "lgamma" not in [e.primitive.name for e in plan.late]
    found = target.factored.differences("z", (z["z"] + 1)[None], z, target.data, target.all_rows())
    right = brute(lambda v: target.log_joint({"z": v}), z["z"], (z["z"] + 1)[None])
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-4)
