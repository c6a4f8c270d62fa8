"""Normalizing flow over continuous sites (Rezende & Mohamed 2015), or over lambda as a variational prior."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._bijections import backward, forward, near_identity, require_flow
from hivi._errors import require_positive
from hivi._families.base import (
    AbstractFamily,
    AbstractProposal,
    Coordinates,
    Layout,
    gaussian_density,
    gaussian_terms,
    require_real,
)
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree, held, value_zero


class Flow(AbstractFamily):
    """z = location + scale * g(epsilon), epsilon ~ N(0, I), g a normalizing flow that starts at the identity.

    Args:
        layers: flow length K, at least 1; the cost of a draw is O(K D) for planar flows.
        kind: "planar", "coupling", "maf" or "spline" (see FlowJAX).
        scale: standard deviation at the start, before any fit.

    Example:
        >>> import hivi
        >>> hivi.Flow(layers=2, kind="coupling").layers
        2
    """

    layers: int = 8
    kind: str = "planar"
    scale: float = 0.1

    def __check_init__(self) -> None:
        require_flow("Flow", self.kind, self.layers)
        require_positive("Flow(scale=...)", self.scale, "0.1 is usual")

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        require_real("Flow", sites)
        dim = Layout(sites).dim
        k1, k2 = jax.random.split(key)
        bijection = near_identity(self.kind, dim, self.layers, k1)
        location = 0.01 * jax.random.normal(k2, (dim,))
        return FlowProposal(sites, location, jnp.full(dim, jnp.log(self.scale)), bijection, self.kind)


class FlowProposal(AbstractProposal):
    """Parameters of a flow: location and log scale, shape (D,), and a FlowJAX bijection."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    location: Float[Array, " dim"]
    log_scale: Float[Array, " dim"]
    bijection: AbstractBijection
    kind: str = eqx.field(static=True)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        base = jax.random.normal(key, self.location.shape)
        value, log_det = self.from_coordinates(base)
        return value, (base, log_det)

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return gaussian_terms(self.coordinates(z, context))

    def landable(self, site: str) -> bool:
        # The derivatives of a steep spline are too noisy in single precision.
        return self.kind != "spline" and any(s.name == site for s in self.sites)

    def landed(self, z: Latents, context: PyTree, sites: frozenset[str]) -> dict[str, Array]:
        """A planar flow by its inverse; others, whose inverse runs coordinate by coordinate, by their Jacobian.

        With z = f(e) and J its Jacobian, grad_z log q(z) = J^-T grad_e [log N(e) - log |det J(e)|] (Vaitl et al. 2022).
        """
        fixed = held(self)
        if self.kind == "planar":
            return gaussian_terms(fixed.coordinates(z, None))
        layout, (base, log_det) = Layout(self.sites), jax.lax.stop_gradient(context)

        def value(e: Array) -> Array:
            return layout.flatten(fixed.from_coordinates(e)[0])

        def log_q(e: Array) -> Array:
            return jnp.sum(Normal(0.0, 1.0).log_prob(e)) - fixed.from_coordinates(e)[1]

        slope = jnp.linalg.solve(jax.jacfwd(value)(base).T, jax.grad(log_q)(base))
        moved = jnp.sum(jax.lax.stop_gradient(slope) * value_zero(layout.flatten(z)))
        return gaussian_terms(Coordinates(base, moved - log_det))

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return gaussian_density(self.coordinates(z, None))

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        if context is not None:
            return Coordinates(context[0], -context[1])
        flat = (Layout(self.sites).flatten(value) - self.location) * jnp.exp(-self.log_scale)
        base, log_det = backward(self.bijection, flat)
        return Coordinates(base, log_det - jnp.sum(self.log_scale))

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        flat, log_det = forward(self.bijection, base)
        value = Layout(self.sites).unflatten(self.location + jnp.exp(self.log_scale) * flat)
        return value, log_det + jnp.sum(self.log_scale)

    def density_at(self, base: Float[Array, " dim"], key: Key) -> tuple[Latents, Array, Array]:
        value, log_det = self.from_coordinates(base)
        return value, log_det, jnp.sum(Normal(0.0, 1.0).log_prob(base)) - log_det

    def affine(self) -> tuple[Array, Array]:
        return self.location, jnp.exp(self.log_scale)

    def recentre(self, location: Array, scale: Array) -> FlowProposal:
        return FlowProposal(self.sites, location, jnp.log(scale), self.bijection, self.kind)

    def centres(self) -> PyTree:
        rest = jax.tree.map(lambda _: False, self)
        return eqx.tree_at(lambda p: (p.location, p.log_scale), rest, (True, True))

    def roles(self) -> PyTree:
        return eqx.tree_at(lambda p: p.location, jax.tree.map(lambda _: "free", self), "natural")

    def precondition(self, rule: Callable[[Array], Array]) -> FlowProposal:
        return FlowProposal(self.sites, rule(self.location), self.log_scale, self.bijection, self.kind)
