"""What `hivi fit` writes to its folder."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hivi._fit.result import Fit
from hivi._tree import Key
from hivi.interop.arviz import to_arviz

FIELDS = ("mean", "sd", "5%", "50%", "95%")


class Summary(NamedTuple):
    """Posterior of one scalar latent: mean, standard deviation, and 5, 50 and 95 % quantiles."""

    name: str
    mean: float
    sd: float
    low: float
    median: float
    high: float


def summarise(draws: Mapping[str, np.ndarray]) -> list[Summary]:
    """Summarise draws, one entry per scalar latent.

    Args:
        draws: site -> array of shape (samples, *site shape), at least 2 samples; what `Fit.sample` returns.
    """
    out = []
    for name, values in draws.items():
        values = np.asarray(values, np.float64)
        for index in np.ndindex(values.shape[1:]):
            column = values[(slice(None), *index)]
            low, median, high = np.quantile(column, (0.05, 0.5, 0.95))
            label = f"{name}[{','.join(map(str, index))}]" if index else name
            moments = float(column.mean()), float(column.std(ddof=1))
            out.append(Summary(label, *moments, float(low), float(median), float(high)))
    return out


def write_run(folder: Path, fit: Fit, key: Key, samples: int) -> list[Summary]:
    """Write the fit, history.csv, summary.csv, draws.npz and posterior.nc.

    Args:
        folder: made if there is none; files of these names are overwritten.
        fit: the fit.
        key: randomness of the draws.
        samples: number of draws.

    Returns:
        The summary of every scalar latent.
    """
    draws = {name: np.asarray(value) for name, value in fit.sample(key, samples).items()}
    rows = summarise(draws)
    fit.save(folder)
    _write_csv(folder / "history.csv", list(fit.history), zip(*fit.history.values(), strict=True))
    _write_csv(folder / "summary.csv", ["latent", *FIELDS], rows)
    np.savez_compressed(folder / "draws.npz", **draws)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ 0.23 announces its 1.0 at import
        to_arviz(fit, key=key, samples=samples).to_netcdf(str(folder / "posterior.nc"))
    return rows


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows([x if isinstance(x, str) else f"{x:.8g}" for x in row] for row in rows)
