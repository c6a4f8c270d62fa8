"""A family in standardised coordinates: z = m + L u, with N(m, LL') the best Gaussian and u from any continuous family."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message
from hivi._families.base import AbstractFamily, AbstractProposal, Coordinates, Layout, require_real
from hivi._families.flow import Flow
from hivi._space import Latents, Site, Values
from hivi._tree import Key, PyTree, held

LANDING_LIMIT = 64
"""Up to so many coordinates the Jacobian of the inner family is worth its cost in every step."""
BASE = "u"
"""Name of the single site of the inner family: the flat vector of standardised coordinates."""


class Standardised(AbstractFamily):
    """z = m + L u: `fit` first finds the best Gaussian N(m, LL'), then fits another family to u.

    The Gaussian needs no step size and no iteration count: natural-gradient steps on the bound over fixed draws, from several
    places (see `hivi._fit.gaussian_start`). It removes location, scale and linear dependence, so that one learning rate suits
    every posterior, and the inner family has only the shape left to learn. m and L stay where they are during the fit.

    The start is found where the family covers all sites of a target that is used whole (no minibatches); elsewhere u is z.

    Args:
        family: any continuous family over u, which starts at the standard normal; None takes a flow of three masked
            autoregressive layers (of splines, for a single coordinate).

    Example:
        >>> import hivi
        >>> hivi.Standardised(hivi.Flow(layers=2, kind="spline")).family.layers
        2
    """

    family: AbstractFamily | None = None

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        require_real("Standardised", sites)
        dim = Layout(sites).dim
        family = Flow(layers=3, kind="maf" if dim > 1 else "spline") if self.family is None else self.family
        inner = family.build((Site(BASE, (dim,), Values("real"), (dim,)),), key)
        try:
            inner.recentre(jnp.zeros(dim), jnp.ones(dim))
        except FamilyError as error:
            cure = "use Flow(), FullRank(), Mixture(), Copula() or LowRank()"
            found = f"{type(family).__name__}, which has no location and scale"
            raise FamilyError(message("Standardised(family=...)", found, "a continuous family", cure)) from error
        return StandardisedProposal(sites, inner, jnp.zeros(dim), jnp.eye(dim))


class StandardisedProposal(AbstractProposal):
    """The inner proposal over u, and the Gaussian: mean m (D,) and Cholesky factor L (D, D), which get no gradient."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    inner: AbstractProposal
    location: Float[Array, " dim"]
    factor: Float[Array, "dim dim"]

    def _out(self, base: Latents) -> Latents:
        return Layout(self.sites).unflatten(held(self.location) + jnp.tril(held(self.factor)) @ base[BASE])

    def _in(self, z: Latents) -> Latents:
        flat = Layout(self.sites).flatten(z) - held(self.location)
        return {BASE: jax.scipy.linalg.solve_triangular(held(self.factor), flat, lower=True)}

    @property
    def _log_det(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(held(self.factor)))))

    @property
    def branches(self) -> int:
        return self.inner.branches

    def log_weights(self) -> Float[Array, " branches"]:
        return self.inner.log_weights()

    def score_weight(self, inner: int) -> float:
        return self.inner.score_weight(inner)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        base, context = self.inner.propose(key, branch)
        return self._out(base), (base, context)

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        base, within = context
        return {**self.inner.log_q(base, within, key, inner), "q(factor)": -self._log_det}

    def landable(self, site: str) -> bool:
        return self.inner.landable(BASE) and any(s.name == site for s in self.sites)

    @property
    def lands(self) -> bool:
        return self.location.shape[0] <= LANDING_LIMIT

    @property
    def learning_rate(self) -> float:
        return 0.002

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        terms = self.inner.landed(context[0], context[1], frozenset({BASE}))
        return {**terms, "q(factor)": -self._log_det}

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return self.inner.log_density(self._in(z), key, samples) - self._log_det

    def started(self, search: Callable[[], tuple[Array, Array]]) -> StandardisedProposal:
        location, factor = search()
        dim = location.shape[0]
        inner = self.inner.recentre(jnp.zeros(dim), jnp.ones(dim))
        return StandardisedProposal(self.sites, inner, location, factor)

    def recentre(self, location: Array, scale: Array) -> StandardisedProposal:
        return self.started(lambda: (location, jnp.diag(scale)))

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        base, within = (self._in(value), None) if context is None else context
        point = self.inner.coordinates(base, within)
        return Coordinates(point.base, point.log_det - self._log_det)

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        value, log_det = self.inner.from_coordinates(base)
        return self._out(value), log_det + self._log_det
