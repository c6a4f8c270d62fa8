"""ArviZ: draws and the fit's statistics in the container that the installed ArviZ uses."""

from __future__ import annotations

from typing import Any

import numpy as np

from hivi._errors import FitError, message
from hivi._fit.result import Fit
from hivi._tree import Key


def to_arviz(fit: Fit, *, key: Key, samples: int = 1000) -> Any:
    """Draws from q(z) and the optimisation's history, for ArviZ's tables and plots.

    Args:
        fit: the fit.
        key: a JAX random key.
        samples: number of draws, at least 1.

    Returns:
        `InferenceData` (ArviZ before 1.0) or `DataTree` (from 1.0 on), with a group "posterior" of one chain and, in its
        attributes, the family, the bound's last estimate, and whether the fit converged.

    Raises:
        FitError: no samples were asked for.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=100, progress=False)
        >>> data = hivi.to_arviz(fit, key=jax.random.key(1), samples=10)
        >>> data.posterior["x"].shape
        (1, 10)
    """
    import arviz  # takes seconds to import, and only this function needs it

    if samples < 1:
        raise FitError(message("to_arviz(samples=...)", str(samples), "at least 1", "ask for more samples"))
    posterior = {name: np.asarray(value)[None] for name, value in fit.sample(key, samples).items()}
    attributes = {
        "inference_library": "hivi",
        "family": repr(fit.family),
        "converged": int(fit.converged),
        "bound": float(np.nanmean(fit.history["elbo"][-100:])),
    }
    before_one = int(arviz.__version__.split(".")[0]) < 1
    if before_one:
        return arviz.from_dict(posterior=posterior, posterior_attrs=attributes)
    return arviz.from_dict({"posterior": posterior}, attrs=attributes)
