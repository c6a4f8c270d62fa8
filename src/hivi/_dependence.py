"""Dependence between standard normals: maps of independent ones to dependent ones, each again standard normal."""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hivi._pairs import AbstractPair


class AbstractDependence(eqx.Module):
    """A copula on the normal scale, as a triangular map m = g(u) of u ~ N(0, I) (Rosenblatt's, inverted)."""

    @abc.abstractmethod
    def couple(self, base: Float[Array, " dim"]) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Value m and log |dm/du|."""

    @abc.abstractmethod
    def decouple(self, value: Float[Array, " dim"]) -> tuple[Float[Array, " dim"], Float[Array, ""]]:
        """Base u and log |du/dm|."""


class GaussianDependence(AbstractDependence):
    """m = L u with the rows of L of length one: a correlation matrix L L', any. O(D^2).

    Attributes:
        lower: strictly lower part of L in units of its rows' diagonal, shape (D, D); the rest is not used.
    """

    lower: Float[Array, "dim dim"]

    def _factor(self) -> tuple[Array, Array]:
        part = jnp.tril(self.lower, -1)
        lengths = jnp.sqrt(1 + jnp.sum(part**2, 1))
        return (part + jnp.eye(len(part))) / lengths[:, None], -jnp.sum(jnp.log(lengths))

    def couple(self, base: Array) -> tuple[Array, Array]:
        factor, log_det = self._factor()
        return factor @ base, log_det

    def decouple(self, value: Array) -> tuple[Array, Array]:
        factor, log_det = self._factor()
        return jax.scipy.linalg.solve_triangular(factor, value, lower=True), -log_det


class VineDependence(AbstractDependence):
    """A D-vine over the order of the coordinates, cut off after `levels` trees: O(levels D).

    Tree j joins i and i-j, given those between. With F_j(i) = F(m_i | m_{i-1}, ..., m_{i-j}) and
    B_j(i) = F(m_{i-j} | m_{i-j+1}, ..., m_i), on the normal scale, the pair copula of tree j makes both out of F_{j-1}(i) and
    B_{j-1}(i-1); u_i = F_levels(i). Value to base goes tree by tree, for all i at once; base to value one i after another.

    Attributes:
        parameters: of the pair copulas, (levels, D): [j-1, i] joins i and i-j; those with i < j are not used.
        pair: the kind of all pair copulas.

    Source: Bedford & Cooke (2002); Aas, Czado, Frigessi & Bakken (2009), algorithm 2; truncation: Brechmann, Czado & Aas (2012).
    """

    parameters: Float[Array, "levels dim"]
    pair: AbstractPair = eqx.field(static=True)

    def couple(self, base: Array) -> tuple[Array, Array]:
        levels = len(self.parameters)

        def one(older: Array, at: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            number, forward, own = at
            seen, log_det = [], jnp.zeros(())
            for j in reversed(range(levels)):
                there = number > j
                found = jnp.where(there, self.pair.back(own[j], forward, older[j]), forward)
                slope = self.pair.onward(own[j], found, older[j])[1]
                log_det = log_det - jnp.where(there, slope, 0.0)
                forward = found
                seen.append(forward)
            seen.reverse()  # F_0(i), ..., F_{levels-1}(i)
            backward = [self.pair.onward(own[j], older[j], seen[j])[0] for j in range(levels - 1)]
            return jnp.stack([seen[0], *backward]), (seen[0], log_det)

        places = (jnp.arange(len(base)), base, self.parameters.T)
        _, (value, log_det) = jax.lax.scan(one, jnp.zeros(levels, base.dtype), places)
        return value, jnp.sum(log_det)

    def decouple(self, value: Array) -> tuple[Array, Array]:
        forward, backward, log_det = value, value, jnp.zeros(())
        for j, own in enumerate(self.parameters):
            older = jnp.concatenate([jnp.zeros(1, value.dtype), backward[:-1]])
            there = jnp.arange(len(value)) > j
            found, slope = self.pair.onward(own, forward, older)
            backward = self.pair.onward(own, older, forward)[0]
            forward = jnp.where(there, found, forward)
            log_det = log_det + jnp.sum(jnp.where(there, slope, 0.0))
        return forward, log_det
