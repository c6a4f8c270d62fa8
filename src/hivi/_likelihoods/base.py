r"""Variational likelihoods q(z_i | lambda_i): one factorised exponential family per kind of site.

A likelihood of a site of shape `s` has parameters `lam` of shape `(*s, width)`. It knows how to sample, its
density, the moves that its gradient identity needs, and the Fisher matrix and score that the linearised
auxiliary needs (both diagonal over coordinates, in `width x width` blocks).
"""

from __future__ import annotations

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._tree import Key

HELD = 1e9
"""What is added up is held between so many nats: an infinite term could not be updated."""


def updatable_sum(log_prob: Array) -> Float[Array, ""]:
    """The sum, written as a product, of which the locality engine updates one coordinate's part at a time."""
    held = jax.lax.clamp(-HELD, log_prob, HELD)
    return jnp.tensordot(held, jnp.ones_like(held), axes=held.ndim, precision=jax.lax.Precision.HIGHEST)


class AbstractLikelihood(eqx.Module):
    """q(z_i | lambda_i) of one site, independent over its coordinates given lambda."""

    reparameterised: eqx.AbstractClassVar[bool]
    averaged: ClassVar[bool] = True
    """Whether `mean` has a closed form."""
    table: ClassVar[bool] = False
    """Whether it has a probability for each of finitely many values; its moves go to all of them."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """Number of parameters per coordinate."""

    @abc.abstractmethod
    def start(self, shape: tuple[int, ...], key: Key) -> Float[Array, "*shape width"]:
        """Initial parameters, near the centre of the support."""

    def near(self, lam: Float[Array, "*shape width"], mean: Array) -> Float[Array, "*shape width"]:
        """Parameters moved to a mean (broadcast to the site); as they are where the kind has no such start."""
        return lam

    @abc.abstractmethod
    def sample(self, lam: Float[Array, "*shape width"], key: Key) -> Array:
        """One draw of the site."""

    @abc.abstractmethod
    def log_prob(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, "*shape"]:
        """Elementwise log q(z_i | lambda_i)."""

    def total(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, ""]:
        """The sum of `log_prob`, written as a product, whose differences are cheap: one coordinate's at a time is updated."""
        return updatable_sum(self.log_prob(lam, z))

    @abc.abstractmethod
    def mean(self, lam: Float[Array, "*shape width"]) -> Float[Array, "*shape"]:
        """E[z_i | lambda_i]."""

    def support(self) -> tuple[int, int]:
        """Of a discrete kind: the smallest value, and the number of values, 0 where it is infinite."""
        return 0, 0

    @abc.abstractmethod
    def moves(self, z: Array) -> Array:
        """Values to which each coordinate moves in the local expectation: (moves, *shape), none if continuous."""

    @abc.abstractmethod
    def move_weights(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, "moves *shape"]:
        """Differentiable weights w_m with `grad E[f] = sum_m grad w_m E[f(move m) - f(z)]`."""

    @abc.abstractmethod
    def score(self, lam: Float[Array, "*shape width"], z: Array) -> Float[Array, "*shape width"]:
        """Gradient of log q(z_i | lambda_i) with respect to lambda_i, in closed form."""

    @abc.abstractmethod
    def fisher(self, lam: Float[Array, "*shape width"]) -> Float[Array, "*shape width width"]:
        """Fisher matrix of lambda_i, in closed form."""

    @abc.abstractmethod
    def features(self, z: Array) -> Float[Array, "*shape features"]:
        """Functions of z_i on which the auxiliary's factorised regression rests (eq. 7); the first is 1."""
