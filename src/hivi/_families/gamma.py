"""Mean-field Gamma over positive sites, in natural parameters, with closed-form means and conjugate steps."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._errors import FamilyError, message
from hivi._families.base import AbstractFamily, AbstractProposal
from hivi._space import Latents, Site
from hivi._tree import Key, PyTree, value_zero

SMALL_SHAPE = 0.01


class MeanFieldGamma(AbstractFamily):
    """Independent Gamma variables over positive sites: q(w) = prod Gamma(shape_i, rate_i).

    For weights that a Poisson model meets linearly and through a log (`Expectation`): their means are in closed form and
    every step is a conjugate one (Hoffman et al. 2013). In the engine's coordinates the site is log w.

    Args:
        shape: shape parameter at the start, before any fit.
        rate: rate parameter at the start.
        tied: one rate for all coordinates that differ in their first index alone. Nothing is lost where log p is linear in
            e^log w with the same coefficient for all of them, as a Poisson model is in the weights of one topic; and work
            is saved.

    Example:
        >>> import hivi
        >>> hivi.MeanFieldGamma()
        MeanFieldGamma()
    """

    shape: float = 1.0
    rate: float = 1.0
    tied: bool = False

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        for s in sites:
            if s.discrete or s.bounds not in POSITIVE or s.local is not None:
                raise FamilyError(
                    message(
                        f"MeanFieldGamma at site {s.name!r}",
                        f"a site of {s.values} with support {s.bounds or 'unknown'}",
                        "a global site whose support is positive",
                        "use hivi.MeanField() for it",
                    )
                )
        keys = jax.random.split(key, max(len(sites), 1))
        jitter = {
            s.name: jax.random.uniform(k, s.shape, minval=0.9, maxval=1.1) for s, k in zip(sites, keys, strict=False)
        }
        rate = {s.name: jnp.full(_rates(s, self.tied), self.rate) for s in sites}
        return GammaProposal(sites, {n: self.shape * j for n, j in jitter.items()}, rate)


POSITIVE = ("_Positive[][]", "_GreaterThan[0.0][]", "_GreaterThan[0][]")


def _rates(site: Site, tied: bool) -> tuple[int, ...]:
    return (1, *site.shape[1:]) if tied and site.shape else site.shape


class GammaProposal(AbstractProposal):
    """Shape and rate of every coordinate, which broadcast: natural parameters of q, up to sign and a constant."""

    sites: tuple[Site, ...] = eqx.field(static=True)
    shape: dict[str, Array]
    rate: dict[str, Array]
    closed: bool = eqx.field(static=True, default=False)
    plug_in: bool = eqx.field(static=True, default=False)

    def near(self, means: dict[str, Array]) -> GammaProposal:
        """Means as given, with one rate per site: a rate that follows tiny means would swamp the first conjugate step."""
        shape, rate = dict(self.shape), dict(self.rate)
        for s in self.sites:
            if s.name in means:
                average = jnp.mean(means[s.name])
                shape[s.name] = jnp.maximum(means[s.name] / average, SMALL_SHAPE)
                rate[s.name] = jnp.full(rate[s.name].shape, 1 / average)
        return dataclasses.replace(self, shape=shape, rate=rate)

    def centre(self) -> Latents:
        return {n: jax.lax.stop_gradient(jnp.log(m)) for n, m in self.means().items()}

    def means(self) -> dict[str, Array]:
        """E[w] of every site."""
        return {n: a / self.rate[n] for n, a in self.shape.items()}

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        if self.closed:
            return self.views()["mean"], None
        keys = jax.random.split(key, max(len(self.sites), 1))
        return {
            s.name: jax.random.loggamma(k, self.shape[s.name]) - jnp.log(self.rate[s.name])
            for s, k in zip(self.sites, keys, strict=False)
        }, None

    def log_q(self, z: Latents, context: PyTree, key: Key, inner: int = 0) -> dict[str, Array]:
        """Log density in log coordinates; in closed form its expectation, whose gradient is the natural one."""
        if self.closed:
            return self._expected_log_q(z)
        out = {}
        for s in self.sites:
            a, b = self.shape[s.name], self.rate[s.name]
            out[f"q({s.name})"] = a * z[s.name] - b * jnp.exp(z[s.name]) + a * jnp.log(b) - log_gamma(a)
        return out

    def _expected_log_q(self, z: Latents) -> dict[str, Array]:
        """Negative entropy of log w, a psi(a) - a - log Gamma(a), which no rate changes; with the natural gradient.

        Plugged in, q has no entropy; the gradient of its linear part still turns a natural step into a conjugate one.
        """
        out, high = {}, self.views()["logmeanexp"]
        for s in self.sites:
            a, b = jax.lax.stop_gradient((self.shape[s.name], self.rate[s.name]))
            value = 0.0 if self.plug_in else jax.lax.optimization_barrier(a * (digamma(a) - 1) - log_gamma(a))
            out[f"q({s.name})"] = value + value_zero(a * z[s.name] - b * jnp.exp(high[s.name]))
        return out

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        drawn = dataclasses.replace(self, closed=False)
        return sum((jnp.sum(t) for t in drawn.log_q(z, None, key).values()), jnp.zeros(()))

    def expecting(self, sites: tuple[str, ...], plug_in: bool = False) -> GammaProposal:
        own = [s.name for s in self.sites if s.name in sites]
        if not own:
            return self
        if len(own) < len(self.sites):
            raise FamilyError(
                message(
                    f"MeanFieldGamma over {[s.name for s in self.sites]}",
                    f"only {own} in closed form",
                    "all sites of one family, or none",
                    "give each site its own MeanFieldGamma(), and MeanField() to those that are drawn",
                )
            )
        return dataclasses.replace(self, closed=True, plug_in=plug_in)

    def views(self) -> dict[str, Latents]:
        """E[log w] and log E[w]: functions whose derivatives by (shape, rate) are those by (E[log w], -E[w]).

        So autodiff returns gradients in mean parameters, which are the natural gradients of the natural parameters, with
        no Fisher matrix to invert (it is near singular for large shapes).
        """
        if not self.closed:
            return {}
        low, high = {}, {}
        for s in self.sites:
            a, b = jax.lax.stop_gradient((self.shape[s.name], self.rate[s.name]))
            # A tied rate takes the mean, weighted by E[w], of the steps that its coordinates would take.
            total = a if a.shape == b.shape else jnp.sum(a, 0, keepdims=True)
            high[s.name] = jnp.log(a / b) - value_zero(self.rate[s.name]) * (b / total)
            start = jnp.log(a / b) if self.plug_in else digamma(a) - jnp.log(b)
            low[s.name] = start + value_zero(self.shape[s.name])
        return {"mean": low, "logmeanexp": high}

    def roles(self) -> PyTree:
        return jax.tree.map(lambda _: "conjugate", self)

    @property
    def closed_form(self) -> bool:
        return True

    @property
    def factorised(self) -> bool:
        return True


LARGE = 1e9
"""Beyond, the recurrence adds nothing that single or double precision would show, and its product could overflow."""


def digamma(x: Array) -> Array:
    """Digamma of positive numbers: recurrence to x + 4, then the asymptotic series; a fraction of the library's time."""
    low = jnp.minimum(x, LARGE)
    # x (x+1) (x+2) (x+3) is u (u+2), and its derivative over itself the sum of the four reciprocals.
    u = low * (low + 3)
    shifted = (2 * low + 3) * (2 * u + 2) / (u * (u + 2))
    inverse = 1 / (x + 4)
    square = inverse * inverse
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square * (1 / 240 - square / 132))))
    return jnp.log(x + 4) - 0.5 * inverse - series - shifted


def log_gamma(x: Array) -> Array:
    """Log Gamma of positive numbers by the same recurrence and Stirling's series."""
    low = jnp.minimum(x, LARGE)
    u, y = low * (low + 3), x + 4
    inverse = 1 / y
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return (y - 0.5) * jnp.log(y) - y + 0.5 * jnp.log(2 * jnp.pi) + series - jnp.log(u * (u + 2))
