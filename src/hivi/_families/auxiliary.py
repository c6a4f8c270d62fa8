"""Auxiliary distributions r(lambda | z; phi) of a hierarchical family (eq. 7 and its relatives).

An auxiliary supplies `log q(lambda) - log r(lambda|z)` at the lambda that generated z, and extra draws
lambda_k ~ r(lambda|z) with the same ratio, which the tighter bounds need. All start from the *linearised
posterior*: with lambda = mu + U epsilon and Fisher matrix F of q(z|lambda) at mu,

    r(epsilon | z) = N(P^-1 U' score(z; mu), P^-1),   P = I + U' F U,

which is exact as U -> 0, so that a hierarchy can start at a mean-field optimum.
"""

from __future__ import annotations

import abc
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import AbstractBijection
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._bijections import backward, forward, near_identity, require_flow
from hivi._families.base import AbstractProposal, size_of
from hivi._likelihood import likelihood
from hivi._likelihoods.base import AbstractLikelihood
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree

LAM = "lam"
"""Name of the single site of a prior over lambda: the flat vector of all variational parameters."""


class Link(NamedTuple):
    """How the flat vector lambda is divided between the likelihoods of the sites (static)."""

    sites: tuple[Site, ...]

    def likelihoods(self) -> dict[str, AbstractLikelihood]:
        """Site name -> likelihood."""
        return {s.name: likelihood(s) for s in self.sites}

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return sum(size_of(s.shape) * likelihood(s).width for s in self.sites)

    def split(self, flat: Float[Array, " dim"]) -> dict[str, Array]:
        """Site name -> lambda of shape (*site shape, width)."""
        out, start = {}, 0
        for s in self.sites:
            width = likelihood(s).width
            stop = start + size_of(s.shape) * width
            out[s.name] = flat[start:stop].reshape(*s.shape, width)
            start = stop
        return out

    def join(self, parts: dict[str, Array]) -> Float[Array, " dim"]:
        """Inverse of `split`."""
        return jnp.concatenate([parts[s.name].reshape(-1) for s in self.sites])

    def log_prob(self, flat: Float[Array, " dim"], z: Latents) -> dict[str, Array]:
        """Terms of log q(z | lambda)."""
        lam = self.split(flat)
        return {f"q({s.name}|lam)": likelihood(s).log_prob(lam[s.name], z[s.name]) for s in self.sites}

    def score(self, flat: Float[Array, " dim"], z: Latents) -> dict[str, Array]:
        """Gradient of log q(z | lambda) with respect to lambda, per site."""
        lam = self.split(flat)
        return {s.name: likelihood(s).score(lam[s.name], z[s.name]) for s in self.sites}

    def fisher(self, flat: Float[Array, " dim"]) -> dict[str, Array]:
        """Fisher matrices at lambda, (*site shape, width, width) per site."""
        lam = self.split(flat)
        return {s.name: likelihood(s).fisher(lam[s.name]) for s in self.sites}


class AbstractAuxiliaryState(eqx.Module):
    """A built auxiliary: its arrays are phi."""

    @abc.abstractmethod
    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        """Terms of log q(lambda) - log r(lambda|z) at the lambda that the prior drew with this context."""

    @abc.abstractmethod
    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        """An extra lambda ~ r(lambda|z), and log q(lambda) - log r(lambda|z) there; q may be estimated, unbiasedly."""

    def reparameterised(self, prior: AbstractProposal) -> bool:
        """Whether gradients flow through `draw`; if not, it serves evaluation only."""
        return True


class AbstractAuxiliary(eqx.Module):
    """Configuration of an auxiliary."""

    @abc.abstractmethod
    def build(self, link: Link, prior: AbstractProposal, key: Key) -> AbstractAuxiliaryState:
        """Initial state, which starts at the linearised posterior where it can."""


def prior_terms(prior: AbstractProposal, lam: Array, context: PyTree, key: Key) -> dict[str, Array]:
    """Terms of log q(lambda), renamed: a prior that is itself hierarchical has an auxiliary with terms of its own."""
    return {f"prior {name}": term for name, term in prior.log_q({LAM: lam}, context, key).items()}


class Whitened(NamedTuple):
    """The linearised posterior in blocks: eta = L'(epsilon - mean) is standard normal, P = L L' blockwise."""

    root: dict[str, Array]
    centre: dict[str, Array]
    log_det: Array


def linearise(link: Link, location: Array, scale: Array, z: Latents) -> Whitened:
    """The linearised posterior of independent coordinates, U = diag(scale); factorised over z_i."""
    fisher, score, spread = link.fisher(location), link.score(location, z), link.split(scale)
    root, centre, log_det = {}, {}, jnp.zeros(())
    for s in link.sites:
        width = likelihood(s).width
        u = spread[s.name]
        precision = jnp.eye(width) + u[..., :, None] * fisher[s.name] * u[..., None, :]
        if width == 1:
            low = jnp.sqrt(precision)
            inverse = 1 / low
        else:
            low = jnp.linalg.cholesky(precision)
            inverse = jnp.linalg.inv(low)
        # L'mean = L^-1 U' score: only the score depends on z, elementwise over the site's axes.
        root[s.name] = low
        centre[s.name] = jnp.sum(inverse * (u * score[s.name])[..., None, :], -1)
        log_det = log_det + jnp.sum(jnp.log(jnp.diagonal(low, axis1=-2, axis2=-1)))
    return Whitened(root, centre, log_det)


class InverseFlow(AbstractAuxiliary):
    """Eq. 7: lambda_0 = g^-1(lambda) by an inverse flow, lambda_0,i ~ N(m_i(z_i), s_i(z_i)) by factorised regression.

    The regression is the linearised posterior plus a residual that starts at zero; the flow acts in the prior's own
    base coordinates and starts at the identity. r splits by z_i, so that gradients stay local.

    Args:
        layers: length of the inverse flow; 0 for none.
        kind: "planar", "coupling", "maf" or "spline".

    Example:
        >>> import hivi
        >>> hivi.Hierarchical(prior=hivi.Flow(4), auxiliary=hivi.InverseFlow(layers=2)).auxiliary.layers
        2
    """

    layers: int = 8
    kind: str = "planar"

    def __check_init__(self) -> None:
        require_flow("InverseFlow", self.kind, self.layers, least=0)

    def build(self, link: Link, prior: AbstractProposal, key: Key) -> RegressionState:
        kind = "planar" if link.dim == 1 and self.kind != "spline" else self.kind
        bijection = near_identity(kind, link.dim, self.layers, key) if self.layers > 0 else None
        shift, stretch = {}, {}
        for s in link.sites:
            features = jax.eval_shape(likelihood(s).features, s.example()).shape[-1]
            shift[s.name] = jnp.zeros((*s.shape, likelihood(s).width, features))
            stretch[s.name] = jnp.zeros_like(shift[s.name])
        return RegressionState(link, bijection, shift, stretch)


class RegressionState(AbstractAuxiliaryState):
    """phi of eq. 7: the inverse flow, and the residual coefficients of mean and log scale."""

    link: Link = eqx.field(static=True)
    bijection: AbstractBijection | None
    shift: dict[str, Array]
    stretch: dict[str, Array]

    def regression(self, z: Latents, prior: AbstractProposal) -> tuple[Whitened, dict[str, Array], dict[str, Array]]:
        """The linearised posterior, and the mean and log scale of eta = L'lambda_0 with their residuals."""
        white = linearise(self.link, *prior.affine(), z)
        mean, log_scale = {}, {}
        for s in self.link.sites:
            features = likelihood(s).features(z[s.name])[..., None, :]
            mean[s.name] = white.centre[s.name]
            log_scale[s.name] = jnp.zeros_like(mean[s.name])
            if self.shift:
                mean[s.name] = mean[s.name] + jnp.sum(self.shift[s.name] * features, -1)
                log_scale[s.name] = jnp.sum(self.stretch[s.name] * features, -1)
        return white, mean, log_scale

    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        point = prior.coordinates({LAM: lam}, context)
        base, log_det = (point.base, jnp.zeros(())) if self.bijection is None else forward(self.bijection, point.base)
        white, mean, log_scale = self.regression(z, prior)
        parts = self.link.split(base)
        terms = prior_terms(prior, lam, context, key)
        terms["r(log det)"] = -(log_det + point.log_det + white.log_det)
        for s in self.link.sites:
            eta = jnp.sum(white.root[s.name] * parts[s.name][..., :, None], -2) - mean[s.name]
            eta = eta * jnp.exp(-log_scale[s.name])
            terms[f"r(lam|{s.name})"] = -Normal(0.0, 1.0).log_prob(eta) + log_scale[s.name]
        return terms

    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        k1, k2 = jax.random.split(key)
        white, mean, log_scale = self.regression(z, prior)
        noise = self.link.split(jax.random.normal(k1, (self.link.dim,)))
        log_r, parts = white.log_det, {}
        for s in self.link.sites:
            eta = noise[s.name]
            log_r = log_r + jnp.sum(Normal(0.0, 1.0).log_prob(eta) - log_scale[s.name])
            right = mean[s.name] + jnp.exp(log_scale[s.name]) * eta
            parts[s.name] = solve_transposed(white.root[s.name], right)
        base = self.link.join(parts)
        if self.bijection is not None:
            base, log_det = backward(self.bijection, base)
            log_r = log_r - log_det
        value, log_det, log_q = prior.density_at(base, k2)
        return value[LAM], log_q - (log_r - log_det)


def solve_transposed(root: Array, right: Array) -> Array:
    """Solve L' x = b blockwise."""
    if root.shape[-1] == 1:
        return right / root[..., 0]
    return jnp.sum(jnp.swapaxes(jnp.linalg.inv(root), -1, -2) * right[..., None, :], -1)


class Linearised(AbstractAuxiliary):
    """The linearised posterior alone: no parameters, exact as the prior narrows; O(D^2) unless the prior is MeanField.

    Example:
        >>> import hivi
        >>> hivi.Hierarchical(prior=hivi.FullRank(), auxiliary=hivi.Linearised()).auxiliary
        Linearised()
    """

    def build(self, link: Link, prior: AbstractProposal, key: Key) -> AbstractAuxiliaryState:
        if prior.factorised:
            return RegressionState(link, None, {}, {})
        return LinearisedState(link)


class LinearisedState(AbstractAuxiliaryState):
    """r(epsilon|z) = N(P^-1 U' score, P^-1) with U the Jacobian of the prior's map at base 0; no parameters."""

    link: Link = eqx.field(static=True)

    def _posterior(self, z: Latents, prior: AbstractProposal) -> tuple[Array, Array]:
        centre = jnp.zeros(self.link.dim)

        def value(base: Array) -> Array:
            return prior.from_coordinates(base)[0][LAM]

        location, jacobian = value(centre), jax.jacfwd(value)(centre)
        fisher, score = self.link.fisher(location), self.link.score(location, z)
        rows = {
            s.name: jnp.einsum("...ij,...jd->...id", fisher[s.name], part)
            for s, part in zip(self.link.sites, self._rows(jacobian), strict=True)
        }
        weighted = jnp.concatenate([rows[s.name].reshape(-1, self.link.dim) for s in self.link.sites])
        root = jnp.linalg.cholesky(jnp.eye(self.link.dim) + jacobian.T @ weighted)
        # L' mean = L^-1 U' score
        half = jax.scipy.linalg.solve_triangular(root, jacobian.T, lower=True)
        return root, half @ self.link.join(score)

    def _rows(self, jacobian: Array) -> list[Array]:
        out, start = [], 0
        for s in self.link.sites:
            width = likelihood(s).width
            stop = start + size_of(s.shape) * width
            out.append(jacobian[start:stop].reshape(*s.shape, width, -1))
            start = stop
        return out

    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        root, centre = self._posterior(z, prior)
        point = prior.coordinates({LAM: lam}, context)
        log_r = jnp.sum(Normal(0.0, 1.0).log_prob(root.T @ point.base - centre))
        log_r = log_r + jnp.sum(jnp.log(jnp.diagonal(root))) + point.log_det
        return {**prior_terms(prior, lam, context, key), "r(lam|z)": -log_r}

    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        k1, k2 = jax.random.split(key)
        root, centre = self._posterior(z, prior)
        eta = jax.random.normal(k1, centre.shape)
        base = jax.scipy.linalg.solve_triangular(root.T, centre + eta, lower=False)
        value, log_det, log_q = prior.density_at(base, k2)
        log_r = jnp.sum(Normal(0.0, 1.0).log_prob(eta)) + jnp.sum(jnp.log(jnp.diagonal(root))) - log_det
        return value[LAM], log_q - log_r


class SemiImplicit(AbstractAuxiliary):
    """r = q(lambda), the prior itself: semi-implicit variational inference (Yin & Zhou 2018); use with inner > 0.

    Example:
        >>> import hivi
        >>> hivi.Hierarchical(prior=hivi.Flow(), auxiliary=hivi.SemiImplicit()).auxiliary
        SemiImplicit()
    """

    def build(self, link: Link, prior: AbstractProposal, key: Key) -> AbstractAuxiliaryState:
        return PriorState(link)


class PriorState(AbstractAuxiliaryState):
    """r(lambda|z) = q(lambda): both cancel, whatever the prior."""

    link: Link = eqx.field(static=True)

    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        return {}

    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        k1, k2 = jax.random.split(key)
        branch = jax.random.categorical(k1, prior.log_weights()) if prior.branches > 1 else 0
        return prior.propose(k2, branch)[0][LAM], jnp.zeros(())

    def reparameterised(self, prior: AbstractProposal) -> bool:
        return prior.branches == 1


class Component(AbstractAuxiliary):
    """For a mixture prior: which component, exactly by Bayes' rule, then its linearised posterior.

    r(lambda|z) = sum_k w_k(z) N_k(lambda|z), w_k(z) proportional to pi_k q(z|mu_k) with the second-order correction for
    the component's width. Exact for components without width, where log q(z) is the log-sum of a mixture.

    Example:
        >>> import hivi
        >>> hivi.Hierarchical(prior=hivi.Mixture(4), auxiliary=hivi.Component()).auxiliary
        Component()
    """

    def build(self, link: Link, prior: AbstractProposal, key: Key) -> AbstractAuxiliaryState:
        prior.components()
        return ComponentState(link)


class ComponentState(AbstractAuxiliaryState):
    """The exact conditional of the component; no parameters."""

    link: Link = eqx.field(static=True)

    def _evidence(self, z: Latents, log_weight: Array, location: Array, scale: Array) -> tuple[Whitened, Array]:
        """Linearised posterior of one component, and its unnormalised log-probability given z."""
        white = linearise(self.link, location, scale, z)
        log_lik = sum(jnp.sum(t) for t in self.link.log_prob(location, z).values())
        gain = sum(0.5 * jnp.sum(c**2) for c in white.centre.values())
        return white, log_weight + log_lik + gain - white.log_det

    def _log_r(self, lam: Array, z: Latents, prior: AbstractProposal) -> Array:
        def one(log_weight: Array, location: Array, scale: Array) -> tuple[Array, Array]:
            white, evidence = self._evidence(z, log_weight, location, scale)
            parts = self.link.split((lam - location) / scale)
            log_n = white.log_det - jnp.sum(jnp.log(scale))
            for s in self.link.sites:
                eta = jnp.sum(white.root[s.name] * parts[s.name][..., :, None], -2) - white.centre[s.name]
                log_n = log_n + jnp.sum(Normal(0.0, 1.0).log_prob(eta))
            return evidence, log_n

        evidence, log_n = jax.vmap(one)(*prior.components())
        return logsumexp(jax.nn.log_softmax(evidence) + log_n)

    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        return {**prior_terms(prior, lam, context, key), "r(lam|z)": -self._log_r(lam, z, prior)}

    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        k1, k2, k3 = jax.random.split(key, 3)
        comps = prior.components()
        evidence = jax.vmap(lambda *c: self._evidence(z, *c)[1])(*comps)
        chosen = jax.random.categorical(k1, evidence)
        log_weight, location, scale = (x[chosen] for x in comps)
        white, _ = self._evidence(z, log_weight, location, scale)
        noise = self.link.split(jax.random.normal(k2, (self.link.dim,)))
        parts = {n: solve_transposed(white.root[n], white.centre[n] + noise[n]) for n in noise}
        lam = location + scale * self.link.join(parts)
        return lam, prior.log_density({LAM: lam}, k3) - self._log_r(lam, z, prior)

    def reparameterised(self, prior: AbstractProposal) -> bool:
        return False
