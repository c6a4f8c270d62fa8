"""An auxiliary that is itself hierarchical: r(lambda|z) = integral of r(lambda|z,nu) r(nu|z) d nu (the recursive r)."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._bijections import backward, forward
from hivi._errors import require_count
from hivi._families.auxiliary import (
    LAM,
    AbstractAuxiliary,
    AbstractAuxiliaryState,
    InverseFlow,
    Link,
    RegressionState,
    Whitened,
    prior_terms,
    solve_transposed,
)
from hivi._families.base import AbstractProposal
from hivi._likelihood import likelihood
from hivi._space import Latents
from hivi._tree import Key, PyTree

START = 0.1
"""Standard deviation of the loadings at the start: at zero, they would have no gradient."""


class Recursive(AbstractAuxiliary):
    """r(lambda|z) = integral of r(lambda|z,nu) r(nu|z) d nu, bounded through a third distribution s(nu|lambda,z).

    The auxiliary of the auxiliary (section 3.2 of the paper: "recursive"; as deep as Salimans, Kingma & Welling 2015 go):

        log r(lambda|z) >= E_s(nu|lambda,z) [log r(lambda|z,nu) + log r(nu|z) - log s(nu|lambda,z)],

    so that the bound of eq. 5 stays a bound, and `log q(lambda) - log r(lambda,nu|z) + log s(nu|lambda,z)` stays properly
    weighted over (lambda, nu). r(lambda|z,nu) is the regression and inverse flow of `InverseFlow`, whose mean and log scale
    also depend linearly on nu: the coordinates of lambda are dependent given z, beyond what the flow does.
    s starts at the exact posterior of nu for the linear part. r no longer splits by z_i: exact local expectations
    of discrete sites cost as many evaluations as they have coordinates.

    Args:
        dim: size of nu, at least 1.
        layers: length of the inverse flow; 0 for none.
        kind: "planar", "coupling", "maf" or "spline".

    Example:
        >>> import hivi
        >>> hivi.Hierarchical(prior=hivi.FullRank(), auxiliary=hivi.Recursive(dim=2, layers=1)).auxiliary.dim
        2
    """

    dim: int = 2
    layers: int = 8
    kind: str = "planar"

    def __check_init__(self) -> None:
        require_count("Recursive(dim=...)", self.dim, "correct the number")

    def build(self, link: Link, prior: AbstractProposal, key: Key) -> AbstractAuxiliaryState:
        k1, k2 = jax.random.split(key)
        inner = InverseFlow(self.layers, self.kind).build(link, prior, k1)
        load = START * jax.random.normal(k2, (link.dim, self.dim))
        centre = {}
        for s in link.sites:
            features = jax.eval_shape(likelihood(s).features, s.example()).shape
            centre[s.name] = jnp.zeros((*features, self.dim))
        zeros = jnp.zeros((link.dim, self.dim))
        return RecursiveState(link, inner, load, zeros, centre, zeros.T, jnp.zeros(self.dim))


class Point(NamedTuple):
    """What r knows of lambda without nu.

    Attributes:
        standard: lambda_0 in units of r's mean and scale at nu = 0, flat.
        log_det: log |d standard / d lambda|.
    """

    standard: Float[Array, " dim"]
    log_det: Float[Array, ""]


class RecursiveState(AbstractAuxiliaryState):
    """phi: the regression and the flow, what nu does to them, r(nu|z), and s(nu|lambda,z).

    Attributes:
        inner: the auxiliary at nu = 0.
        load: effect of nu on the standardised lambda_0.
        tilt: effect of nu on its log scale.
        centre: site -> weights of r(nu|z)'s mean on the features of each coordinate.
        residual: of s's mean on the standardised lambda_0, beyond the linear posterior.
        log_scale: of s, beyond that of the linear posterior.
    """

    link: Link = eqx.field(static=True)
    inner: RegressionState
    load: Float[Array, "dim nu"]
    tilt: Float[Array, "dim nu"]
    centre: dict[str, Array]
    residual: Float[Array, "nu dim"]
    log_scale: Float[Array, " nu"]

    def _mean(self, z: Latents) -> Float[Array, " nu"]:
        """Of r(nu|z)."""
        out = jnp.zeros(self.log_scale.shape)
        for s in self.link.sites:
            features = likelihood(s).features(z[s.name])[..., None]
            out = out + jnp.sum(features * self.centre[s.name], range(features.ndim - 1))
        return out

    def _s(self, standard: Array, mean: Array) -> tuple[Array, Array]:
        """Mean of s(nu|lambda,z), and the Cholesky factor of its precision before `log_scale`."""
        root = jnp.linalg.cholesky(jnp.eye(mean.shape[0]) + self.load.T @ self.load)
        linear = jax.scipy.linalg.cho_solve((root, True), self.load.T @ (standard - self.load @ mean))
        return mean + linear + self.residual @ standard, root

    def _log_s(self, base: Array, root: Array) -> Array:
        return jnp.sum(Normal(0.0, 1.0).log_prob(base) - self.log_scale + jnp.log(jnp.diagonal(root)))

    def _log_r(self, standard: Array, nu: Array, mean: Array) -> tuple[Array, Array]:
        """Terms of log r(standard|z,nu), one per coordinate, and log r(nu|z)."""
        log_scale = self.tilt @ nu
        eta = (standard - self.load @ nu) * jnp.exp(-log_scale)
        return Normal(0.0, 1.0).log_prob(eta) - log_scale, jnp.sum(Normal(0.0, 1.0).log_prob(nu - mean))

    def _standardised(self, lam: Array, context: PyTree, prior: AbstractProposal, z: Latents) -> Point:
        point = prior.coordinates({LAM: lam}, context)
        flow = self.inner.bijection
        base, log_det = (point.base, jnp.zeros(())) if flow is None else forward(flow, point.base)
        white, mean, log_scale = self.inner.regression(z, prior)
        parts, standard = self.link.split(base), {}
        for s in self.link.sites:
            eta = jnp.sum(white.root[s.name] * parts[s.name][..., :, None], -2) - mean[s.name]
            standard[s.name] = eta * jnp.exp(-log_scale[s.name])
        jacobian = log_det + point.log_det + self._log_jacobian(white, log_scale)
        return Point(self.link.join(standard), jacobian)

    def _log_jacobian(self, white: Whitened, log_scale: dict[str, Array]) -> Array:
        return white.log_det - sum((jnp.sum(v) for v in log_scale.values()), jnp.zeros(()))

    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        k1, k2 = jax.random.split(key)
        point, mean = self._standardised(lam, context, prior, z), self._mean(z)
        centre, root = self._s(point.standard, mean)
        base = jax.random.normal(k1, mean.shape)
        nu = centre + jax.scipy.linalg.solve_triangular(root.T, jnp.exp(self.log_scale) * base, lower=False)
        own, of_nu = self._log_r(point.standard, nu, mean)
        return {
            **prior_terms(prior, lam, context, k2),
            "r(log det)": -point.log_det,
            "r(lam|z,nu)": -own,
            "r(nu|z)": -of_nu,
            "s(nu|lam,z)": self._log_s(base, root),
        }

    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        """Lambda by way of nu ~ r(nu|z), with the weight over both."""
        k1, k2, k3 = jax.random.split(key, 3)
        mean = self._mean(z)
        nu = mean + jax.random.normal(k1, mean.shape)
        noise = jax.random.normal(k2, (self.link.dim,))
        standard = self.load @ nu + jnp.exp(self.tilt @ nu) * noise
        own, of_nu = self._log_r(standard, nu, mean)
        centre, root = self._s(standard, mean)
        log_s = self._log_s(jnp.exp(-self.log_scale) * (root.T @ (nu - centre)), root)
        white, location, log_scale = self.inner.regression(z, prior)
        parts = {}
        for name, eta in self.link.split(standard).items():
            parts[name] = solve_transposed(white.root[name], location[name] + jnp.exp(log_scale[name]) * eta)
        base, log_det = self.link.join(parts), self._log_jacobian(white, log_scale)
        if self.inner.bijection is not None:
            base, moved = backward(self.inner.bijection, base)
            log_det = log_det - moved
        value, jacobian, log_q = prior.density_at(base, k3)
        log_r = jnp.sum(own) + of_nu + log_det - jacobian
        return value[LAM], log_q - log_r + log_s
