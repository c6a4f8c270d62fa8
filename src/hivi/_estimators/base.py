"""Gradient strategies: one per site, each adds its own surrogate, whose gradient is its share of eq. 8/11."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._errors import FitError, message
from hivi._factored import Factored
from hivi._families.base import AbstractProposal, Conditional
from hivi._space import Latents, Site
from hivi._target.base import Target
from hivi._tree import PyTree

Increment = Callable[[Array], Array]
"""Change of one draw's log-weight (samples, outer, branches, ...) -> change of the bound, same shape."""


class Part(NamedTuple):
    """A share of log p - log q at one draw.

    Attributes:
        sign: +1 for log p, -1 for log q.
        factored: its factors.
        terms: their arrays at the draw.
        views: pairs (names of terms, None for all; the latents at which they are evaluated).
        rest: the factors' other arguments.
    """

    sign: float
    factored: Factored
    terms: list[Array]
    views: tuple[tuple[frozenset[str] | None, Latents], ...]
    rest: tuple[PyTree, ...] = ()


class Evaluation(NamedTuple):
    """One draw, evaluated: what a strategy may look at."""

    z: Latents
    parts: tuple[Part, ...]

    def signal(self, site: str) -> Array:
        """f_i of eq. 8/11: the terms of log p, log r and log q that touch each coordinate of a site."""
        shape = self.z[site].shape
        found = [
            p.sign * p.factored.signal(site, shape, p.terms) for p in self.parts if site in p.factored.program.sites
        ]
        return sum(found, jnp.zeros(shape))

    def differences(self, site: str, moved: Array) -> Array:
        """Change of log p - log q when one coordinate moves, (moves, *site shape)."""
        found = [
            p.sign * p.factored.differences(site, moved, z, *p.rest, among=names)
            for p in self.parts
            if site in p.factored.program.sites
            for names, z in p.views
        ]
        return sum(found, jnp.zeros(moved.shape))


class AbstractStrategy(eqx.Module):
    """How the gradient passes through the draws of one site."""

    detached: eqx.AbstractClassVar[bool]
    closed: ClassVar[bool] = False

    @abc.abstractmethod
    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        """Why this strategy cannot serve a site, or None if it can."""

    @abc.abstractmethod
    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        """What one draw contributes, as arrays; values fixed, only q(z|lambda) differentiable."""

    @abc.abstractmethod
    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        """Scalar per sample whose gradient is this site's score term; leading axes (samples, outer, branches)."""


class AbstractEstimator(eqx.Module):
    """Assigns a strategy to every site."""

    @abc.abstractmethod
    def resolve(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, AbstractStrategy]:
        """Site -> strategy.

        Raises:
            FitError: a site that no permitted strategy can serve.
        """


class Fixed(AbstractEstimator):
    """The strategies that a user named: one for all sites where it is eligible, or a dict by site.

    Sites that a dict does not name, and continuous sites that a single strategy cannot serve, get `otherwise`'s choice.
    """

    strategies: Any = eqx.field(static=True)
    otherwise: AbstractEstimator

    def resolve(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, AbstractStrategy]:
        conditionals = abstract_conditionals(proposal)
        out = self.otherwise.resolve(target, proposal, bound)
        if isinstance(self.strategies, Mapping):
            for name in self.strategies:
                target.site(name)
            wanted = dict(self.strategies)
        else:
            wanted = {s.name: self.strategies for s in target.sites if s.discrete or not self._reason(s, conditionals)}
        for name, strategy in wanted.items():
            reason = strategy.refusal(target.site(name), conditionals.get(name))
            if reason is None and strategy.closed and name not in target.closed:
                reason = "the target does not say that log p meets this site through its means alone"
            if reason:
                raise FitError(
                    message(
                        f"site {name!r}",
                        f"the estimator {type(strategy).__name__}(): {reason}",
                        "a strategy that can serve it",
                        "use estimator=hivi.Auto()",
                    )
                )
            out[name] = strategy
        return out

    def _reason(self, site: Site, conditionals: Mapping[str, Conditional]) -> str | None:
        reason: str | None = self.strategies.refusal(site, conditionals.get(site.name))
        return reason


def abstract_conditionals(proposal: AbstractProposal) -> dict[str, Conditional]:
    """q(z|lambda) of every site, with shapes instead of arrays."""
    arrays, static = eqx.partition(proposal, eqx.is_array)

    def find(a: PyTree) -> dict[str, Array]:
        p = eqx.combine(a, static)
        _, context = p.propose(jax.random.key(0))
        found.update({n: c.likelihood for n, c in p.conditionals(context).items()})
        return {n: c.lam for n, c in p.conditionals(context).items()}

    found: dict[str, Any] = {}
    lam = jax.eval_shape(find, arrays)
    return {n: Conditional(found[n], lam[n]) for n in lam}
