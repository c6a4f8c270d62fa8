"""Is q at odds with the conditionals of p? A Gibbs step leaves p as it is, and what it does to q shows where q is wrong.

For each discrete coordinate, E_q[p(z_i = v | the other latents)] is held against q(z_i = v): equal where q is the posterior. A
mode that q never visits shows here, as long as one coordinate alone leads to it.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._compile import compiled
from hivi._estimators.cost import operations
from hivi._fit.result import Fit
from hivi._marginal import weighed_draws
from hivi._space import Latents, Site, Values
from hivi._target.base import Target
from hivi._tree import Key

DRAWS = 512
SURE, WORTH = 2.0, 0.1
"""Total variations are named above this, and so many times what noise alone gives."""
MOST = 1e9
"""Elementary operations at most for one site; where it would take more, nothing is looked at."""
TABLE, NARROW, SINGLE, STRIDE = 1024, 48, 32, 1.15
"""Longest table of which every value is tried; most cells where q draws; single lowest values; growth of the cells beyond."""


class Odds(NamedTuple):
    """Where q and the conditionals of p differ most at one site.

    Attributes:
        site: its name.
        at: the coordinate.
        low, high: the values, from low to high.
        q: their probability in q.
        given: their mean probability given all other latents.
        apart: total variation between q of the coordinate and its mean conditional.
        noise: how large that would be by the noise of the draws alone.
    """

    site: str
    at: tuple[int, ...]
    low: int
    high: int
    q: float
    given: float
    apart: float
    noise: float

    @property
    def clear(self) -> bool:
        """Whether it is worth a word, and beyond noise."""
        return self.apart > WORTH + SURE * self.noise

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.at))}]" if self.at else ""
        values = str(self.low) if self.low == self.high else f"{self.low} to {self.high}"
        return (
            f"it is at odds with the model at {self.site}{at}: given all else {values} has probability {self.given:.2f}, in q "
            f"{self.q:.2f} (total variation over all values {self.apart:.2f})"
        )


def odds(fit: Fit, key: Key) -> list[Odds]:
    """The worst coordinate of every discrete site that is not too dear to look at; nothing of minibatches.

    Args:
        fit: a fit with its target.
        key: a JAX random key.
    """
    target = fit.target
    if target is None or target.plates or target.source is not None:
        return []
    z, _ = weighed_draws(fit.proposal, target, key, DRAWS)
    return [found for s in target.sites if s.discrete and (found := _at(target, s, z)) is not None]


def cells(values: Values, draws: np.ndarray) -> np.ndarray | None:
    """Lower ends of the cells into which a site's values are parted, and the end of the last; None where they cannot be narrow.

    Single values near the lowest and where q draws, or cells narrow beside its spread; wider ones beyond, whose mass is that of
    their middle times their number of values.

    Args:
        values: the site's.
        draws: of q, shape (draws, *site shape).
    """
    low, high, least, most = values.low, values.low + values.count, int(draws.min()), int(draws.max())
    if values.kind == "count":
        high = low + 10 * max(most - low, 1) + 100
    if high - low <= (TABLE if values.kind == "finite" else NARROW):
        return np.arange(low, high + 1)
    step = -(-(most - least + 1) // NARROW)
    if values.kind == "finite" or (step > 1 and step > 0.5 * draws.std(0).min()):
        return None
    away = np.cumsum(STRIDE ** np.arange(200)).astype(int)
    single, where = np.arange(low, low + SINGLE), np.arange(least, most + 1, step)
    found = np.unique(np.concatenate([single, where, most + 1 + away, least - away, np.array([low, high])]))
    return found[(found >= low) & (found <= high)]


def _at(target: Target, site: Site, z: Latents) -> Odds | None:
    if not np.prod(site.shape, initial=1):
        return None
    parted = cells(site.values, np.asarray(z[site.name]))
    if parted is None:
        return None
    ends, first = jnp.asarray(parted), jax.tree.map(lambda x: x[0], z)
    if operations(lambda t, v: _surplus(t, v, site.name, ends), target, first, roughly=True) * DRAWS > MOST:
        return None
    mean, error, now = (np.asarray(x, float).reshape(len(x), -1) for x in _averages(target, z, site.name, ends))
    apart, noise = 0.5 * np.abs(mean).sum(0), 0.5 * np.sqrt(2 / np.pi) * error.sum(0)
    worst = int(np.argmax(apart - SURE * noise))
    cell = int(np.argmax(np.abs(mean[:, worst])))
    q, more = float(now[cell, worst]), float(mean[cell, worst])
    index = tuple(map(int, np.unravel_index(worst, site.shape)))
    low, high = int(parted[cell]), int(parted[cell + 1]) - 1
    return Odds(site.name, index, low, high, q, q + more, float(apart[worst]), float(noise[worst]))


def _surplus(target: Target, z: Latents, name: str, ends: Array) -> tuple[Array, Array]:
    """P(cell | all else) less the indicator of the draw's own cell, and that indicator: (cells, *site shape)."""
    own, middle = z[name], (ends[:-1] + ends[1:] - 1) // 2
    spread = (-1, *[1] * own.ndim)
    moved = jnp.broadcast_to(middle.reshape(spread), (len(middle), *own.shape)).astype(own.dtype)
    change = target.factored.differences(name, moved, z, target.data, target.all_rows())
    change = jnp.where(jnp.isnan(change), -jnp.inf, change) + jnp.log(jnp.diff(ends)).reshape(spread)
    here = (own >= ends[:-1].reshape(spread)) & (own < ends[1:].reshape(spread))
    return jax.nn.softmax(change, 0) - here, here * 1.0


Sums: TypeAlias = tuple[Array, Array, Array]


@compiled
def _averages(target: Target, z: Latents, name: str, ends: Array) -> tuple[Float[Array, "..."], ...]:
    """Means of the surplus and of the indicator over the draws, and the standard error of the former."""

    def add(total: Sums, one: Latents) -> tuple[Sums, None]:
        surplus, here = _surplus(target, one, name, ends)
        return (total[0] + surplus, total[1] + surplus**2, total[2] + here), None

    zero = jnp.zeros((len(ends) - 1, *z[name].shape[1:]))
    (first, second, here), _ = jax.lax.scan(add, (zero, zero, zero), z)
    mean = first / DRAWS
    return mean, jnp.sqrt(jnp.maximum(second / DRAWS - mean**2, 0.0) / DRAWS), here / DRAWS
