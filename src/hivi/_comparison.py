"""The table of `hivi.compare`: one row per family, what it fails at in words, as text, HTML and JSON."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hivi import plots
from hivi._errors import FitError, message
from hivi._fit.result import Estimate, Fit
from hivi._marginal import KHat
from hivi._trust import SURE, clear, difference, mistrust, unfinished

WIDTH = 120
"""Columns of the printed table."""
MEANS_OFF = 0.3
"""Errors of a mean against NUTS beyond this, in standard deviations, are named."""
SPREADS_OFF = math.log(1.25)
"""Ratios of standard deviations against NUTS beyond this, as logarithms, are named."""
RHAT = 1.01
"""Above this r-hat the chains of NUTS disagree."""


class Against(NamedTuple):
    """A family's draws against those of NUTS, in unconstrained coordinates (a scale is its logarithm there).

    Attributes:
        mean_error: largest difference of means, in standard deviations of NUTS.
        mean_where: its coordinate.
        log_sd_ratio: the log ratio of standard deviations that is largest in absolute value; negative: q is too narrow.
        sd_where: its coordinate.
    """

    mean_error: float
    mean_where: str
    log_sd_ratio: float
    sd_where: str


class Reference(NamedTuple):
    """What NUTS found, or why there is nothing.

    Attributes:
        mean: site -> posterior mean in the model's own space.
        sd: site -> posterior standard deviation there.
        r_hat: largest split r-hat over the coordinates.
        ess: smallest effective sample size.
        divergences: number of divergent transitions.
        draws: number of draws, all chains together.
        seconds: wall time, compilation included.
        problem: in words, why there is no reference, or why it is doubtful; empty where all is well.
    """

    mean: dict[str, np.ndarray]
    sd: dict[str, np.ndarray]
    r_hat: float
    ess: float
    divergences: int
    draws: int
    seconds: float
    problem: str = ""

    def __str__(self) -> str:
        if not self.mean:
            return f"NUTS: {self.problem}"
        text = (
            f"NUTS: {self.draws} draws in {self.seconds:.1f} s, r-hat up to {self.r_hat:.3f}, ess from {self.ess:.0f}"
        )
        text += f", {self.divergences} divergences" if self.divergences else ""
        return text + (f"; {self.problem}" if self.problem else "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        name: the name it was given.
        family: its configuration, as text.
        bound: the ELBO; None where the fit failed.
        tighter: a multi-sample bound of the same fit; None where it could not be had.
        gap: nats from the ELBO to the best tighter bound of all families.
        khat: of the marginal q; None where it could not be had.
        converged: whether the bound had levelled off.
        steps: gradient steps.
        seconds: of the fit, compilation included (for a family grown from the mean-field fit without that fit's).
        step_seconds: seconds per step without compilation; None where there were too few steps to tell.
        error: why there is no fit, as text; empty where there is one.
        against: its draws against NUTS.
        faults: what it fails at, in words.
        remarks: what else is to be known of it, in words.
        notes: further columns: heading -> text.
    """

    name: str
    family: str
    bound: Estimate | None = None
    tighter: Estimate | None = None
    gap: Estimate | None = None
    khat: KHat | None = None
    converged: bool = False
    steps: int = 0
    seconds: float = 0.0
    step_seconds: float | None = None
    error: str = ""
    against: Against | None = None
    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Numbers and text only, ready for JSON."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("bound", "tighter", "gap", "khat", "against"):
            out[name] = None if out[name] is None else {k: _plain(v) for k, v in out[name]._asdict().items()}
        return out | {"faults": list(self.faults), "remarks": list(self.remarks), "notes": dict(self.notes)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `hivi.compare` found; print it.

    Attributes:
        rows: one per family, in the order given.
        fits: name -> its fit, for the families that have one.
        target: name of the target.
        reference: what NUTS found; None where it was not asked for.
        notes: remarks on the whole comparison: heading -> text.
    """

    rows: tuple[Row, ...]
    fits: dict[str, Fit]
    target: str = ""
    reference: Reference | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> str:
        """Name of the family with the highest ELBO.

        Raises:
            FitError: no family could be fitted.
        """
        done = [r for r in self.rows if r.bound is not None and math.isfinite(r.bound.mean)]
        if not done:
            cure = "correct the model or the families; their errors are in `rows`"
            raise FitError(message("Comparison.best", "no family that could be fitted", "at least one", cure))
        return max(done, key=lambda r: r.bound.mean if r.bound else -math.inf).name

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not one of {[r.name for r in self.rows]}")

    def __repr__(self) -> str:
        return f"Comparison({len(self.fits)} of {len(self.rows)} families fitted)"

    def __str__(self) -> str:
        cells = [self._headings(), *(self._cells(r) for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        widths[0] = min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:]))
        lines = [f"{self.target}: {len(self.rows)} families, bounds in nats", ""]
        lines += [_line(cells[0], widths), "-" * (sum(widths) + 2 * len(widths) - 2)]
        lines += [_line(row, widths) for row in cells[1:]]
        return "\n".join([*lines, "", *self.words()])

    def words(self) -> list[str]:
        """What the table says, in lines of at most 120 characters."""
        out: list[str] = []
        for row in self.rows:
            text = "; ".join([*(row.faults or ("no fault found",)), *row.remarks])
            out += textwrap.wrap(f"{row.name}: {text}", WIDTH, subsequent_indent="  ")
        extra = [str(self.reference)] if self.reference else []
        if any(r.khat is not None and not r.khat.exact for r in self.rows):
            extra.append("~ k-hat with log q(z) estimated from draws of lambda")
        extra += [f"{heading}: {text}" for heading, text in self.notes.items()]
        for text in extra:
            out += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
        return out

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(h)}</th>" for h in self._headings())
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in self._cells(row))}</tr>" for row in self.rows
        )
        words = "<br>".join(html.escape(line) for line in self.words())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{words}</p>"

    def as_dict(self) -> dict[str, Any]:
        """Numbers and text only, ready for JSON; what is not known is None."""
        reference = None
        if self.reference is not None:
            reference = {k: _plain(v) for k, v in self.reference._asdict().items()}
        return {
            "target": self.target,
            "best": self.best if any(r.bound for r in self.rows) else None,
            "families": [row.as_dict() for row in self.rows],
            "nuts": reference,
            "notes": dict(self.notes),
        }

    def to_json(self) -> str:
        """`as_dict` as one line of JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def figure(self) -> Figure:
        """The bounds with their error bars, and k-hat against time."""
        figure, (left, right) = plots.panels(2, width=5.0, height=1.2 + 0.35 * len(self.rows) + 1.0)
        done = {r.name: r for r in self.rows if r.bound is not None}
        bounds = {n: (r.bound, r.tighter) for n, r in done.items()}
        plots.bounds(left, {n: [b for b in pair if b is not None] for n, pair in bounds.items()})
        plots.khats(right, {n: (r.seconds, r.khat.value) for n, r in done.items() if r.khat is not None})
        return figure

    def _headings(self) -> list[str]:
        nuts = ["mean err", "log sd"] if any(r.against for r in self.rows) else []
        extra = list(dict.fromkeys(h for r in self.rows for h in r.notes))
        return ["family", "bound", "tighter", "gap", "k-hat", "conv", "steps", "sec", "ms/step", *nuts, *extra]

    def _cells(self, row: Row) -> list[str]:
        if row.bound is None:
            return [row.name, "failed", *["-"] * (len(self._headings()) - 2)]
        pace = "-" if row.step_seconds is None else f"{1000 * row.step_seconds:.3g}"
        khat = "-" if row.khat is None else f"{row.khat.value:.2f}{'' if row.khat.exact else '~'}"
        cells = [row.name, _estimate(row.bound), _estimate(row.tighter), _number(row.gap), khat]
        cells += ["yes" if row.converged else "no", str(row.steps), f"{row.seconds:.1f}", pace]
        if any(r.against for r in self.rows):
            found = row.against
            cells += ["-", "-"] if found is None else [f"{found.mean_error:.2f}", f"{found.log_sd_ratio:+.2f}"]
        extra = self._headings()[len(cells) :]
        return cells + [row.notes.get(heading, "-") for heading in extra]


def judged(rows: Sequence[Row], reference: Reference | None, mean_field: str | None) -> tuple[Row, ...]:
    """The rows with their gaps and what each fails at, which takes all of them together.

    Args:
        rows: the rows as measured.
        reference: what NUTS found.
        mean_field: name of the row of the mean-field family, whose bound none that contains it should miss.
    """
    known = [e for r in rows for e in (r.tighter, r.bound) if e is not None and math.isfinite(e.mean)]
    best = max(known, key=lambda e: e.mean, default=None)
    base = next((r.bound for r in rows if r.name == mean_field), None)
    out = []
    for row in rows:
        if row.bound is None:
            out.append(dataclasses.replace(row, faults=(row.error,)))
            continue
        gap = _difference(best, row.bound)
        faults = [*_fit_faults(row, gap, None if row.name == mean_field else base), *_nuts_faults(row, reference)]
        out.append(dataclasses.replace(row, gap=gap, faults=(*faults, *row.faults)))
    return tuple(out)


def _fit_faults(row: Row, gap: Estimate | None, base: Estimate | None) -> list[str]:
    out = []
    if not row.converged:
        out.append(unfinished(row.steps))
    if row.khat is not None and not row.khat.trusted:
        out.append(mistrust(row.khat))
    below = _difference(base, row.bound)
    if below is not None and clear(below):
        out.append(f"bound {below.mean:.2g} nats below mean-field's: the optimisation is at fault; refine it")
    if gap is not None and clear(gap):
        out.append(f"its bound misses at least {gap.mean:.2g} nats")
    return out


def _nuts_faults(row: Row, reference: Reference | None) -> list[str]:
    found = row.against
    out: list[str] = []
    if found is None or reference is None:
        return out
    noise = SURE / math.sqrt(max(reference.ess, 1.0))
    if found.mean_error > max(MEANS_OFF, noise):
        out.append(f"mean of {found.mean_where} is {found.mean_error:.2f} sd from NUTS's")
    if abs(found.log_sd_ratio) > max(SPREADS_OFF, noise):
        word = "narrow" if found.log_sd_ratio < 0 else "wide"
        out.append(f"{found.sd_where} is too {word}: {math.exp(found.log_sd_ratio):.2f} of NUTS's sd")
    return out


def _difference(high: Estimate | None, low: Estimate | None) -> Estimate | None:
    if high is None or low is None:
        return None
    return difference(high, low)


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "-"
    places = 0 if not 0 < value.stderr < 1 else min(4, 1 - math.floor(math.log10(value.stderr)))
    places = 4 if value.stderr == 0 else places
    return f"{value.mean:.{places}f} ± {value.stderr:.{places}f}"


def _number(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.mean:.3g}" if abs(value.mean) >= 1e-3 else "0"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0] if len(cells[0]) <= widths[0] else cells[0][: widths[0] - 1] + "…"
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([first.ljust(widths[0]), *rest]).rstrip()


def _plain(value: Any) -> Any:
    """A number, text, list or dict that JSON knows; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
