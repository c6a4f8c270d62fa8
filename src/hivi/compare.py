"""`compare`: several families against one target, in one run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax

from hivi._comparison import Comparison, Row, judged
from hivi._curvature import Curvature, curvature
from hivi._errors import FamilyError, FitError, HiviError, message
from hivi._families.base import AbstractFamily
from hivi._families.codes import Codes
from hivi._families.copula import Copula
from hivi._families.flow import Flow
from hivi._families.full_rank import FullRank
from hivi._families.hierarchical import Hierarchical
from hivi._families.low_rank import LowRank
from hivi._families.mean_field import MeanField
from hivi._families.mixture import Mixture
from hivi._families.standardised import Standardised
from hivi._fit.loop import DENSE_LIMIT, fit
from hivi._fit.progress import announce
from hivi._fit.result import Fit
from hivi._target.base import Target
from hivi._tree import Key
from hivi._trust import measure
from hivi.interop.nuts import against, run_nuts

Family: TypeAlias = AbstractFamily | Mapping[str, AbstractFamily]

OPTIONS = ("bound", "estimator", "learning_rate", "optimizer", "tolerance", "mesh")
"""Arguments of `fit` that are the same for all families."""
CURVATURE_DRAWS = 1024
GROWING = (Hierarchical, Codes)
"""Families that can grow from a mean-field fit."""

NAMED: dict[str, AbstractFamily] = {
    "mean-field": MeanField(),
    "mean-field-dispersed": MeanField(dispersed=True),
    "full-rank": FullRank(),
    "standardised": Standardised(),
    "low-rank": LowRank(rank=4),
    "copula": Copula(),
    "vine": Copula("vine", levels=2),
    "flow": Flow(),
    "mixture": Mixture(components=8),
    "mixture-dispersed": Mixture(components=8, dispersed=True),
    "hierarchical": Hierarchical(),
    "hierarchical-full-rank": Hierarchical(prior=FullRank()),
    "hierarchical-dispersed": Hierarchical(dispersed=True),
}
"""Families by the names that the table and the command line give them."""


def default_families(target: Target) -> dict[str, AbstractFamily]:
    """The families that suit a target's supports, by name.

    Mean-field always; for continuous sites alone full-rank, a flow in standardised coordinates and a plain one (up to 400
    coordinates), and a mixture; with discrete sites a mixture and two hierarchies, over a flow and over a full-rank
    Gaussian, and with counts or long integer ranges one of each where their spread is free. No mixtures over
    the rows of a subsampled plate. A streamed target gets mean-field and the hierarchy.

    Example:
        >>> import hivi
        >>> from hivi.compare import default_families
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, {"x": hivi.Latent()})
        >>> list(default_families(target))
        ['mean-field', 'full-rank', 'standardised', 'flow', 'mixture', 'hierarchical']
    """
    names = ["mean-field"]
    dense = sum(math.prod(s.shape) for s in target.sites) <= DENSE_LIMIT
    if target.source is not None:
        names += ["hierarchical"]
    elif any(s.discrete for s in target.sites):
        counts = any(s.values.ordered for s in target.sites)
        names += ["mean-field-dispersed"] if counts else []
        names += ["mixture", *(["mixture-dispersed"] if counts else []), "hierarchical", "hierarchical-full-rank"]
        names += ["hierarchical-dispersed"] if counts else []
    else:
        names += [*(["full-rank", "standardised", "flow"] if dense else []), "mixture", "hierarchical"]
    rows = any(s.local is not None for s in target.sites)
    return {n: NAMED[n] for n in names if not (rows and isinstance(NAMED[n], Mixture))}


def compare(
    target: Target,
    families: Mapping[str, Any] | None = None,
    *,
    key: Key,
    steps: int = 10_000,
    samples: int | None = None,
    draws: int = 1000,
    nuts: bool = False,
    warmup: int = 1000,
    grow: bool = True,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Fit several families to one target, and say of each how good it is and what it fails at.

    Every family gets the same keys, so that a row does not depend on the others. `hivi.curvature` says at the mean-field
    fit whether a hierarchy would help (column "mixing": the gain to expect of a small one, in nats). That fit is made once:
    hierarchical families without a start of their own grow from it. A family that fails keeps a row with its error.

    Args:
        target: any target.
        families: name -> family, or a dict from site to family; None takes `default_families(target)`.
        key: a JAX random key; the same key gives the same table (but for the seconds).
        steps: the most gradient steps of each.
        samples: Monte Carlo estimates of the bound per step, as in `hivi.fit`.
        draws: draws of z for k-hat, at least 100; and draws of each of four chains of NUTS.
        nuts: also run NumPyro's NUTS, where all latents are continuous, and compare means and spreads with it.
        warmup: adaptation steps of NUTS.
        grow: let hierarchical families start at the mean-field fit; otherwise from scratch.
        progress: show progress bars on a terminal.
        **options: more arguments of `hivi.fit`, the same for all: `bound`, `estimator`, `learning_rate`, `optimizer`,
            `tolerance`, `mesh`.

    Returns:
        A `Comparison`; print it.

    Raises:
        FamilyError: no families, or a value that is none.
        FitError: fewer than 100 draws, or an unknown option.

    Example:
        >>> import hivi, jax, jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> table = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
        >>> target = hivi.from_log_joint(
        ...     lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)}
        ... )
        >>> families = {"mean-field": hivi.MeanField(), "mixture": hivi.Mixture(2)}
        >>> found = hivi.compare(target, families, key=jax.random.key(0), steps=1500, progress=False)
        >>> found.best, round(found["mean-field"].gap.mean, 1)
        ('mixture', 0.2)
    """
    chosen = _checked(default_families(target) if families is None else families)
    _check_options(draws, options)
    keys = _Keys(*jax.random.split(key, 5))
    settings = {"steps": steps, "samples": samples, "progress": progress, **options}
    mean_field = next((n for n, f in chosen.items() if _same(f, MeanField())), None)
    wanted = grow and any(_growing(f) for f in chosen.values())
    run = _Run(target, keys, settings, draws)
    base = _base(run, wanted) if wanted or mean_field is not None else None
    curved = _curved(base, keys)
    rows, fits = _rows(run, chosen, mean_field, base, curved, grow)
    reference = None
    if nuts and fits:
        rows, reference = _with_nuts(run, rows, fits, warmup)
    notes = {} if curved is None else {"Would a hierarchy help?": _verdict(curved)}
    return Comparison(judged(rows, reference, mean_field), fits, target.name, reference, notes)


def _base(run: _Run, wanted: bool) -> _Attempt:
    """The mean-field fit; whether other families grow from it."""
    announce("compare: mean-field" + (", at which others begin" if wanted else ""), run.settings["progress"])
    return _try_fit(run, MeanField())


def _rows(
    run: _Run,
    chosen: Mapping[str, Family],
    mean_field: str | None,
    base: _Attempt | None,
    curved: Curvature | None,
    grow: bool,
) -> tuple[list[Row], dict[str, Fit]]:
    """Every family's row, and the fits of those that did not fail."""
    rows: list[Row] = []
    fits: dict[str, Fit] = {}
    for number, (name, family) in enumerate(chosen.items(), 1):
        if name == mean_field and base is not None:
            attempt = _alike(base, fits)
        else:
            announce(f"compare: {name} ({number} of {len(chosen)})", run.settings["progress"])
            first = _first(family, fits, base) if grow else None
            attempt = _alike(_grow(run, family, first, curved), fits)
        row = _row(run, name, family, attempt)
        if attempt.fit is not None:
            fits[name] = attempt.fit
        if name == mean_field and curved is not None:
            row = dataclasses.replace(row, notes={"mixing": f"+{curved.gain_to_expect.mean:.2g}"})
        rows.append(row)
        announce(f"compare: {name}: {row.error or f'bound {row.bound}'}", run.settings["progress"])
    return rows, fits


def _check_options(draws: int, options: Mapping[str, Any]) -> None:
    if draws < 100:
        raise FitError(message("compare(draws=...)", str(draws), "at least 100", "ask for more draws"))
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        expected = f"one of {', '.join(OPTIONS)}"
        raise FitError(message(f"compare({unknown[0]}=...)", "an unknown option", expected, "correct it"))


class _Keys(NamedTuple):
    """The same for every family."""

    fit: Key
    bound: Key
    draw: Key
    nuts: Key
    start: Key


class _Run(NamedTuple):
    """What all families share: the target, keys, arguments of `hivi.fit`, and draws for k-hat."""

    target: Target
    keys: _Keys
    settings: Mapping[str, Any]
    draws: int


class _Attempt(NamedTuple):
    """A fit, or why there is none; whether it was the family that refused the target; and what it grew from."""

    fit: Fit | None
    error: str = ""
    refused: bool = False
    remarks: tuple[str, ...] = ()


def _grow(run: _Run, family: Family, base: _Attempt | None, curved: Curvature | None) -> _Attempt:
    """A fit that grows from the mean-field one where it can; what does not suit that start is fitted from scratch."""
    start, remarks = _start(family, base, curved)
    if start is not None:
        attempt = _try_fit(run, _started(family, start))
        if not attempt.refused:
            return attempt._replace(remarks=remarks)
    return _try_fit(run, family)


def _checked(families: Any) -> dict[str, Family]:
    cure = 'for example {"mean-field": hivi.MeanField(), "hvm": hivi.Hierarchical()}'
    if not isinstance(families, Mapping) or not families:
        found = "an empty dict" if isinstance(families, Mapping) else repr(families)[:60]
        raise FamilyError(message("compare(families=...)", found, "a dict from name to family", cure))
    for name, family in families.items():
        members = list(family.values()) if isinstance(family, Mapping) else [family]
        if not isinstance(name, str) or not members or not all(isinstance(m, AbstractFamily) for m in members):
            found = repr(family)[:60] + (", a class: call it" if isinstance(family, type) else "")
            raise FamilyError(message(f"compare, family {name!r}", found, "a family, or {site: family}", cure))
    return dict(families)


def _alike(attempt: _Attempt, fits: Mapping[str, Fit]) -> _Attempt:
    """The attempt, without its fit where that holds other sites at a point than the fits before it."""
    first = next(iter(fits.items()), None)
    if attempt.fit is None or first is None or attempt.fit.proposal.points == first[1].proposal.points:
        return attempt
    here, there = (sorted(f.proposal.points) or "no site" for f in (attempt.fit, first[1]))
    error = (
        f"holds {here} at a point, {first[0]} {there}: a bound at a point is one on log p(x, point), not to be compared"
    )
    return _Attempt(None, error)


def _same(family: Family, other: AbstractFamily) -> bool:
    return isinstance(family, AbstractFamily) and bool(eqx.tree_equal(family, other))


def _growing(family: Family) -> bool:
    return type(family) in GROWING and getattr(family, "start", None) is None


def _curved(base: _Attempt | None, keys: _Keys) -> Curvature | None:
    """The second-order test at the mean-field fit; None where there is none (streamed data, or too much to keep)."""
    if base is None or base.fit is None:
        return None
    try:
        return curvature(base.fit, key=keys.start, samples=CURVATURE_DRAWS)
    except HiviError:
        return None


def _verdict(found: Curvature) -> str:
    """The top eigenvalues, what they couple, and the gain to expect."""
    lines = str(found).splitlines()
    if found.rows is not None:
        return " ".join(lines[-2:])
    values = zip(found.eigenvalues, found.stderr, strict=True)
    top = ", ".join(f"{value:+.2g} ± {error:.1g}" for value, error in values)
    return f"{lines[-1]} Curvature of mean-field, top eigenvalues in nats: {top}. {found.warning}".strip()


def _first(family: Family, fits: Mapping[str, Fit], base: _Attempt | None) -> _Attempt | None:
    """The mean-field fit that suits a family: one whose spread is free for those that have it, where there is one."""
    if isinstance(family, Hierarchical) and family.dispersed:
        found = (f for f in fits.values() if _same(f.family, MeanField(dispersed=True)))
        return next((_Attempt(f) for f in found), base)
    return base


def _start(family: Family, base: _Attempt | None, curved: Curvature | None) -> tuple[Any, tuple[str, ...]]:
    """What a family grows from (None: nothing), and the remark on it."""
    if base is None or base.fit is None or not _growing(family):
        return None, ()
    if (
        type(getattr(family, "prior", None)) is FullRank and curved is not None
    ):  # without directions it sits on a saddle
        return curved, ("grown from the mean-field fit along its curvature",)
    of_free_spread = " of free spread" if _same(base.fit.family, MeanField(dispersed=True)) else ""
    return base.fit, (f"grown from the mean-field fit{of_free_spread}",)


def _started(family: Any, start: Any) -> AbstractFamily:
    return dataclasses.replace(family, start=start)


def _try_fit(run: _Run, family: Family) -> _Attempt:
    """One fit; an error becomes text, whatever it is, so that the other families' results are not lost."""
    try:
        return _Attempt(fit(run.target, family, key=run.keys.fit, **run.settings))
    except FamilyError as error:
        return _Attempt(None, f"refused the target: {error}", refused=True)
    except HiviError as error:
        return _Attempt(None, f"could not be fitted: {error}")
    except Exception as error:
        return _Attempt(None, f"could not be fitted: {_text(error)}")


def _row(run: _Run, name: str, family: Family, attempt: _Attempt) -> Row:
    """A family's row: its bounds, k-hat and costs, or what went wrong."""
    row = Row(name, str(family), error=attempt.error, remarks=attempt.remarks)
    found = attempt.fit
    if found is None:
        return row
    costs: dict[str, Any] = {
        "converged": found.converged,
        "steps": len(found.history["step"]),
        "seconds": found.seconds,
        "step_seconds": found.pace,
    }
    try:
        known = measure(found, run.keys.bound, run.keys.draw, run.draws)
    except HiviError as error:
        return dataclasses.replace(row, error=f"its bound could not be estimated: {error}", **costs)
    except Exception as error:  # the other families' results, and this fit, are worth more than the traceback
        return dataclasses.replace(row, error=f"could not be measured: {_text(error)}")
    remarks = (*row.remarks, *known.remarks)
    return dataclasses.replace(
        row, bound=known.bound, tighter=known.tighter, khat=known.khat, faults=known.faults, remarks=remarks, **costs
    )


def _with_nuts(run: _Run, rows: list[Row], fits: Mapping[str, Fit], warmup: int) -> tuple[list[Row], Any]:
    """NUTS from the fit with the highest bound, and every row beside it."""
    known = {r.name: r.bound.mean for r in rows if r.bound is not None and math.isfinite(r.bound.mean)}
    first = max(known, key=lambda n: known[n]) if known else next(iter(fits))
    reference, flat = run_nuts(run.target, fits[first], run.keys.nuts, warmup, run.draws)
    if not flat:
        return rows, reference
    beside = {n: against(f, flat, run.keys.draw) for n, f in fits.items()}
    return [dataclasses.replace(r, against=beside.get(r.name)) for r in rows], reference


def _text(error: Exception) -> str:
    """An unexpected error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
