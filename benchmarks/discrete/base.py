"""What a problem of the suite is: a target twice, as a plain log-joint and as a plated NumPyro model, with its exact answers.

Exact answers are computed in float64 NumPy, by code that shares nothing with the JAX log-joint, when a problem is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import logsumexp

import hivi

LogJoint = Callable[[dict[str, Array]], Any]
Statistic = tuple[Callable[[Mapping[str, np.ndarray]], np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A posterior whose normaliser and marginals are known.

    Attributes:
        name: as on the command line.
        about: in one line, what it is and what is hard about it.
        latents: site -> `hivi.Latent`, in alphabetical order.
        log_joint: log p(x, z) of a dict of latents, without plates: a number, or a dict of terms.
        model: the same density as a NumPyro model with plates; takes no arguments.
        log_z: log p(x), in nats.
        marginals: site -> p(z_i = v | x) as an array (*site shape, values), lowest value first; counts up to `upper`. For a
            continuous site posterior mean and standard deviation, (*site shape, 2).
        table: p(z | x) over all values, one axis per coordinate in the order of the sites; None where it cannot be made.
        upper: largest count of the table; None where all supports are finite.
        tail: certified bound on the probability that lies outside the table.
        statistics: name -> (function of draws (samples, *site shape) by site, its exact expectation).
    """

    name: str
    about: str
    latents: dict[str, hivi.Latent]
    log_joint: LogJoint
    model: Callable[[], None]
    log_z: float
    marginals: dict[str, np.ndarray]
    table: np.ndarray | None = None
    upper: int | None = None
    tail: float = 0.0
    statistics: dict[str, Statistic] = dataclasses.field(default_factory=dict)

    def target(self, *, plated: bool = False) -> hivi.Target:
        """The problem as hivi sees it: from the log-joint, or from the NumPyro model."""
        return hivi.from_numpyro(self.model) if plated else hivi.from_log_joint(self.log_joint, self.latents)

    @property
    def coordinates(self) -> int:
        """Number of latent coordinates."""
        return sum(math.prod(latent.shape) for latent in self.latents.values())


def states(shape: tuple[int, ...]) -> Int[np.ndarray, "cells coordinates"]:
    """All cells of a table, in C order, one row per cell."""
    return np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), -1)


def spins(number: int) -> Float[np.ndarray, "cells number"]:
    """All 2^number configurations of spins -1, +1, in C order."""
    return 2.0 * states((2,) * number) - 1.0


def normalise(log_p: Float[np.ndarray, "*shape"]) -> tuple[float, Float[np.ndarray, "*shape"]]:
    """Log of the sum of exp(log_p), and the normalised table."""
    log_z = float(logsumexp(log_p))
    return log_z, np.exp(log_p - log_z)


def coordinate_marginals(table: np.ndarray) -> list[np.ndarray]:
    """The distribution of every coordinate of a table."""
    axes = range(table.ndim)
    return [table.sum(axis=tuple(k for k in axes if k != axis)) for axis in axes]


def site_marginals(table: np.ndarray, latents: Mapping[str, hivi.Latent]) -> dict[str, np.ndarray]:
    """The marginals of a table as arrays (*site shape, values) by site."""
    found, out, start = coordinate_marginals(table), {}, 0
    for name, latent in latents.items():
        stop = start + math.prod(latent.shape)
        out[name] = np.stack(found[start:stop]).reshape(*latent.shape, -1)
        start = stop
    return out


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """-log(1 + e^-x), without overflow."""
    return -np.logaddexp(0.0, -x)
