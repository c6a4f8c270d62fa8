"""A fit at rows that it has not seen: what its inference network gives for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hivi._errors import FitError, message
from hivi._families.amortised import Amortised
from hivi._families.product import ProductProposal, grouped
from hivi._space import Plate, Site
from hivi._target.base import Target


def at_rows(fit: Any, features: Any, target: Target | None) -> Any:
    """See `Fit.rows`."""
    given = _by_plate(fit, features)
    sites = tuple(_resized(s, {n: len(x) for n, x in given.items()}) for s in fit.sites)
    if target is not None:
        _check(sites, target)
        sites = target.sites
    elif any(s.support is None for s in sites):
        names = [s.name for s in sites if s.support is None]
        cure = "pass target=hivi.from_numpyro(model, ...) with the new rows' data"
        raise FitError(
            message(f"Fit.rows at site {names[0]!r}", "a support that depends on other values", "the model", cure)
        )
    return dataclasses.replace(
        fit,
        proposal=fit.proposal.unseen(given, sites),
        sites=sites,
        family=_with_data(fit, given),
        message=f"{fit.message}; at rows of {', '.join(f'{n!r} ({len(x)})' for n, x in given.items())}",
        target=target,
        program=None,
    )


def _by_plate(fit: Any, features: Any) -> dict[str, Array]:
    plates = sorted(fit.proposal.inferred)
    if not plates:
        cure = "fit with hivi.Amortised(family, data=x)"
        raise FitError(message("Fit.rows", "a fit without an inference network", "an amortised family", cure))
    if not isinstance(features, Mapping):
        features = dict.fromkeys(plates[:1], features) if len(plates) == 1 else {}
    if sorted(features) != plates:
        cure = "pass a dict from plate to the features of its rows"
        raise FitError(
            message("Fit.rows", f"features for {sorted(features) or 'one plate'}", f"those of {plates}", cure)
        )
    return {name: _checked(fit, name, x) for name, x in features.items()}


def _checked(fit: Any, plate: str, features: Any) -> Array:
    found = jnp.asarray(features)
    expected = _row_shape(fit.family, found.shape[1:])
    if found.ndim < 2 or found.shape[0] < 1 or found.shape[1:] != expected:
        raise FitError(
            message(
                f"Fit.rows at plate {plate!r}",
                f"features of shape {np.shape(features)}",
                f"(rows, {', '.join(map(str, expected))}), as in the fit",
                "pass one row of features for each new row, computed as for the fit",
            )
        )
    return found


def _members(family: Any) -> list[Any]:
    return list(family.values()) if isinstance(family, Mapping) else [family]


def _row_shape(family: Any, found: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the features of a row; an encoder of the user's own, without data, takes what it takes."""
    counts = [m.features for m in _members(family) if isinstance(m, Amortised) and m.encoder is None]
    shapes = [m.data.shape[1:] for m in _members(family) if isinstance(m, Amortised) and m.data is not None]
    if shapes:
        return found if found in shapes else shapes[0]
    return (counts[0],) if counts and found not in [(c,) for c in counts] else found


def _with_data(fit: Any, given: Mapping[str, Array]) -> Any:
    """The family with the new rows' features, each of its networks those of its own plate: so that a fit can go on from there."""
    parts = fit.proposal.parts if isinstance(fit.proposal, ProductProposal) else (fit.proposal,)
    plates = {s.name: next(iter(p.inferred)) for p in parts if p.inferred for s in p.sites}

    def renewed(family: Any, sites: tuple[Site, ...]) -> Any:
        return (
            dataclasses.replace(family, data=given[plates[sites[0].name]]) if isinstance(family, Amortised) else family
        )

    groups = grouped(fit.family, fit.sites)
    if not isinstance(fit.family, Mapping):
        return renewed(fit.family, fit.sites)
    return {name: renewed(f, sites) for name, (f, sites) in zip(fit.family, groups, strict=True)}


def _resized(site: Site, sizes: Mapping[str, int]) -> Site:
    """The site with as many rows on its plates."""
    shape, constrained, local = list(site.shape), list(site.constrained_shape), site.local
    for name, axis in site.plates:
        if name in sizes:
            shape[axis] = constrained[axis] = sizes[name]
    if local is not None and local[0].name in sizes:
        size = sizes[local[0].name]
        local = Plate(local[0].name, size, size), local[1]
    return dataclasses.replace(site, shape=tuple(shape), constrained_shape=tuple(constrained), local=local)


def _check(sites: tuple[Site, ...], target: Target) -> None:
    """Refuse a target that has other latents, or another number of rows than there are features."""
    found = {s.name: s for s in target.sites}
    for s in sites:
        other = found.get(s.name)
        if other is None or (other.shape, other.values) != (s.shape, s.values):
            what = "no such site" if other is None else f"shape {other.shape}"
            expected, cure = (
                f"shape {s.shape}, as many rows as features",
                "pass features of the very rows of the target",
            )
            raise FitError(message(f"Fit.rows(target=...) at site {s.name!r}", what, expected, cure))
    more = [n for n in found if n not in {s.name for s in sites}]
    if more:
        cure = "pass the same model at the new rows"
        raise FitError(message("Fit.rows(target=...)", f"the sites {more}", "the sites of the fit alone", cure))
