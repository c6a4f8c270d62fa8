"""A variational prior over a lattice that commutes with its shifts, and the auxiliary that goes with it.

lambda = location + g(epsilon), where g alternates circular convolutions with one elementwise map per layer: some 330
parameters whatever the size of the torus. r(lambda | z) goes the other way: a stationary flow of epsilon is Gaussian around a
convolution of z, which starts as the linearised posterior. Plain `hivi.Hierarchical` takes both:

    hivi.Hierarchical(prior=Stationary((16, 16)), auxiliary=StationaryInverse(), start=mean_field_fit)
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.distributions import Normal

from hivi._bijections import _root
from hivi._families.auxiliary import LAM, AbstractAuxiliary, AbstractAuxiliaryState, Link
from hivi._families.base import AbstractFamily, AbstractProposal, Coordinates, Layout, gaussian_density, gaussian_terms
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree


def orbits(shape: tuple[int, int]) -> np.ndarray:
    """Number of the orbit of every frequency under reflections (and, on a square, the diagonal); they share a gain."""
    rows, columns = (np.minimum(np.arange(n), n - np.arange(n)) for n in shape)
    a, b = np.meshgrid(rows, columns, indexing="ij")
    if shape[0] == shape[1]:
        a, b = np.maximum(a, b), np.minimum(a, b)
    return np.unique(a * (max(shape) + 1) + b, return_inverse=True)[1].reshape(shape)


class StationaryFlow(eqx.Module):
    """Convolution, elementwise map, ..., convolution.

    Attributes:
        spectrum: log gains of each convolution by orbit of frequencies.
        maps: log slope, log rate, shift of x + c tanh(b x + d), c b + 1 = exp(log slope), of each layer.
    """

    shape: tuple[int, int] = eqx.field(static=True)
    spectrum: Float[Array, "convolutions orbits"]
    maps: Float[Array, "layers 3"]

    def gains(self, number: int) -> Array:
        """Log gain of every frequency in one convolution."""
        return self.spectrum[number][orbits(self.shape)]

    def linear(self) -> Array:
        """Log gain of every frequency in all convolutions together, the maps at their steepest."""
        return jnp.sum(self.spectrum, 0)[orbits(self.shape)] + jnp.sum(self.maps[:, 0])

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Value and log |det| at an array of the lattice's shape."""
        x, log_det = convolve(jnp.exp(self.gains(0)), x), jnp.sum(self.gains(0))
        for k, (steep, rate, shift) in enumerate(self.maps):
            act, excess = jnp.tanh(jnp.exp(rate) * x + shift), jnp.expm1(steep)
            x = x + excess * jnp.exp(-rate) * act
            log_det = log_det + jnp.sum(jnp.log1p(excess * (1 - act**2))) + jnp.sum(self.gains(k + 1))
            x = convolve(jnp.exp(self.gains(k + 1)), x)
        return x, log_det

    def inverse(self, y: Array) -> Array:
        """The x with `forward(x)[0] = y`; gradients flow through one Newton step at each root."""
        for k, (steep, rate, shift) in reversed(list(enumerate(self.maps))):
            y, excess = convolve(jnp.exp(-self.gains(k + 1)), y), jnp.expm1(steep)
            # a = b x + d solves a + c b tanh(a) = b y + d.
            target = jnp.exp(rate) * y + shift
            a = jax.lax.stop_gradient(jax.vmap(_root, (None, 0))(excess, target.reshape(-1)).reshape(y.shape))
            slope = jax.lax.stop_gradient(1 + excess * (1 - jnp.tanh(a) ** 2))
            a = a - (a + excess * jnp.tanh(a) - target) / slope
            y = (a - shift) * jnp.exp(-rate)
        return convolve(jnp.exp(-self.gains(0)), y)


def convolve(gain: Array, x: Array) -> Array:
    """Circular convolution with the kernel of a real, even spectrum."""
    return jnp.fft.ifft2(jnp.fft.fft2(x) * gain).real


def near_identity(shape: tuple[int, int], layers: int, key: Key) -> StationaryFlow:
    """All gains one; maps that are the identity but for the shift at which they will bend."""
    shifts = jnp.zeros((layers, 3)).at[:, 2].set(0.1 * jax.random.normal(key, (layers,)))
    return StationaryFlow(shape, jnp.zeros((layers + 1, int(orbits(shape).max()) + 1)), shifts)


class Stationary(AbstractFamily):
    """A stationary flow over lambda on a torus; a stationary Gaussian for layers = 0.

    Args:
        shape: of the torus; lambda has one number per site of it.
        layers: elementwise maps between the convolutions.
        amplitude: of the spectrum at the start, amplitude / (mass + 4 - 2 cos k_1 - 2 cos k_2).
        mass: inverse squared correlation length at the start.
    """

    shape: tuple[int, int]
    layers: int = 2
    amplitude: float = 0.3
    mass: float = 0.3

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        flow = near_identity(self.shape, self.layers, key)
        waves = [2 - 2 * np.cos(2 * np.pi * np.arange(n) / n) for n in self.shape]
        power = self.amplitude / (self.mass + waves[0][:, None] + waves[1])
        index = orbits(self.shape).reshape(-1)
        log_gain = np.bincount(index, 0.5 * np.log(power).reshape(-1)) / np.bincount(index)
        start = flow.spectrum.at[-1].set(jnp.asarray(log_gain))
        return StationaryProposal(sites, jnp.zeros(()), eqx.tree_at(lambda f: f.spectrum, flow, start))


class StationaryProposal(AbstractProposal):
    """Parameters of a stationary prior: one location for all sites, and the flow."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    location: Float[Array, ""]
    flow: StationaryFlow

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        base = jax.random.normal(key, (self.flow.shape[0] * self.flow.shape[1],))
        value, log_det = self.from_coordinates(base)
        return value, (base, log_det)

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        return gaussian_terms(self.coordinates(z, context))

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        return gaussian_density(self.coordinates(z, None))

    def coordinates(self, value: Latents, context: PyTree) -> Coordinates:
        if context is not None:
            return Coordinates(context[0], -context[1])
        flat = Layout(self.sites).flatten(value) - self.location
        base = self.flow.inverse(flat.reshape(self.flow.shape))
        return Coordinates(base.reshape(-1), -self.flow.forward(base)[1])

    def from_coordinates(self, base: Float[Array, " dim"]) -> tuple[Latents, Array]:
        value, log_det = self.flow.forward(base.reshape(self.flow.shape))
        return Layout(self.sites).unflatten(self.location + value.reshape(-1)), log_det

    def density_at(self, base: Float[Array, " dim"], key: Key) -> tuple[Latents, Array, Array]:
        value, log_det = self.from_coordinates(base)
        return value, log_det, jnp.sum(Normal(0.0, 1.0).log_prob(base)) - log_det

    def affine(self) -> tuple[Array, Array]:
        size = self.flow.shape[0] * self.flow.shape[1]
        scale = jnp.sqrt(jnp.mean(jnp.exp(2 * self.flow.linear())))
        return jnp.full(size, self.location), jnp.full(size, scale)

    def recentre(self, location: Array, scale: Array) -> StationaryProposal:
        """The mean of the locations; the spectrum stays, since a stationary prior that is narrow learns slowly."""
        return StationaryProposal(self.sites, jnp.mean(location), self.flow)


class StationaryInverse(AbstractAuxiliary):
    """r(lambda | z): a stationary flow of the prior's base noise is N(K * score(z), 1), K a convolution.

    Args:
        layers: elementwise maps of the flow; 0 for a Gaussian, which starts as the linearised posterior and can leave it.
    """

    layers: int = 2

    def build(self, link: Link, prior: AbstractProposal, key: Key) -> AbstractAuxiliaryState:
        flow = near_identity(prior.flow.shape, self.layers, key)
        return StationaryInverseState(link, flow, jnp.zeros(flow.spectrum.shape[1]), jnp.zeros(3))


class StationaryInverseState(AbstractAuxiliaryState):
    """phi: the flow, the kernel's deviation by orbit, and log information, log gain and shift of the linearised posterior."""

    link: Link = eqx.field(static=True)
    flow: StationaryFlow
    kernel: Float[Array, " orbits"]
    adjust: Float[Array, "3"]

    def _parts(self, z: Latents, prior: StationaryProposal) -> tuple[Array, Array]:
        """Root of the precision by frequency, and the mean of the whitened base noise."""
        location, _ = prior.affine()
        fisher, score = self.link.join(self.link.fisher(location)), self.link.join(self.link.score(location, z))
        gain = jnp.exp(prior.flow.linear())
        root = jnp.sqrt(1 + gain**2 * jnp.mean(fisher) * jnp.exp(self.adjust[0]))
        spectrum = gain / root * jnp.exp(self.adjust[1]) + self.kernel[orbits(self.flow.shape)]
        # A product with a matrix: the score is all that depends on z, which local differences evaluate at many z.
        return root, self.adjust[2] + circulant(spectrum) @ score

    def excess(self, z: Latents, lam: Array, context: PyTree, prior: AbstractProposal, key: Key) -> dict[str, Array]:
        point = prior.coordinates({LAM: lam}, context)
        root, mean = self._parts(z, prior)
        value, log_det = self.flow.forward(point.base.reshape(self.flow.shape))
        white = convolve(root, value).reshape(-1)
        terms = {f"prior {n}": t for n, t in prior.log_q({LAM: lam}, context, key).items()}
        terms["r(log det)"] = -(log_det + jnp.sum(jnp.log(root)) + point.log_det)
        terms["r(lam|z)"] = -Normal(0.0, 1.0).log_prob(white - mean)
        return terms

    def draw(self, z: Latents, prior: AbstractProposal, key: Key) -> tuple[Array, Array]:
        k1, k2 = jax.random.split(key)
        root, mean = self._parts(z, prior)
        noise = jax.random.normal(k1, mean.shape)
        base = self.flow.inverse(convolve(1 / root, (mean + noise).reshape(self.flow.shape)))
        log_det = self.flow.forward(base)[1] + jnp.sum(jnp.log(root))
        value, outer, log_q = prior.density_at(base.reshape(-1), k2)
        return value[LAM], log_q - (jnp.sum(Normal(0.0, 1.0).log_prob(noise)) + log_det - outer)


def circulant(spectrum: Float[Array, "rows columns"]) -> Float[Array, "sites sites"]:
    """The matrix of a circular convolution."""
    kernel = jnp.fft.ifft2(spectrum).real
    rows, columns = (np.arange(n) for n in spectrum.shape)
    gap = [(a[:, None] - a) % len(a) for a in (rows, columns)]
    return kernel[gap[0][:, None, :, None], gap[1][None, :, None, :]].reshape(2 * (rows.size * columns.size,))
