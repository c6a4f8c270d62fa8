"""NumPyro's NUTS on a target's own log-joint: a reference for the means and spreads of fits."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from hivi._comparison import RHAT, Against, Reference
from hivi._compile import compiled
from hivi._fit.result import Fit
from hivi._marginal import weighed_draws
from hivi._space import Latents
from hivi._target.base import Target, full_size
from hivi._tree import Key

CHAINS = 4
DRAWS = 8192
"""Draws of q for its moments."""

Draws = dict[str, np.ndarray]
"""Site -> draws in the engine's coordinates."""


def run_nuts(target: Target, start: Fit, key: Key, warmup: int, draws: int) -> tuple[Reference, Draws]:
    """Four chains of NUTS from draws of a fit, in unconstrained coordinates.

    Args:
        target: continuous latents only, whole data.
        start: where the chains start: at draws of it.
        key: a JAX random key.
        warmup: steps of adaptation of each chain.
        draws: draws of each chain after that.

    Returns:
        What it found, and the draws, chains one after the other; none where NUTS cannot run, with the reason.

    Source:
        Hoffman & Gelman 2014; Phan, Pradhan & Jankowiak 2019 (NumPyro).
    """
    problem = _unsuitable(target)
    if problem:
        return _without(problem, 0.0), {}
    began = time.monotonic()
    k_start, k_run = jax.random.split(key)
    first, _ = weighed_draws(start.proposal, target, k_start, CHAINS)
    sampler = MCMC(
        NUTS(potential_fn=lambda z: -target.log_joint(z), target_accept_prob=0.9),
        num_warmup=warmup, num_samples=draws, num_chains=CHAINS, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    try:
        sampler.run(k_run, init_params=first, extra_fields=("diverging",))
    except Exception as error:  # the families' results are worth more than its traceback
        return _without(f"failed ({type(error).__name__}: {str(error)[:200]})", time.monotonic() - began), {}
    chains = {n: np.asarray(x, np.float64) for n, x in sampler.get_samples(group_by_chain=True).items()}
    r_hat = max(float(np.max(split_gelman_rubin(x))) for x in chains.values())
    ess = min(float(np.min(effective_sample_size(x))) for x in chains.values())
    divergences = int(np.sum(sampler.get_extra_fields()["diverging"]))
    flat = {n: x.reshape(-1, *x.shape[2:]) for n, x in chains.items()}
    own = {n: np.asarray(x, np.float64) for n, x in _constrained(target, _as_arrays(flat)).items()}
    doubts = [] if r_hat <= RHAT else [f"its chains disagree (r-hat above {RHAT}): no firm reference"]
    doubts += [] if not divergences else ["divergent transitions: it may miss part of the posterior"]
    means, sds = ({n: f(x, axis=0) for n, x in own.items()} for f in (np.mean, np.std))
    seconds = time.monotonic() - began
    return Reference(means, sds, r_hat, ess, divergences, CHAINS * draws, seconds, "; ".join(doubts)), flat


def against(fit: Fit, reference: Draws, key: Key) -> Against:
    """Means and standard deviations of a fit's draws beside those of NUTS, in unconstrained coordinates.

    Args:
        fit: a fit with its target.
        reference: what `run_nuts` drew.
        key: a JAX random key.
    """
    assert fit.target is not None
    drawn, _ = weighed_draws(fit.proposal, fit.target, key, DRAWS)
    errors: list[tuple[float, str]] = []
    ratios: list[tuple[float, str]] = []
    for name, exact in reference.items():
        mine = np.asarray(drawn[name], np.float64)
        sd = exact.std(0)
        error, ratio = np.abs(mine.mean(0) - exact.mean(0)) / sd, np.log(mine.std(0) / sd)
        for index in np.ndindex(sd.shape):
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            errors.append((float(error[index]), label))
            ratios.append((float(ratio[index]), label))
    worst, widest = max(errors), max(ratios, key=lambda r: abs(r[0]))
    return Against(*worst, *widest)


def _unsuitable(target: Target) -> str:
    discrete = [s.name for s in target.sites if s.discrete]
    if discrete:
        return f"needs continuous latents only, and {', '.join(map(repr, discrete))} is discrete"
    if target.source is not None or not full_size(target):
        return "needs whole data, and this target has minibatches"
    return ""


def _without(problem: str, seconds: float) -> Reference:
    return Reference({}, {}, math.nan, 0.0, 0, 0, seconds, problem)


def _as_arrays(draws: Draws) -> Latents:
    return {n: jnp.asarray(x, jnp.result_type(float)) for n, x in draws.items()}


@compiled
def _constrained(target: Target, draws: Latents) -> Latents:
    return jax.vmap(target.constrain)(draws)
