"""Plots of fits and tables: each function takes Axes and returns them. No pyplot, hence no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hivi._errors import FitError, message

SMOOTHING = 50
"""Windows over which a trace is averaged."""


def panels(count: int, rows: int = 1, width: float = 3.0, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, and its Axes, row by row.

    Args:
        count: number of panels, at least 1.
        rows: rows of panels.
        width: of one panel, in inches.
        height: of one panel, in inches.

    Example:
        >>> from hivi import plots
        >>> figure, axes = plots.panels(3)
        >>> len(axes)
        3
    """
    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, k + 1) for k in range(count)]


def squares(axes: Axes, table: Float[np.ndarray, "rows columns"], title: str = "") -> Axes:
    """A small table as grey squares, the darker the more probable, with the probabilities written in (Figure 1).

    Args:
        axes: where to draw.
        table: probabilities; the first axis runs downwards.
        title: of the panel.
    """
    top = max(float(table.max()), 1e-12)
    axes.imshow(table, cmap="Greys", vmin=0.0, vmax=1.15 * top)
    for (i, j), value in np.ndenumerate(table):
        colour = "white" if value > 0.6 * top else "black"
        axes.text(j, i, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(table.shape[1]))
    axes.set_yticks(range(table.shape[0]))
    axes.set_title(title, fontsize=10)
    return axes


def heatmap(axes: Axes, table: Float[np.ndarray, "rows columns"], title: str = "", top: float | None = None) -> Axes:
    """A table of two counts as a heat map; the first axis runs to the right, the second upwards.

    Args:
        axes: where to draw.
        table: probabilities.
        title: of the panel.
        top: probability of the darkest colour; the largest entry if None. Panels to be compared need the same.
    """
    # The square root shows modes of small mass beside large ones.
    axes.imshow(np.sqrt(table).T, origin="lower", cmap="magma_r", vmin=0.0, vmax=np.sqrt(top or float(table.max())))
    axes.set_title(title, fontsize=10)
    return axes


def scatter(axes: Axes, points: Float[np.ndarray, "samples two"], title: str = "") -> Axes:
    """Draws of two parameters, such as lambda ~ q(lambda), over their density on a grid.

    Args:
        axes: where to draw.
        points: the draws, shape (samples, 2).
        title: of the panel.
    """
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    pad = 0.1 * (high - low) + 1e-3
    limits = [(low[k] - pad[k], high[k] + pad[k]) for k in range(2)]
    counts, x, y = np.histogram2d(points[:, 0], points[:, 1], bins=60, range=limits)
    axes.pcolormesh(x, y, np.log1p(counts).T, cmap="Blues", rasterized=True)
    few = points[:400]
    axes.plot(few[:, 0], few[:, 1], ".", color="black", markersize=1.5, alpha=0.5)
    axes.set_title(title, fontsize=10)
    return axes


def density(axes: Axes, draws: Real[np.ndarray, " samples"], label: str = "") -> Axes:
    """A histogram of the draws of one scalar: bars for a few integers, a line otherwise.

    Args:
        axes: where to draw.
        draws: the draws; integers of a discrete latent, or floats.
        label: for the legend.
    """
    values, counts = np.unique(draws, return_counts=True)
    if np.issubdtype(draws.dtype, np.integer) and len(values) <= 60:
        axes.bar(values, counts / counts.sum(), width=0.8, alpha=0.5, label=label or None)
    else:
        heights, edges = np.histogram(draws, bins="fd" if len(draws) < 10_000 else 100, density=True)
        axes.stairs(heights, edges, label=label or None)
    axes.set_ylabel("probability")
    return axes


def trace(axes: Axes, history: Mapping[str, np.ndarray], label: str = "") -> Axes:
    """The bound over the steps of a fit, averaged over windows of steps.

    Args:
        axes: where to draw.
        history: `Fit.history`.
        label: for the legend.

    Raises:
        FitError: the history is empty.
    """
    step, elbo = np.asarray(history["step"]), np.asarray(history["elbo"], float)
    if len(step) == 0:
        raise FitError(message("plots.trace", "an empty history", "at least one step", "fit first"))
    windows = np.array_split(np.arange(len(step)), min(SMOOTHING, len(step)))
    axes.plot([step[w].mean() for w in windows], [np.mean(elbo[w]) for w in windows], label=label or None)
    axes.set_xlabel("step")
    axes.set_ylabel("bound (nats)")
    return axes


def bounds(axes: Axes, found: Mapping[str, Sequence[tuple[float, float]]]) -> Axes:
    """Bounds of several families with error bars of two standard errors, the first family on top.

    Args:
        axes: where to draw.
        found: name -> (mean, standard error) of each of its bounds, the one that was optimised first.

    Example:
        >>> from hivi import plots
        >>> _, (axes,) = plots.panels(1)
        >>> [t.get_text() for t in plots.bounds(axes, {"mean-field": [(-0.22, 0.01)]}).get_yticklabels()]
        ['mean-field']
    """
    places = range(len(found))
    for marker, number in (("o", 0), ("|", 1)):
        some = [(p, f[number]) for p, f in zip(places, found.values(), strict=True) if len(f) > number]
        label = "ELBO" if number == 0 else "tighter bound"
        axes.errorbar(
            [m for _, (m, _) in some], [p for p, _ in some], xerr=[2 * e for _, (_, e) in some],
            fmt=marker, color="black", capsize=3, label=label, alpha=1.0 if number == 0 else 0.6,
        )  # fmt: skip
    axes.set_yticks(list(places), list(found))
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel("bound (nats)")
    axes.legend(fontsize=8)
    return axes


def khats(axes: Axes, found: Mapping[str, tuple[float, float]], limit: float = 0.7) -> Axes:
    """k-hat against the seconds that a fit took, by name; above the line draws are not to be trusted.

    Args:
        axes: where to draw.
        found: name -> (seconds, k-hat).
        limit: where the line is.

    Example:
        >>> from hivi import plots
        >>> _, (axes,) = plots.panels(1)
        >>> plots.khats(axes, {"mean-field": (2.5, 0.9)}).get_ylabel()
        'k-hat of q(z)'
    """
    axes.axhline(limit, color="grey", linestyle="--", linewidth=1)
    for name, (seconds, khat) in found.items():
        axes.plot(seconds, khat, "o", color="black")
        axes.annotate(name, (seconds, khat), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.margins(0.2)
    axes.set_xlabel("seconds")
    axes.set_ylabel("k-hat of q(z)")
    return axes
