"""Gradient strategies: one per site, each adds its own surrogate, whose gradient is its share of eq. 8/11."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._errors import FitError, TargetError, message, nearest
from hivi._factored import Factored
from hivi._families.base import AbstractProposal, Conditional
from hivi._locality.place import along_axis, sums_along
from hivi._space import Latents, Site
from hivi._target.base import Target
from hivi._tree import Key, PyTree

MOST_REDRAWS = 256
"""Draws of all that depends on a variable, for each draw of it, beyond which a strategy is refused."""
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

    def moved(self, site: str, value: Array) -> Part:
        """The same with a site at other values, in every view."""
        if site not in self.factored.program.sites:
            return self
        views = tuple((names, {**z, site: value}) for names, z in self.views)
        found = [(names, self.factored.terms(z, *self.rest)) for names, z in views]
        terms = [
            next(terms[k] for names, terms in found if names is None or f.name in names)
            for k, f in enumerate(self.factored.factors)
        ]
        return self._replace(views=views, terms=terms)


class Evaluation(NamedTuple):
    """One draw, evaluated: what a strategy may look at.

    Attributes:
        z: the draw.
        parts: log p and -log q there.
        key: randomness for strategies that draw more.
        local: whether the bound is linear in the log-weight, so that terms which do not touch z_i may be left out.
        memory: what the strategy has learnt in earlier steps.
        rows: for a bound that is taken row by row: site -> its axis of rows, and their number.
        above: for a variable on which other draws depend: the log-weight at another value of it, with all that
            depends on it drawn anew. Its signal is the whole log-weight.
    """

    z: Latents
    parts: tuple[Part, ...]
    key: Key | None = None
    local: bool = True
    memory: PyTree = ()
    rows: Mapping[str, tuple[int, int]] | None = None
    above: Callable[[Array], Array] | None = None

    def total(self) -> Array:
        """The log-weight log p - log q; a scalar."""
        return sum((p.sign * p.factored.total(p.terms) for p in self.parts), jnp.zeros(()))

    def moved(self, site: str, value: Array) -> Evaluation:
        """The same with all coordinates of a site at other values."""
        parts = tuple(p.moved(site, value) for p in self.parts)
        return self._replace(z={**self.z, site: value}, parts=parts)

    def change(self, site: str, value: Array) -> Array:
        """What becomes of each coordinate's signal when the whole site moves, (*site shape).

        For a bound that is not linear, the change of the whole log-weight, or of its row's, for every coordinate.
        """
        if self.above is not None:
            return jnp.broadcast_to(self.above(value) - self.total(), value.shape)
        after = self.moved(site, value)
        if self.local:
            return after.signal(site) - self.signal(site)
        if self.rows is not None:
            axis, _ = self.rows[site]
            change = after.row_weights(site) - self.row_weights(site)
            return jnp.broadcast_to(jnp.expand_dims(change, [k for k in range(value.ndim) if k != axis]), value.shape)
        return jnp.broadcast_to(after.total() - self.total(), value.shape)

    def row_weights(self, site: str) -> Array:
        """For every row of a site, the sum of the terms that touch any of its coordinates."""
        assert self.rows is not None
        axis, size = self.rows[site]
        out = jnp.zeros(size)
        for part in self.parts:
            for factor, term in zip(part.factored.factors, part.terms, strict=True):
                entry = along_axis(factor, site, axis, size)
                if entry is not None:
                    out = out + part.sign * factor.weight * sums_along(term, entry, size)
        return out

    def derivative(self, site: str, direction: Array) -> tuple[Array, Array]:
        """Of log p, between the values of a site: along a direction, local like `signal`, and with respect to each coordinate.

        Both are 0 where any derivative at this draw is not finite.

        Raises:
            TypeError: log p uses the values as integers.
        """
        part, at = self.parts[0], self.z[site].astype(jnp.result_type(float))
        moved = functools.partial(part.moved, site)
        _, tangents = jax.jvp(lambda v: moved(v).terms, (at,), (direction.astype(at.dtype),))
        along = part.sign * part.factored.signal(site, at.shape, tangents)
        each = part.sign * jax.grad(lambda v: part.factored.total(moved(v).terms))(at)
        good = jnp.all(jnp.isfinite(each))
        return jnp.where(good, along, 0.0), jnp.where(good, each, 0.0)

    def signal(self, site: str) -> Array:
        """f_i of eq. 8/11: the terms of log p, log r and log q that touch each coordinate of a site."""
        shape = self.z[site].shape
        if self.above is not None:
            return jnp.broadcast_to(self.total(), shape)
        found = [
            p.sign * p.factored.signal(site, shape, p.terms) for p in self.parts if site in p.factored.program.sites
        ]
        return sum(found, jnp.zeros(shape))

    def differences(self, site: str, moved: Array, numbers: Sequence[Collection[int]] | None = None) -> Array:
        """Change of log p - log q when one coordinate moves, (moves, *site shape); of some factors of each part, if named."""
        if self.above is not None:
            return _redraws(self.above, self.z[site], moved) - self.total()
        which = [None] * len(self.parts) if numbers is None else numbers
        found = [
            p.sign * p.factored.differences(site, moved, z, *p.rest, among=names, numbers=n)
            for p, n in zip(self.parts, which, strict=True)
            if site in p.factored.program.sites
            for names, z in p.views
        ]
        return sum(found, jnp.zeros(moved.shape))


def _redraws(above: Callable[[Array], Array], z: Array, moved: Array) -> Array:
    """The log-weight with one coordinate at a time moved: as many draws as there are moves and coordinates."""
    coordinates = jnp.tile(jnp.arange(z.size), moved.shape[0])

    def one(move: tuple[Array, Array]) -> Array:
        number, value = move
        return above(z.reshape(-1).at[number].set(value).reshape(z.shape))

    return jax.lax.map(one, (coordinates, moved.reshape(-1)), batch_size=8).reshape(moved.shape)


class AbstractStrategy(eqx.Module):
    """How the gradient passes through the draws of one site."""

    detached: eqx.AbstractClassVar[bool]
    closed: ClassVar[bool] = False
    landing: ClassVar[bool] = False

    @property
    def whole(self) -> bool:
        """Whether it can serve a variable on which other draws depend."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether it learns from step to step (`start`, `learn`)."""
        return False

    def redraws(self, site: Site) -> int:
        """Draws that it makes anew of all that depends on a variable, for each draw of it."""
        return 0

    def start(self, conditional: Conditional, key: Key) -> PyTree:
        """What it remembers of a site before the first step."""
        return ()

    def learn(self, memory: PyTree, measured: PyTree) -> PyTree:
        """What it remembers after a step; leading axes of `measured`: (samples, outer, branches)."""
        return memory

    def unsuited(self, site: Site, proposal: AbstractProposal, bound: AbstractBound) -> str | None:
        """Why it cannot serve a site under this family and bound, or None if it can."""
        return None

    @abc.abstractmethod
    def refusal(self, site: Site, conditional: Conditional | None) -> str | None:
        """Why this strategy cannot serve a site, or None if it can."""

    @abc.abstractmethod
    def measure(self, site: str, conditional: Conditional, evaluation: Evaluation) -> PyTree:
        """What one draw contributes, as arrays; values fixed, only q(z|lambda) differentiable."""

    @abc.abstractmethod
    def surrogate(self, measured: PyTree, increment: Increment) -> Array:
        """Scalar per sample whose gradient is this site's score term; leading axes (samples, outer, branches)."""


class Average(eqx.Module):
    """An exponential moving average, without the bias of its start.

    Attributes:
        total: weighted sum of what came.
        weight: sum of its weights.
    """

    total: Array
    weight: Array

    def mean(self) -> Array:
        """The average; 0 before anything came."""
        return self.total / jnp.maximum(self.weight, 1e-12)

    def after(self, value: Array, decay: float) -> Average:
        """The average with one more value."""
        return Average(decay * self.total + (1 - decay) * value, decay * self.weight + (1 - decay))


def nothing(shape: tuple[int, ...] = ()) -> Average:
    """An average of nothing yet."""
    return Average(jnp.zeros(shape), jnp.zeros(()))


def others(signal: Array) -> Array:
    """Mean over the other draws of a step (axes samples and outer); 0 where there is none."""
    draws = signal.shape[0] * signal.shape[1]
    return (jnp.sum(signal, (0, 1), keepdims=True) - signal) / max(draws - 1, 1)


class AbstractBaseline(eqx.Module):
    """What is subtracted from a coordinate's signal: anything that does not depend on that coordinate's draw."""

    remembers: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def start(self, conditional: Conditional, key: Key) -> PyTree:
        """What it remembers before the first step."""

    @abc.abstractmethod
    def predict(self, memory: PyTree, conditional: Conditional) -> PyTree:
        """What one draw of lambda and the past say about the signal; values fixed."""

    @abc.abstractmethod
    def value(self, signal: Array, predicted: PyTree) -> Array:
        """The baselines of all draws, like `signal`: (samples, outer, branches, *site shape)."""

    @abc.abstractmethod
    def learn(self, memory: PyTree, signal: Array, predicted: PyTree) -> PyTree:
        """What it remembers after a step."""


class AbstractEstimator(eqx.Module):
    """Assigns a strategy to every site."""

    @abc.abstractmethod
    def resolve(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, AbstractStrategy]:
        """Site -> strategy.

        Raises:
            FitError: a site that no permitted strategy can serve.
        """

    def undecided(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> tuple[str, ...]:
        """Sites whose strategy is to be settled by measurement (`measured.settle`), after a warm-up with what `resolve` says."""
        return ()


class Fixed(AbstractEstimator):
    """The strategies that a user named: one for all sites where it is eligible, or a dict by site.

    Sites that a dict does not name, and continuous sites that a single strategy cannot serve, get `otherwise`'s choice. A dict
    may also name the family's own discrete variables (`hivi.Codes`: "code of z"), which a single strategy leaves alone.
    """

    strategies: Any = eqx.field(static=True)
    otherwise: AbstractEstimator

    def resolve(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, AbstractStrategy]:
        conditionals = abstract_conditionals(proposal)
        known = {s.name: s for s in (*target.sites, *proposal.above)}
        above = {*proposal.upstream, *(s.name for s in proposal.above)}

        def reason_for(site: Site, strategy: AbstractStrategy) -> str | None:
            if site.name in above and not strategy.whole:
                return "other draws depend on it, and this strategy takes them as they are"
            if site.name in above and strategy.redraws(site) > MOST_REDRAWS:
                return f"other draws depend on it, and {strategy.redraws(site)} moves would draw all of them anew"
            return strategy.refusal(site, conditionals.get(site.name)) or strategy.unsuited(site, proposal, bound)

        out = self.otherwise.resolve(target, proposal, bound)
        if isinstance(self.strategies, Mapping):
            for name in self.strategies:
                _check_name(name, list(known))
            wanted = dict(self.strategies)
        else:
            suited = [s.name for s in target.sites if s.discrete or not reason_for(s, self.strategies)]
            # Nowhere at home: say why, where it is not only the kind of the sites.
            kind = [s.name for s in target.sites if not self.strategies.refusal(s, conditionals.get(s.name))]
            wanted = dict.fromkeys(suited or kind, self.strategies)
        for name, strategy in wanted.items():
            reason = reason_for(known[name], strategy)
            if reason is None and strategy.closed and name not in target.closed:
                reason = "the target does not say that log p meets this site through its means alone"
            if reason:
                cure = "leave the site out, and hivi chooses"
                if not isinstance(self.strategies, Mapping):
                    cure = "name the sites that it suits, estimator={'...': ...}, or use estimator=hivi.Auto()"
                found = f"the estimator {type(strategy).__name__}(): {reason}"
                raise FitError(message(f"site {name!r}", found, "a strategy that can serve it", cure))
            out[name] = strategy
        return out

    def undecided(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> tuple[str, ...]:
        if not isinstance(self.strategies, Mapping):
            return ()
        return tuple(n for n in self.otherwise.undecided(target, proposal, bound) if n not in self.strategies)


def _check_name(name: str, known: list[str]) -> None:
    if name not in known:
        cure = nearest(name, known, "correct the name")
        raise TargetError(message(f"site {name!r} of the estimator", "no such latent", f"one of {known}", cure))


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
