"""Which arrays lie along which axis of a device mesh."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.sharding import Mesh

import hivi
from hivi._families.product import build_proposal
from hivi._fit.parallel import distribute

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def mesh(*names: str) -> Mesh:
    """Two devices on the first axis."""
    return Mesh(np.array(jax.devices()[:2]).reshape(2, *[1] * (len(names) - 1)), names)


def spec(x: Any) -> tuple[str | None, ...]:
    """The mesh axis of every axis of an array."""
    found = tuple(x.sharding.spec)
    return found + (None,) * (x.ndim - len(found))


def crossed(y: Any, x: Any, w: Any, v: Any) -> None:
    """Two plates of equal size, and a global site and an array of that length too."""
    weights = numpyro.sample("weights", dist.Normal(jnp.zeros(8), 1).to_event(1))
    rows, columns = numpyro.plate("i", 8, dim=-2), numpyro.plate("j", 8, dim=-1)
    with rows:
        a = numpyro.sample("a", dist.Normal(w[:, None], 1))
        numpyro.sample("untouched", dist.Bernoulli(0.5))
    with columns:
        b = numpyro.sample("b", dist.Normal(x @ weights, 1))
    with rows, columns:
        numpyro.sample("y", dist.Normal(a + b + v.sum(), 1), obs=y)


def crossed_target() -> hivi.Target:
    """Its arrays, in the order of their names: v, w, x, y."""
    y, x, w, v = RNG.normal(size=(8, 8)), RNG.normal(size=(8, 8)), RNG.normal(size=8), RNG.normal(size=8)
    return hivi.from_numpyro(crossed, y=y, x=x, w=w, v=v)


@pytest.mark.parametrize(
    ("axes", "lam", "data"),
    [
        (
            ("i",),
            {"a": ("i", None, None), "untouched": ("i", None, None)},
            [(None,), ("i",), (None, None), ("i", None)],
        ),
        (("j",), {"b": ("j", None)}, [(None,), (None,), ("j", None), (None, "j")]),
        (
            ("i", "j"),
            {"a": ("i", None, None), "untouched": ("i", None, None), "b": ("j", None)},
            [(None,), ("i",), ("j", None), ("i", "j")],
        ),
    ],
)
def test_plates_of_equal_size_are_told_apart_by_name(axes, lam, data) -> None:
    target = crossed_target()
    proposal, placed = distribute(build_proposal(hivi.MeanField(), target.sites, KEY), target, mesh(*axes))
    parameters = proposal.parameters()
    assert {name: spec(x) for name, x in parameters.items() if any(spec(x))} == lam
    assert [spec(x) for x in placed.data] == data


def test_plates_of_equal_size_give_the_same_fit() -> None:
    options: dict[str, Any] = {"key": KEY, "steps": 100, "samples": 4, "progress": False}
    target = crossed_target()
    one = hivi.fit(target, hivi.MeanField(), **options)
    two = hivi.fit(target, hivi.MeanField(), mesh=mesh("i", "j"), **options)
    assert two.history["elbo"] == pytest.approx(one.history["elbo"], rel=1e-4)


@pytest.mark.parametrize("by_hand", [True, False], ids=["own rows", "sliced arguments"])
@pytest.mark.parametrize("family", [hivi.MeanField(), hivi.Hierarchical(hivi.MeanField())], ids=["mean-field", "rows"])
def test_rows_of_a_subsampled_plate_lie_apart(family, by_hand) -> None:
    def model(y: Any, x: Any, other: Any) -> None:
        scale = numpyro.sample("scale", dist.Normal(jnp.zeros(16), 1).to_event(1))
        numpyro.factor("other", -jnp.sum((scale - other) ** 2))
        with numpyro.plate("n", 16) as n:
            member = numpyro.sample("member", dist.Bernoulli(0.3))
            rows, seen = (x[n], y[n]) if by_hand else (x, y)
            numpyro.sample("y", dist.Normal(scale[0] * member + rows @ scale, 1), obs=seen)

    data = RNG.normal(size=16), RNG.normal(size=(16, 16)), RNG.normal(size=16)
    target = hivi.from_numpyro(model, *data, subsample={"n": 4})
    proposal, placed = distribute(build_proposal(family, target.sites, KEY), target, mesh("n"))
    assert [spec(x) for x in placed.data] == [("n",), ("n", None), (None,)]
    for path, x in jax.tree_util.tree_leaves_with_path(eqx.filter(proposal, eqx.is_array)):
        own = "rows" in jax.tree_util.keystr(path) or "member" in jax.tree_util.keystr(path)
        assert any(spec(x)) == own
        assert spec(x)[0] == ("n" if own else None)
