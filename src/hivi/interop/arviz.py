"""ArviZ: draws, likelihoods, predictions and the fit's statistics in the container that the installed ArviZ uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from hivi._arviz import before_one, load_arviz
from hivi._errors import FitError, message
from hivi._fit.result import Fit
from hivi._marginal import marginal_khat
from hivi._space import Site
from hivi._target.base import Observed, full_size
from hivi._tree import Key

LARGEST = 20_000_000
"""Most numbers in the log-likelihood or in the predictions, unless they are asked for."""
RESERVED = ("chain", "draw")

Arrays = dict[str, np.ndarray]
Groups = dict[str, Arrays]
Dims = dict[str, list[str]]


def to_arviz(
    fit: Fit,
    *,
    key: Key,
    samples: int = 1000,
    log_likelihood: bool | None = None,
    predictive: bool | None = None,
    khat: bool = False,
) -> Any:
    """Draws from q(z), what the model says at them, and the fit's statistics, for ArviZ's tables and plots.

    Groups: "posterior" (the draws, as one chain, with the model's deterministic values) and, where the target is a NumPyro
    model on whole data, "log_likelihood" (per observation), "posterior_predictive" and "observed_data". Plates become
    dimensions with coordinates. Of a plain log-joint, a model with minibatches, or a fit loaded without its target there
    are the draws alone.

    Args:
        fit: the fit.
        key: a JAX random key.
        samples: number of draws, at least 1.
        log_likelihood: whether to add it; None adds it up to 20 million numbers, if the model runs as it is (where it does
            not, the attribute "omitted" says why).
        predictive: whether to add predictions; None likewise.
        khat: whether to compute the k-hat of q (`hivi.diagnostics.marginal_khat`), which takes a while.

    Returns:
        `InferenceData` (ArviZ before 1.0) or `DataTree` (from 1.0 on). The attributes of "posterior" hold the family, the
        bound's last estimate in nats, whether the fit converged, steps, seconds, and k-hat if it was asked for.

    Raises:
        FitError: no samples were asked for, or a k-hat that cannot be had.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=100, progress=False)
        >>> data = hivi.to_arviz(fit, key=jax.random.key(1), samples=10)
        >>> data.posterior["x"].shape
        (1, 10)
    """
    if samples < 1:
        raise FitError(message("to_arviz(samples=...)", str(samples), "at least 1", "ask for more samples"))
    draws = fit.sample(key, samples)
    groups: Groups = {"posterior": {name: np.asarray(value) for name, value in draws.items()}}
    observed: dict[str, Observed] = {}
    attributes = _statistics(fit)
    if fit.target is not None and fit.target.origin is not None and full_size(fit.target):
        try:
            observed = _from_model(fit, draws, jax.random.fold_in(key, 1), groups, (log_likelihood, predictive))
        except Exception as error:  # whatever running the user's model raises; it was asked for only if True
            if log_likelihood or predictive:
                raise
            groups = {"posterior": groups["posterior"]}
            attributes["omitted"] = f"likelihoods and predictions, since the model does not run: {error}"
    small = [n for n, x in groups.get("posterior_predictive", {}).items() if x.ndim - 1 < observed[n].value.ndim]
    for name in small:  # say, one distribution and several observations, without a plate
        del groups["posterior_predictive"][name]
        attributes["omitted"] = f"predictions of {', '.join(small)}: one draw has not the shape of the observations"
    if khat:
        found = marginal_khat(fit, key=jax.random.fold_in(key, 2))
        attributes |= {"k_hat": found.value, "k_hat_exact": int(found.exact), "k_hat_noise": found.noise}
    dims, coords = _dimensions(fit.sites, observed, groups)
    return _container(groups, attributes, dims, coords)


def _from_model(
    fit: Fit, draws: dict[str, Array], key: Key, groups: Groups, wanted: tuple[bool | None, bool | None]
) -> dict[str, Observed]:
    """Fill the groups that take a run of the model; return its observed statements."""
    assert fit.target is not None
    assert fit.target.origin is not None
    data, origin = fit.target.data, fit.target.origin
    observed = origin.observed(data, draws)
    groups["observed_data"] = {name: found.value for name, found in observed.items()}
    samples = next(iter(groups["posterior"].values())).shape[0]
    small = samples * sum(max(found.value.size, 1) for found in observed.values()) <= LARGEST
    likelihood, predictive = (small if w is None else w for w in wanted)
    if likelihood and observed:
        found = origin.log_likelihood(data, draws)
        groups["log_likelihood"] = {name: np.asarray(value) for name, value in found.items()}
    if predictive:
        new = {name: np.asarray(value) for name, value in origin.predict(data, draws, key).items()}
        groups["posterior"] |= {n: x for n, x in new.items() if n not in observed and n not in groups["posterior"]}
        groups["posterior_predictive"] = {n: x for n, x in new.items() if n in observed}
    return observed


def _statistics(fit: Fit) -> dict[str, Any]:
    last = fit.history["elbo"][-100:]
    known = last[np.isfinite(last)]
    return {
        "inference_library": "hivi",
        "family": repr(fit.family) if len(repr(fit.family)) < 500 else type(fit.family).__name__,
        "bound": float(known.mean()) if known.size else float("nan"),
        "converged": int(fit.converged),
        "message": fit.message,
        "steps": len(fit.history["step"]),
        "seconds": float(fit.seconds),
    }


def _dimensions(
    sites: tuple[Site, ...], observed: Mapping[str, Observed], groups: Groups
) -> tuple[Dims, dict[str, np.ndarray]]:
    """Names of the axes: plates where there are any; a plate of several sizes, or named like a variable, gets a new name."""
    names = {name for group in groups.values() for name in group}
    dims: Dims = {}
    coords: dict[str, np.ndarray] = {}
    axes = {s.name: (s.constrained_shape, _site_axes(s)) for s in sites}
    axes |= {name: (found.value.shape, dict(found.plates)) for name, found in observed.items()}
    for name, (shape, plates) in axes.items():
        own = [f"{name}_dim_{k}" for k in range(len(shape))]
        for plate, axis in plates.items():
            dim = f"{plate}_plate" if plate in names or plate in RESERVED else plate
            if axis < len(shape) and len(coords.setdefault(dim, np.arange(shape[axis]))) == shape[axis]:
                own[axis] = dim
        dims[name] = own
    return dims, coords


def _site_axes(site: Site) -> dict[str, int]:
    rank = len(site.shape)
    places = {plate: axis % rank for plate, axis in site.plates if -rank <= axis < rank}
    return {p: a for p, a in places.items() if site.shape[a : a + 1] == site.constrained_shape[a : a + 1]}


def _container(groups: Groups, attributes: dict[str, Any], dims: Dims, coords: dict[str, np.ndarray]) -> Any:
    arviz = load_arviz()
    drawn = ("posterior", "posterior_predictive", "log_likelihood")
    out: dict[str, dict[str, Any]] = {}
    for group, arrays in groups.items():
        if arrays:
            out[group] = {n: x[None] if group in drawn else x for n, x in arrays.items()}
    if before_one(arviz):
        return arviz.from_dict(**out, dims=dims, coords=coords, posterior_attrs=attributes)
    return arviz.from_dict(out, dims=dims, coords=coords, attrs={"posterior": attributes})
