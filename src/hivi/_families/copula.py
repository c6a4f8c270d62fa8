"""Copulas: any marginals, and their dependence apart (Tran, Blei & Airoldi 2015), for sites of any kind."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._bijections import monotone
from hivi._dependence import AbstractDependence, GaussianDependence, VineDependence
from hivi._errors import FamilyError, message, require_positive
from hivi._families.base import AbstractFamily, AbstractProposal, Coordinates, Layout, gaussian_density, gaussian_terms
from hivi._families.latent_copula import latent
from hivi._families.reverse import AbstractReverse, BandedReverse, DenseReverse
from hivi._margins import Margins
from hivi._pairs import FrankPair, GaussianPair
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree

KINDS = ("gaussian", "vine")
PAIRS = {"gaussian": GaussianPair(), "frank": FrankPair()}
AHEAD = 6
"""How many values after its own a latent Gaussian of a vine is told of by r."""


class Copula(AbstractFamily):
    """Marginals of their own for every coordinate, tied by a copula; continuous, discrete and mixed sites.

    Dependent standard normals m ~ copula. A continuous coordinate, in unconstrained space, is z_i = location_i + scale_i
    S_i(m_i) with S_i a monotone spline that starts at the identity: the density is exact. A discrete coordinate is the
    value z_i whose thresholds Phi^-1(F_i(z_i - 1)), Phi^-1(F_i(z_i)) enclose e_i = sqrt(1 - sigma_i^2) m_i + sigma_i delta_i,
    delta_i ~ N(0, 1): its marginal is exactly F_i, and with delta integrated out

        q(z_i | m_i) = Phi((b_i - sqrt(1-sigma_i^2) m_i) / sigma_i) - Phi((a_i - sqrt(1-sigma_i^2) m_i) / sigma_i),

    so that the copula is a hierarchical model with lambda = m (eq. 5), whose local gradients are those of any other.

    Args:
        kind: "gaussian", any correlation matrix, O(D^2); or "vine", a D-vine over the order of the coordinates, O(levels D).
        levels: of a vine: number of trees, at least 1; D - 1 keep every dependence. Not used for "gaussian".
        pair: of a vine: "gaussian" or "frank" pair copulas. Frank's has no dependence in the tails.
        scale: standard deviation of continuous coordinates at the start.
        spread: sigma of discrete coordinates at the start, between 0.05 and 1. As it falls, q can hold more dependence.

    Raises:
        FamilyError: when it is built, for an unknown kind or pair, or a number out of its range.

    Example:
        >>> import hivi
        >>> hivi.Copula("vine", levels=2).levels
        2

    Source: Tran, Blei & Airoldi (2015), Copula variational inference; Pitt, Chan & Kohn (2006) for discrete marginals.
    """

    kind: Literal["gaussian", "vine"] = "gaussian"
    levels: int = 1
    pair: Literal["gaussian", "frank"] = "gaussian"
    scale: float = 0.1
    spread: float = 0.7

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        k1, k2 = jax.random.split(key)
        dim = Layout(sites).dim
        real = tuple(s for s in sites if not s.discrete)
        dependence = self._dependence(dim)
        margins = self._margins(Layout(real).dim, k1) if real else None
        if margins is not None and len(real) == len(sites):
            return CopulaProposal(sites, dependence, margins)
        reverse = self._reverse(dim)
        return latent(sites, dependence, margins, reverse, self.spread, k2)

    def _margins(self, dim: int, key: Key) -> Margins:
        location = 0.01 * jax.random.normal(key, (dim,))
        return Margins(location, jnp.full(dim, jnp.log(self.scale)), monotone(dim))

    def _reverse(self, dim: int) -> AbstractReverse:
        if self.kind == "gaussian":
            return DenseReverse(jnp.zeros((dim, dim)), jnp.zeros((dim, dim)))
        ahead = min(AHEAD, dim - 1)
        before, after = jnp.zeros((min(self.levels, dim), dim)), jnp.zeros((ahead + 1, dim))
        return BandedReverse(before, after, jnp.zeros((ahead, dim)))

    def _dependence(self, dim: int) -> AbstractDependence:
        if self.kind == "gaussian":
            return GaussianDependence(jnp.zeros((dim, dim)))
        return VineDependence(jnp.zeros((min(self.levels, max(dim - 1, 1)), dim)), PAIRS[self.pair])

    def __check_init__(self) -> None:
        wrong = [
            (self.kind not in KINDS, "kind", repr(self.kind), "'gaussian' or 'vine'", "choose one of them"),
            (self.pair not in PAIRS, "pair", repr(self.pair), "'gaussian' or 'frank'", "choose one of them"),
            (
                self.kind == "gaussian" and self.pair != "gaussian",
                "pair",
                repr(self.pair),
                "a vine",
                'use Copula("vine", ...)',
            ),
            (self.levels < 1, "levels", repr(self.levels), "at least 1", "use MeanField() for no dependence"),
            (not 0.05 < self.spread < 1, "spread", repr(self.spread), "between 0.05 and 1", "0.7 is usual"),
        ]
        for bad, name, found, expected, cure in wrong:
            if bad:
                raise FamilyError(message(f"Copula({name}=...)", found, expected, cure))
        require_positive("Copula(scale=...)", self.scale, "0.1 is usual")


class CopulaProposal(AbstractProposal):
    """A copula over continuous sites: exact, z = T(g(u)), u ~ N(0, I)."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    dependence: AbstractDependence
    margins: Margins

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        base = jax.random.normal(key, self.margins.location.shape)
        value, log_det = self.from_coordinates(base)
        return value, (base, log_det)

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return gaussian_terms(self.coordinates(z, context))

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return gaussian_density(self.coordinates(z, None))

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        if context is not None:
            return Coordinates(context[0], -context[1])
        m, outer = self.margins.back(Layout(self.sites).flatten(value))
        base, inner = self.dependence.decouple(m)
        return Coordinates(base, inner + outer)

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        m, inner = self.dependence.couple(base)
        flat, outer = self.margins.onward(m)
        return Layout(self.sites).unflatten(flat), inner + outer

    def density_at(self, base: Float[Array, " dim"], key: Key) -> tuple[Latents, Array, Array]:
        value, log_det = self.from_coordinates(base)
        return value, log_det, jnp.sum(Normal(0.0, 1.0).log_prob(base)) - log_det

    def affine(self) -> tuple[Array, Array]:
        return self.margins.location, jnp.exp(self.margins.log_scale)

    def recentre(self, location: Array, scale: Array) -> CopulaProposal:
        return CopulaProposal(self.sites, self.dependence, Margins(location, jnp.log(scale), self.margins.splines))
