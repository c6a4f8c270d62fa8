"""Named constructors that the tests share: a new method adds one row and is then held to every property.

Targets are small enough for an exact answer by enumeration (`states`). `perturbed` moves a proposal away from its start,
where flows are the identity and auxiliaries exact, which would hide errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import Beta, Dirichlet, Gamma, Normal, Poisson, constraints

import hivi
from hivi._families.base import AbstractFamily, AbstractProposal
from hivi._families.product import build_proposal
from hivi._space import Latents, Site

# Targets


def pair() -> hivi.Target:
    """Two Bernoullis of the paper's table; normalised."""
    table = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
    return hivi.from_log_joint(lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)})


def triple() -> hivi.Target:
    """Three Bernoullis with an arbitrary, unnormalised table."""
    table = jnp.array([[[0.3, -1.0], [-0.5, 0.9]], [[-1.5, 0.4], [1.1, -0.2]]])

    def log_joint(z: Latents) -> Array:
        return table[z["z"][0], z["z"][1], z["z"][2]]

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((3,), constraints.boolean)})


def chain() -> hivi.Target:
    """Four Bernoullis in a chain, with the factors by name."""
    field = jnp.array([0.3, -0.6, 0.2, 0.8])

    def log_joint(z: Latents) -> dict[str, Array]:
        return {"field": field * z["z"], "link": jnp.where(z["z"][1:] == z["z"][:-1], 0.9, -0.4)}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((4,), constraints.boolean)})


def categorical() -> hivi.Target:
    """Two coupled variables with values 0, 1, 2."""
    table = jnp.array([[0.5, -1.0, 0.2], [-0.7, 1.2, -0.3], [0.1, -0.4, 0.8]])

    def log_joint(z: Latents) -> Array:
        return table[z["z"][0], z["z"][1]]

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((2,), constraints.integer_interval(0, 2))})


def count() -> hivi.Target:
    """One Poisson, with a factor of the shape of a Gamma density."""

    def log_joint(z: Latents) -> dict[str, Array]:
        return {"prior": Poisson(1.3).log_prob(z["z"]), "factor": 1.5 * jnp.log1p(z["z"]) - 0.8 * z["z"]}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((), constraints.nonnegative_integer)})


def counts() -> hivi.Target:
    """Two coupled Poissons: the rate of the second grows with the first."""

    def log_joint(z: Latents) -> dict[str, Array]:
        first, second = z["z"][0], z["z"][1]
        return {"first": Poisson(0.8).log_prob(first), "second": Poisson(0.3 + 0.5 * first).log_prob(second)}

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((2,), constraints.nonnegative_integer)})


def binomial() -> hivi.Target:
    """One count between 0 and 80: too many values to enumerate at every step."""

    def log_joint(z: Latents) -> Array:
        return Beta(9.0, 14.0).log_prob((z["z"] + 0.5) / 81.0)

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((), constraints.integer_interval(0, 80))})


def sites() -> hivi.Target:
    """Three discrete sites of different kinds, coupled."""
    table = jnp.array([[0.4, -0.8, 0.1], [-0.5, 0.7, 0.3]])

    def log_joint(z: Latents) -> dict[str, Array]:
        return {
            "table": table[z["a"][0], z["b"]] - 0.6 * z["a"][0] * z["a"][1],
            "count": Poisson(jnp.exp(0.2 * z["b"] - 0.3 * z["a"][1])).log_prob(z["c"]),
        }

    latents = {
        "a": hivi.Latent((2,), constraints.boolean),
        "b": hivi.Latent((), constraints.integer_interval(0, 2)),
        "c": hivi.Latent((), constraints.nonnegative_integer),
    }
    return hivi.from_log_joint(log_joint, latents)


def mixed() -> hivi.Target:
    """A Bernoulli that chooses the location of two Normals, one of them observed."""

    def log_joint(z: Latents) -> dict[str, Array]:
        location = jnp.where(z["z"] == 1, 1.0, -0.5)
        return {
            "z": jnp.where(z["z"] == 1, 0.4, -0.1),
            "x": Normal(location, 0.7).log_prob(z["x"]),
            "y": Normal(z["x"][0] * z["x"][1], 1.0).log_prob(0.6),
        }

    return hivi.from_log_joint(log_joint, {"z": hivi.Latent((), constraints.boolean), "x": hivi.Latent((2,))})


def normal() -> hivi.Target:
    """A correlated Gaussian in two dimensions."""
    precision = jnp.array([[2.0, -0.9], [-0.9, 1.0]])
    return hivi.from_log_joint(lambda z: -0.5 * z["x"] @ precision @ z["x"], {"x": hivi.Latent((2,))})


def constrained() -> hivi.Target:
    """A positive number and a point on a simplex."""

    def log_joint(z: Latents) -> dict[str, Array]:
        weights = Dirichlet(jnp.array([2.0, 1.5, 3.0])).log_prob(z["w"])
        return {"r": Gamma(3.0, 2.0).log_prob(z["r"]), "w": weights, "link": -z["r"] * z["w"][0]}

    latents = {"r": hivi.Latent((), constraints.positive), "w": hivi.Latent((3,), constraints.simplex)}
    return hivi.from_log_joint(log_joint, latents)


def once(fn: Callable[[], hivi.Target]) -> Callable[[], hivi.Target]:
    """The same target at every call, for each precision: tests share what it cost to trace it."""
    kept: dict[bool, hivi.Target] = {}

    def found() -> hivi.Target:
        double = bool(jax.config.jax_enable_x64)
        if double not in kept:
            kept[double] = fn()
        return kept[double]

    return found


TARGETS: dict[str, Callable[[], hivi.Target]] = {
    fn.__name__: once(fn)
    for fn in (pair, triple, chain, categorical, count, counts, binomial, sites, mixed, normal, constrained)
}


# Families


class Row(NamedTuple):
    """One family of the table, and which sites it takes."""

    family: Any
    discrete: bool = True
    least: int = 1  # sites
    ordered: bool = False  # for counts and long ranges alone

    def takes(self, target: hivi.Target) -> bool:
        """Whether the family can be built for this target."""
        fits = self.discrete or not any(s.discrete for s in target.sites)
        return (
            fits
            and len(target.sites) >= self.least
            and (not self.ordered or any(s.values.ordered for s in target.sites))
        )


def _hierarchical(prior: AbstractFamily, auxiliary: Any = None) -> Row:
    return Row(hivi.Hierarchical(prior=prior, auxiliary=auxiliary))


KINDS = ("planar", "coupling", "maf", "spline")
SHORT = hivi.InverseFlow(layers=1)
NESTED = hivi.Hierarchical(prior=hivi.Flow(layers=1), auxiliary=SHORT)

STRUCTURES: dict[str, dict[str, AbstractFamily]] = {
    "mean-field": {"[az]": hivi.MeanField(), ".*": hivi.MeanField()},
    "backwards": {"[cx]": hivi.MeanField(), ".*": hivi.MeanField()},
    "hvm": {"[az]": hivi.MeanField(), ".*": hivi.Hierarchical(prior=hivi.FullRank())},
    "mixture first": {"[az]": hivi.Mixture(2), ".*": hivi.MeanField()},
}
"""The first group of "backwards" is real where a target has real and discrete sites."""

FAMILIES: dict[str, Row] = {
    "mean-field": Row(hivi.MeanField()),
    "mean-field, free spread": Row(hivi.MeanField(dispersed=True), ordered=True),
    "full-rank": Row(hivi.FullRank(), discrete=False),
    "low-rank": Row(hivi.LowRank(2), discrete=False),
    **{f"flow {k}": Row(hivi.Flow(layers=2, kind=k), discrete=False) for k in KINDS},
    "standardised": Row(hivi.Standardised(hivi.Flow(layers=2, kind="maf")), discrete=False),
    "copula": Row(hivi.Copula()),
    "copula vine": Row(hivi.Copula("vine", levels=2)),
    "copula vine, frank": Row(hivi.Copula("vine", pair="frank")),
    "mixture": Row(hivi.Mixture(2)),
    **{f"hvm {k}": _hierarchical(hivi.Flow(layers=2, kind=k), hivi.InverseFlow(1, k)) for k in KINDS},
    "hvm full-rank, free spread": Row(hivi.Hierarchical(prior=hivi.FullRank(), dispersed=True), ordered=True),
    "hvm planar, free spread": Row(
        hivi.Hierarchical(prior=hivi.Flow(layers=1), auxiliary=SHORT, dispersed=True), ordered=True
    ),
    "hvm planar, linearised": _hierarchical(hivi.Flow(layers=1), hivi.Linearised()),
    "hvm planar, semi-implicit": _hierarchical(hivi.Flow(layers=1), hivi.SemiImplicit()),
    "hvm full-rank": _hierarchical(hivi.FullRank()),
    "hvm low-rank": _hierarchical(hivi.LowRank(1)),
    "hvm copula": _hierarchical(hivi.Copula("vine"), SHORT),
    "hvm full-rank, inverse": _hierarchical(hivi.FullRank(), SHORT),
    "hvm full-rank, semi-implicit": _hierarchical(hivi.FullRank(), hivi.SemiImplicit()),
    "hvm mean-field": _hierarchical(hivi.MeanField(), SHORT),
    "hvm mean-field, linearised": _hierarchical(hivi.MeanField(), hivi.Linearised()),
    "hvm mixture": _hierarchical(hivi.Mixture(2)),
    "hvm mixture, inverse": _hierarchical(hivi.Mixture(2), SHORT),
    "hvm mixture, semi-implicit": _hierarchical(hivi.Mixture(2), hivi.SemiImplicit()),
    "hvm hvm": _hierarchical(NESTED, SHORT),
    "hvm hvm, linearised": _hierarchical(NESTED, hivi.Linearised()),
    "hvm hvm, semi-implicit": _hierarchical(NESTED, hivi.SemiImplicit()),
    "hvm planar, recursive": _hierarchical(hivi.Flow(layers=1), hivi.Recursive(dim=2, layers=1)),
    "hvm full-rank, recursive": _hierarchical(hivi.FullRank(), hivi.Recursive(dim=1, layers=0)),
    "hvm hvm hvm": _hierarchical(hivi.Hierarchical(prior=NESTED, auxiliary=SHORT), SHORT),
    "codes": Row(hivi.Codes(bits=2)),
    **{f"structured {n}": Row(hivi.Structured(groups), least=2) for n, groups in STRUCTURES.items()},
    "product": Row({"[az]": hivi.MeanField(), ".*": _hierarchical(hivi.FullRank()).family}, least=2),
    "product of mixtures": Row({"[az]": hivi.Mixture(2), ".*": hivi.Mixture(3)}, least=2),
}

INNER_REFUSED = frozenset({"hvm mixture", "hvm mixture, semi-implicit"})
"""Families whose extra draws of lambda carry no gradient: `inner > 0` is refused."""

BOUNDS: dict[str, Any] = {
    "elbo": hivi.Elbo(),
    "outer 3": hivi.ImportanceWeighted(outer=3),
    "inner 2": hivi.ImportanceWeighted(outer=1, inner=2),
    "outer 2, inner 2": hivi.ImportanceWeighted(outer=2, inner=2),
}

STRATEGIES: dict[str, Any] = {
    "score": hivi.Score(),
    "local expectation": hivi.LocalExpectation(),
    "difference": hivi.Difference(),
    "enumeration": hivi.Enumeration(),
    "pathwise": hivi.Pathwise(),
}


# What the tests do with them


def perturbed(proposal: AbstractProposal, key: Array, scale: float = 0.2) -> AbstractProposal:
    """The proposal with Gaussian noise added to all its parameters."""
    leaves, tree = jax.tree.flatten(proposal)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        x + scale * jax.random.normal(k, x.shape, x.dtype) if eqx.is_inexact_array(x) else x
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def built(family: str, target: hivi.Target, seed: int = 0, scale: float = 0.2) -> AbstractProposal:
    """A family of the table, built for a target, at perturbed parameters."""
    k1, k2 = jax.random.split(jax.random.key(seed))
    return perturbed(build_proposal(FAMILIES[family].family, target.sites, k1), k2, scale)


def values(site: Site, most: int = 13) -> np.ndarray:
    """Every value of one coordinate of a discrete site; the first `most` of an infinite support."""
    return site.values.low + np.arange(site.values.count or most)


def states(discrete: tuple[Site, ...], most: int = 13) -> dict[str, Array]:
    """Every joint value of discrete sites: site -> array with a leading axis over the joint values."""
    axes = [values(s, most) for s in discrete for _ in range(int(np.prod(s.shape)))]
    grid = np.array(list(itertools.product(*axes)), np.int32).reshape(-1, len(axes))
    out, start = {}, 0
    for s in discrete:
        stop = start + int(np.prod(s.shape))
        out[s.name] = jnp.asarray(grid[:, start:stop].reshape(-1, *s.shape))
        start = stop
    return out


def total(terms: Mapping[str, Array], scales: Mapping[str, float] | None = None) -> Array:
    """log q: the sum of its terms."""
    return sum(((scales or {}).get(n, 1.0) * jnp.sum(t) for n, t in terms.items()), jnp.zeros(()))


def quick(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` that spends little time on optimisation: the tests compile much and compute little.

    Without the YNN fusions of XLA's CPU backend, which in jaxlib 0.10.2 give wrong numbers (jax-ml/jax#39103).
    """
    options = {
        "xla_backend_optimization_level": "0",
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_experimental_ynn_fusion_type": "",
    }
    return jax.jit(fn, compiler_options=options)
