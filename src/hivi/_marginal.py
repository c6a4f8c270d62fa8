"""How good the marginal q(z) is: Pareto k-hat of p(x,z)/q(z), and a ladder of ever tighter bounds."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hivi._arviz import before_one, load_arviz
from hivi._bounds import AbstractBound, Elbo, ImportanceWeighted
from hivi._compile import compiled
from hivi._errors import FitError, HiviError, message
from hivi._families.base import AbstractProposal
from hivi._fit.result import Estimate, Fit
from hivi._space import Latents
from hivi._target.base import Target, full_size
from hivi._tree import Key

TRUSTED = 0.7
"""Above this k-hat, importance weights have no useful mean (Vehtari et al. 2024)."""
INNER = 64
"""Draws of lambda in one replicate of the estimate of q(z)."""
REPLICATES = 64
"""Most replicates: the estimate takes up to 4096 draws of lambda per z."""
NOISE = 0.1
"""Noise of log q, in nats, with which the estimate is content."""
BATCH = 64
FEW, HARMLESS = 4, 0.1
"""Distinct weights that are too few for PSIS to fit a tail; the standard error that their share of the weight may have."""


class KHat(NamedTuple):
    """Pareto k-hat of the weights p(x,z)/q(z), with q(z) the marginal density of z.

    Attributes:
        value: the shape of the weights' tail. Up to 0.5 q is close to the posterior, up to 0.7 its draws are good after
            reweighting, above not even then. Weights without a tail (all of the largest are equal) count as 0.
        exact: whether log q(z) is the family's exact density; otherwise it is an average over draws of lambda.
        noise: root mean square standard error of that log q, in nats; it adds to the tail. 0 where it is exact.
        samples: number of draws of z.
        inner: draws of lambda per z; 0 where log q is exact.
    """

    value: float
    exact: bool
    noise: float
    samples: int
    inner: int

    @property
    def trusted(self) -> bool:
        """Whether draws from q are good, at least after reweighting: k-hat up to 0.7."""
        return self.value <= TRUSTED

    def __str__(self) -> str:
        how = "exact log q" if self.exact else f"log q from {self.inner} draws of lambda, ± {self.noise:.2g} nats"
        return f"k-hat {self.value:.2f} ({how}; {self.samples} draws)"


class Rung(NamedTuple):
    """One bound of a ladder: the bound, and its estimate in nats."""

    bound: AbstractBound
    estimate: Estimate


class Ladder(NamedTuple):
    """Bounds on log p(x), loosest first: the distance between the first and the best is visible slack.

    Attributes:
        rungs: the bounds.
        skipped: bounds that the family or the target cannot have, with the reason.
    """

    rungs: tuple[Rung, ...]
    skipped: dict[str, str]

    @property
    def gap(self) -> Estimate:
        """The highest bound minus the first, in nats: the ELBO is at least so far from log p(x)."""
        first, best = self.rungs[0].estimate, max((r.estimate for r in self.rungs), key=lambda e: e.mean)
        return Estimate(best.mean - first.mean, 0.0 if best is first else float(np.hypot(best.stderr, first.stderr)))

    def __str__(self) -> str:
        lines = [f"{r.bound!s:<42} {r.estimate}" for r in self.rungs]
        return "\n".join(lines + [f"{name:<42} {why}" for name, why in self.skipped.items()])


def marginal_khat(fit: Fit, *, key: Key, samples: int = 1000) -> KHat:
    r"""Pareto k-hat of `p(x,z) / q(z)` at draws of q, where q(z) is the *marginal* density.

    A hierarchical family has `q(z) = integral q(z|lambda) q(lambda) d lambda`. The ratio that its bound uses also has
    r(lambda|z) in it, and would blame q for the faults of r; here log q(z) is `AbstractProposal.log_density`, the mean
    of `q(z,lambda_k)/r(lambda_k|z)` over draws `lambda_k ~ r(lambda|z)`, of which as many are taken (256 to 4096) as bring
    its noise below 0.1 nats. Families with a density give it exactly.

    Args:
        fit: a fit with its target, whole data.
        key: a JAX random key.
        samples: draws of z, at least 100.

    Returns:
        k-hat by Pareto-smoothed importance sampling (ArviZ's), and how log q was found.

    Raises:
        FitError: no target, minibatches or streamed data, too few samples, or weights that are not numbers.

    Example:
        >>> import hivi, jax
        >>> from hivi.diagnostics import marginal_khat
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, {"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=1500, progress=False)
        >>> found = marginal_khat(fit, key=jax.random.key(1))
        >>> found.exact, found.value < 0.7
        (True, True)

    Source:
        Vehtari, Simpson, Gelman, Yao & Gabry 2024 (k-hat); Yao, Vehtari, Simpson & Gelman 2018 (of a variational q).
    """
    target = _whole_target("marginal_khat", fit)
    if fit.proposal.points >= {s.name for s in fit.sites}:
        found, cure = "a point for every site", "fit a family with a spread to one of them"
        raise FitError(message("marginal_khat", found, "a distribution of draws", cure))
    if samples < 100:
        raise FitError(message("marginal_khat(samples=...)", str(samples), "at least 100", "ask for more samples"))
    k_draw, k_density = jax.random.split(key)
    z, log_p = weighed_draws(fit.proposal, target, k_draw, samples)
    log_q, noise, inner = _log_density(fit.proposal, target, z, k_density)
    log_w = np.asarray(log_p, np.float64) - log_q
    if not np.isfinite(log_q).all():
        found = f"log q(z) that is not finite at {np.sum(~np.isfinite(log_q))} of {samples} draws of q itself"
        cure = (
            "its own density overflows: fit again with a lower learning_rate, or in float64"
            if inner == 0
            else "r(lambda|z) misses the lambdas that q draws from: fit longer, or take another auxiliary"
        )
        raise FitError(message("marginal_khat", found, "a finite density at every draw", cure))
    if np.isnan(log_w).any() or np.isposinf(log_w).any() or np.isneginf(log_w).all():
        cure = "check the model there (a log of zero, an impossible value)"
        raise FitError(message("marginal_khat", "log p - log q that is no number at draws of q", "finite ones", cure))
    return KHat(pareto_khat(log_w), inner == 0, noise, samples, inner)


def bound_ladder(
    fit: Fit, *, key: Key, samples: int = 4096, inner: Sequence[int] = (8, 64), outer: Sequence[int] = (8, 64)
) -> Ladder:
    """The ELBO beside tighter bounds of the same fit, so that its gap is visible.

    `ImportanceWeighted(outer=1, inner=K)` removes the slack of r (it rises to the ELBO of the marginal q(z)), and
    `ImportanceWeighted(outer=K)` that of q (it rises to log p(x)).

    Args:
        fit: a fit with its target.
        key: a JAX random key.
        samples: estimates of the ELBO; bounds of K draws take a Kth of it, at least 128.
        inner: numbers K of extra draws of lambda; left out for families with an exact density.
        outer: numbers K of draws of z.

    Raises:
        FitError: no target.

    Example:
        >>> import hivi, jax
        >>> from hivi.diagnostics import bound_ladder
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 4, {"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=1500, progress=False)
        >>> ladder = bound_ladder(fit, key=jax.random.key(1))
        >>> [rung.bound.draws for rung in ladder.rungs], ladder.gap.mean > 0
        ([1, 8, 64], True)

    Source:
        Sobolev & Vetrov 2019 (inner); Burda, Grosse & Salakhutdinov 2016 (outer).
    """
    bounds: list[AbstractBound] = [Elbo()]
    if fit.target is None or not has_density(fit, key):
        bounds += [ImportanceWeighted(1, k) for k in inner]
    bounds += [ImportanceWeighted(k, 0) for k in outer]
    rungs, skipped = [], {}
    for bound in bounds:
        try:
            count = max(128, samples // (bound.draws * (bound.inner + 1)))
            rungs.append(Rung(bound, fit.elbo(key, count, bound)))
        except HiviError as error:
            if not rungs:
                raise
            skipped[str(bound)] = str(error)
    return Ladder(tuple(rungs), skipped)


def has_density(fit: Fit, key: Key) -> bool:
    """Whether the family has log q(z) itself: two estimates at the same draws, with different keys, are equal."""
    if fit.target is None or fit.target.source is not None:
        return False
    z, _ = weighed_draws(fit.proposal, fit.target, key, 4)
    first, second = (_densities(fit.proposal, fit.target, z, jax.random.fold_in(key, k)) for k in range(2))
    return bool(jnp.all(first == second))


def pareto_khat(log_w: Float[np.ndarray, " samples"]) -> float:
    """Shape of the tail of importance weights, by the PSIS of the ArviZ that is installed.

    Args:
        log_w: logarithms of the weights, up to a constant; -inf for a weight of zero.

    Returns:
        k-hat; 0 where the largest weights are all equal, so that there is no tail to fit.
    """
    ordered, tail = np.sort(log_w), _tail(len(log_w))
    if ordered[-1] - ordered[-tail] < 1e-5:
        return 0.0
    if len(log_w) > tail and len(np.unique(log_w[log_w > ordered[-tail - 1] + 1e-5].round(4))) <= FEW:
        return _khat_of_ties(log_w, ordered[-tail - 1])
    return _psis(log_w)


def _khat_of_ties(log_w: Float[np.ndarray, " samples"], tied: float) -> float:
    """Weights of discrete draws come in ties, where PSIS, which looks at what exceeds the tied value, finds too few to fit.

    Those few values are harmless unless their share of the weight is large and, resting on few draws, uncertain. Then the
    tail begins at the next lower value: enough copies of it are added that it is where PSIS cuts.
    """
    weights, above = np.exp(log_w - log_w.max()), log_w > tied + 1e-5
    if weights[above].sum() / weights.sum() > HARMLESS * np.sqrt(above.sum()):
        return np.inf
    lower = log_w[log_w < tied - 1e-5]
    if not len(lower):
        return 0.0
    rest = log_w[log_w > lower.max() + 1e-5]
    count = max(5 * len(rest), (len(rest) + 1) ** 2 // 9) + 10
    return _psis(np.concatenate([rest, np.full(count, lower.max())]))


def _psis(log_w: Float[np.ndarray, " samples"]) -> float:
    arviz = load_arviz()
    with np.errstate(over="ignore"):  # where all of the tail is nearly equal
        if before_one(arviz):
            return float(arviz.psislw(log_w)[1])
        stats = importlib.import_module("arviz_stats.base")
        return float(stats.array_stats.psislw(-log_w)[1])  # from 1.0 on it takes log-likelihoods, as leave-one-out does


def _tail(samples: int) -> int:
    """How many of the largest weights PSIS looks at."""
    return int(np.ceil(min(0.2 * samples, 3 * np.sqrt(samples))))


def _whole_target(where: str, fit: Fit) -> Target:
    if fit.target is None:
        cure = "hivi.load(folder, target=target)"
        raise FitError(message(where, "a run loaded without its target", "the target", cure))
    if fit.target.source is not None or not full_size(fit.target):
        cure = "make the target without subsample=... and go on with fit(start=...)"
        raise FitError(message(where, "minibatches, where log p is not known", "whole data", cure))
    return fit.target


@compiled
def weighed_draws(proposal: AbstractProposal, target: Target, key: Key, samples: int) -> tuple[Latents, Array]:
    """Draws of z in the engine's coordinates, and log p(x, z) there."""
    local = proposal.gather(target.all_rows())

    def one(k: Key) -> tuple[Latents, Array]:
        k1, k2 = jax.random.split(k)
        z, _ = local.propose(k2, jax.random.categorical(k1, local.log_weights()))
        return z, target.log_joint(z)

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=BATCH)


@compiled
def _densities(proposal: AbstractProposal, target: Target, z: Latents, key: Key) -> Array:
    local = proposal.gather(target.all_rows())
    keys = jax.random.split(key, next(iter(z.values())).shape[0])
    return jax.lax.map(lambda a: local.log_density(a[0], a[1], INNER), (z, keys), batch_size=BATCH)


def _log_density(
    proposal: AbstractProposal, target: Target, z: Latents, key: Key
) -> tuple[Float[np.ndarray, " samples"], float, int]:
    """Log q(z) of every draw, its noise in nats, and the draws of lambda that it took (0: exact)."""
    found: list[np.ndarray] = []
    count, noise = 4, np.inf
    while noise > NOISE and count <= REPLICATES:
        for number in range(len(found), count):
            value = _densities(proposal, target, z, jax.random.fold_in(key, number))
            found.append(np.asarray(value, np.float64))
            if number == 1 and np.array_equal(found[0], found[1]):
                return found[0], 0.0, 0
        values = np.stack(found)
        top = values.max(0)
        if np.isneginf(top).any():  # no draw of lambda that could have made this z: more will not help
            return top, np.inf, INNER * len(found)
        share = np.exp(values - top)
        errors = share.std(0, ddof=1) / share.mean(0) / np.sqrt(len(found))
        noise = float(np.sqrt(np.mean(errors**2)))
        count *= 2
    return top + np.log(share.mean(0)), noise, INNER * len(found)
