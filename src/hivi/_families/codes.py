"""A hierarchy over binary codes: a variational prior that cannot be reparameterised."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from hivi._errors import FamilyError, message, require_count
from hivi._families.auxiliary import Link
from hivi._families.base import AbstractFamily, AbstractProposal, Conditional
from hivi._families.hierarchical import start_parameters, with_spread
from hivi._likelihood import likelihood
from hivi._likelihoods.finite import FiniteLikelihood
from hivi._space import Latents, Site, Values
from hivi._tree import Key, PyTree

SPREAD = 0.5
BIT = Values("finite", 0, 2)
BITS = FiniteLikelihood(BIT)


class Codes(AbstractFamily):
    """q(z) = sum over c in {0,1}^m of prod_j Bernoulli(c_j) prod_i q(z_i | lambda_i = (b + A c)_i).

    2^m values of lambda from m bits: a hierarchical model whose prior over lambda is discrete. Its bits get
    score-function gradients of the whole log-weight, since everything below a bit depends on it (Chaney 2015; eq. 8
    one level up): `grad log q(c_j) (log p + log r - log q(z|c) - log q(c))`. The auxiliary is
    r(c|z) = prod_j Bernoulli, with logits linear in features of z that start at the posterior to first order in A.

    Args:
        bits: m, at least 1.
        start: a mean-field `Fit` of the same target to grow from.
        spread: standard deviation of the entries of A at the start.

    Example:
        >>> import hivi
        >>> hivi.Codes(bits=4).bits
        4
    """

    bits: int = 8
    start: Any = None
    spread: float = SPREAD

    def __check_init__(self) -> None:
        require_count("Codes(bits=...)", self.bits, "correct the number")

    def at_row(self, sites: tuple[Site, ...], row: Int[Array, ""]) -> AbstractFamily:
        # Codes are not repeated row by row, whatever the start: `by_rows` says so.
        return dataclasses.replace(self, start=None)

    def build(self, sites: tuple[Site, ...], key: Key) -> AbstractProposal:
        link = Link(sites)
        k1, k2 = jax.random.split(key)
        keys = jax.random.split(k2, len(sites))
        known = {} if self.start is None else start_parameters(self.start)
        known = {s.name: with_spread(s, known[s.name]) for s in sites if s.name in known}
        lam = {s.name: known.get(s.name, likelihood(s).start(s.shape, k)) for s, k in zip(sites, keys, strict=True)}
        for s in sites:
            if lam[s.name].shape != (*s.shape, likelihood(s).width):
                raise FamilyError(
                    message(
                        f"Codes(start=...) at site {s.name!r}",
                        f"parameters of shape {lam[s.name].shape}",
                        f"{(*s.shape, likelihood(s).width)}",
                        "pass a MeanField fit of the same target",
                    )
                )
        effect = self.spread * jax.random.normal(k1, (link.dim, self.bits))
        features = {s.name: jax.eval_shape(likelihood(s).features, s.example()).shape[-1] for s in sites}
        weights = {s.name: jnp.zeros((self.bits, *s.shape, features[s.name])) for s in sites}
        location = link.join(lam) - 0.5 * effect @ jnp.ones(self.bits)
        return CodesProposal(sites, jnp.zeros((self.bits, 1)), location, effect, weights)


class CodesContext(NamedTuple):
    """The code of a draw, and the lambda that it chose."""

    code: Int[Array, " bits"]
    lam: Float[Array, " dim"]


class CodesProposal(AbstractProposal):
    """Parameters of a hierarchy over codes.

    Attributes:
        sites: the sites.
        logits: of the bits, (bits, 1).
        location: b, (dim,).
        effect: A, (dim, bits).
        weights: of r's logits on the features of each coordinate, site -> (bits, *site shape, features).
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    logits: Float[Array, "bits 1"]
    location: Float[Array, " dim"]
    effect: Float[Array, "dim bits"]
    weights: dict[str, Array]

    @property
    def _name(self) -> str:
        return f"code of {self.sites[0].name}"

    @property
    def above(self) -> tuple[Site, ...]:
        bits = (self.logits.shape[0],)
        return (Site(self._name, bits, BIT, bits),)

    @property
    def _link(self) -> Link:
        return Link(self.sites)

    def propose(self, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        return self.redrawn({}, key, branch)

    def redrawn(self, values: Latents, key: Key, branch: Array | int = 0) -> tuple[Latents, PyTree]:
        k1, k2 = jax.random.split(key)
        return self.given_code(values[self._name] if self._name in values else BITS.sample(self.logits, k1), k2)

    def given_code(self, code: Int[Array, " bits"], key: Key) -> tuple[Latents, CodesContext]:
        """A draw of z at one code."""
        flat = self._lam(code)
        lam, keys = self._link.split(flat), jax.random.split(key, len(self.sites))
        z = {s.name: likelihood(s).sample(lam[s.name], k) for s, k in zip(self.sites, keys, strict=True)}
        return z, CodesContext(code, flat)

    def _lam(self, code: Array) -> Array:
        return self.location + self.effect @ code.astype(self.effect.dtype)

    def hidden(self, context: CodesContext) -> Latents:
        return {self._name: context.code}

    def log_q(self, z: Latents, context: CodesContext, key: Key, inner: int = 0) -> dict[str, Array]:
        if inner > 0:
            raise FamilyError(
                message(
                    f"ImportanceWeighted(inner={inner}) with Codes",
                    "extra draws of a discrete code, which carry no gradient",
                    "inner=0",
                    "leave it out, or use Hierarchical() with a Flow",
                )
            )
        code = z.get(self._name, context.code)
        terms = {"q(code)": BITS.log_prob(self.logits, code), "-r(code|z)": -BITS.log_prob(self._reverse(z), code)}
        return {**terms, **self._link.log_prob(self._lam(code), z)}

    def _reverse(self, z: Latents) -> Float[Array, "bits 1"]:
        """Logits of r(c|z): the posterior of c to first order in A, and a regression on the features of z."""
        middle = self._lam(jax.nn.sigmoid(self.logits[:, 0]))
        score = self._link.join(self._link.score(middle, z))
        logits = self.logits[:, 0] + score @ self.effect
        for s in self.sites:
            features = likelihood(s).features(z[s.name]).reshape(-1)
            logits = logits + self.weights[s.name].reshape(logits.shape[0], -1) @ features
        return logits[:, None]

    def log_density(self, z: Latents, key: Key, samples: int = 1) -> Float[Array, ""]:
        reverse = self._reverse(z)

        def one(k: Key) -> Array:
            code = BITS.sample(reverse, k)
            excess = jnp.sum(BITS.log_prob(self.logits, code) - BITS.log_prob(reverse, code))
            return excess + sum(jnp.sum(t) for t in self._link.log_prob(self._lam(code), z).values())

        weights = jax.lax.map(one, jax.random.split(key, samples), batch_size=64)
        return logsumexp(weights) - jnp.log(float(samples))

    def conditionals(self, context: CodesContext) -> dict[str, Conditional]:
        lam = self._link.split(context.lam)
        return {s.name: Conditional(likelihood(s), lam[s.name]) for s in self.sites} | {
            self._name: Conditional(BITS, self.logits)
        }
