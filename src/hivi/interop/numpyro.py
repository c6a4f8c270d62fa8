"""`from_numpyro`: a target from a NumPyro model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hivi import _jaxprs
from hivi._compile import compiled
from hivi._errors import TargetError, message
from hivi._factored import Factored, factorise
from hivi._space import Plate, Site, Values, make_site
from hivi._target import checks, slicing
from hivi._target.base import Target
from hivi._target.densities import base_support
from hivi._target.log_joint import traced_control_flow
from hivi._target.origin import NumPyroOrigin
from hivi._target.replay import replay
from hivi._target.statements import Reader


def from_numpyro(
    model: Callable[..., Any], *args: Any, subsample: Mapping[str, int] | None = None, **kwargs: Any
) -> Target:
    """Make a target from a NumPyro model and its arguments.

    The model is run abstractly and becomes one program; it is not run again while fitting. Continuous latents are
    mapped from unconstrained coordinates inside the model, so that supports may depend on other latents; their
    log-Jacobians are terms of their own. Array arguments stay arguments: data of the same shapes compile nothing anew.

    Understood: plates (nested, crossed, with `dim`), `to_event`, `handlers.mask`, `scale`, `condition`, `reparam`,
    `scope`, `numpyro.factor`, `deterministic`, improper priors whose support has a bijection, and
    `numpyro.contrib.control_flow`. A latent inside `scan` has the steps as its first axis, in the order of `xs`.
    A latent `Delta` is a deterministic value with its `log_density`. `handlers.scale` does not scale Jacobians.

    A mask on a *latent* (also by `obs_mask=`, which makes `NAME_unobserved`) is dropped: masked coordinates keep
    their prior, which leaves the evidence as it is, provided that nothing else depends on them; that is checked.
    Missing observations (NaN) must be masked; observations outside their distribution's support are refused.

    Refused, with the site's name and a cure: `param`, `module`, `mutable`, `prng_key`, supports without a bijection,
    Python control flow on a latent's value, latents in nested scans.

    Args:
        model: a NumPyro model.
        *args: its arguments; arrays among them may change later without compiling anew. Integers that pick elements of
            discrete latents (`a[group]`) are read, so that each element of `a` meets its own rows alone, and so are zeros of
            matrices that are mostly zeros (`X @ a`); others compile anew.
        subsample: plate -> rows per minibatch, in place of the `subsample_size` that the model declares. Where the
            model does not use the row numbers itself, its array arguments are sliced along the plate.
        **kwargs: its keyword arguments.

    Returns:
        The target. `hivi.explain` prints what was read, and its `notes` what was decided.

    Raises:
        TargetError: arguments that the model does not take, no latents, or a statement that cannot be used.

    Example:
        >>> import hivi, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from hivi.interop.numpyro import from_numpyro
        >>> def model(y):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 10))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mu, 1), obs=y)
        >>> target = from_numpyro(model, jnp.array([1.0, 2.0, 3.0]))
        >>> [(s.name, s.shape) for s in target.sites]
        [('mu', ())]
    """
    name = getattr(model, "__name__", "model")
    arguments = _Arguments.of(model, args, kwargs)
    last: Exception | None = None
    for constant in arguments.attempts():
        try:
            return _build(name, _Source(model, arguments, constant), dict(subsample or {}))
        except (TypeError, IndexError) as error:
            if not slicing.needs_value(error):
                _refuse_lists(model, args, kwargs, error)
                raise
            last = error
    assert last is not None
    raise TargetError(_control_flow(name, arguments, last)) from last


class _Arguments(NamedTuple):
    """The model's arguments: the leaves that are arrays are traced, all others are constants."""

    leaves: tuple[Any, ...]
    treedef: Any
    arrays: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        paths, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs))
        positional = _parameters(model, args, kwargs)
        names = []
        for path, _ in paths:
            first: Any = path[1]
            index = getattr(first, "idx", getattr(first, "key", None))
            if isinstance(index, int):
                index = positional[index] if index < len(positional) else f"args[{index}]"
            names.append(f"{index}{jax.tree_util.keystr(path[2:])}")
        leaves = tuple(leaf for _, leaf in paths)
        return cls(leaves, treedef, tuple(k for k, leaf in enumerate(leaves) if _is_numeric(leaf)), tuple(names))

    def attempts(self) -> Iterator[tuple[int, ...]]:
        """Which arrays to read as constants: none, then one of them, then all, until Python code is content."""
        yield ()
        if 1 < len(self.arrays) <= 8:
            yield from ((k,) for k in self.arrays)
        if self.arrays:
            yield self.arrays


def _parameters(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the model's parameters, which the arguments must fit (TargetError)."""
    try:
        signature = inspect.signature(model)
    except ValueError:  # it has none
        return []
    except TypeError as error:
        raise TargetError(message("from_numpyro", repr(model), "a function", "pass the model itself")) from error
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name, found = getattr(model, "__name__", "model"), str(error).removeprefix("got ")
        cure = f"pass them after the model: from_numpyro({name}, ...)"
        raise TargetError(message("from_numpyro", found, f"arguments for {name}{signature}", cure)) from error
    return list(signature.parameters)


def _refuse_lists(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception
) -> None:
    """Say so where a model fails with lists of numbers among its arguments, and does not with arrays in their place.

    Raises:
        TargetError: from the model's error.
    """
    given = {**{f"{k + 1}": x for k, x in enumerate(args)}, **{repr(n): x for n, x in kwargs.items()}}
    plain = [
        n for n, x in given.items()
        if isinstance(x, list) and x and all(isinstance(leaf, int | float) for leaf in _leaves(x))
    ]  # fmt: skip
    if not plain:
        return
    arrays = [np.asarray(x) if n in plain else x for n, x in given.items()]
    named: dict[str, Any] = dict(zip(kwargs, arrays[len(args) :], strict=True))
    try:
        from_numpyro(model, *arrays[: len(args)], **named)
    except Exception:  # something else is wrong, too
        return
    text = f"a list of numbers, with which the model fails ({(str(error).splitlines() or [type(error).__name__])[0]})"
    where = f"from_numpyro, argument {', '.join(plain)}"
    raise TargetError(message(where, text, "an array", "pass numpy.asarray(...) of it")) from error


def _leaves(x: list[Any]) -> list[Any]:
    """The leaves of nested lists; None is one."""
    return jax.tree.leaves(x, is_leaf=lambda v: v is None)


def _control_flow(name: str, arguments: _Arguments, error: Exception) -> str:
    text = traced_control_flow(f"model {name!r}", error)
    data = (
        "; on data, use numpy instead of jax.numpy where a number or a shape is needed, or compute it before the model"
    )
    return text + data if arguments.arrays else text


def _is_numeric(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array | np.ndarray):
        return False
    return jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool


class _Source:
    """The model, ready to be read with any values of its traced arguments."""

    def __init__(self, model: Callable[..., Any], arguments: _Arguments, constant: tuple[int, ...]) -> None:
        self.model, self.arguments, self.constant = model, arguments, constant
        self.leaves = [np.asarray(x) if k in constant else x for k, x in enumerate(arguments.leaves)]
        self.traced = tuple(k for k in arguments.arrays if k not in constant)
        self.data = [jnp.asarray(self.leaves[k]) for k in self.traced]

    @property
    def names(self) -> list[str]:
        """Names of the traced arguments."""
        return [self.arguments.names[k] for k in self.traced]

    def as_model(self, sites: Sequence[Site], plates: Sequence[Plate]) -> slicing.Model:
        """The model as slicing sees it."""
        return slicing.Model(
            lambda z, data, rows: self.read(data, z=z, rows=rows), self.data, self.names, sites, plates
        )

    def read(self, data: Sequence[Any], **options: Any) -> Reader:
        """Run the model once."""
        leaves = list(self.leaves)
        for k, value in zip(self.traced, data, strict=True):
            leaves[k] = value
        args, kwargs = jax.tree.unflatten(self.arguments.treedef, leaves)
        return Reader(**options).run(lambda: self.model(*args, **kwargs))

    def origin(self) -> NumPyroOrigin:
        """The model, to be run again with the target's data."""
        rest = tuple(None if k in self.traced else x for k, x in enumerate(self.leaves))
        return NumPyroOrigin(self.model, rest, self.traced, self.arguments.treedef)


class _Found(NamedTuple):
    """A model at full size, and what of it depends on no latent (None where it does)."""

    reader: Reader
    missing: dict[str, Any]
    outside: dict[str, Any]
    masks: dict[str, Any]
    supports: dict[str, Any]


def _build(name: str, source: _Source, requested: dict[str, int]) -> Target:
    found = _discover(source)
    if not found.reader.latents:
        cure = "sample something without obs=; handlers.condition and substitute also fix latents"
        raise TargetError(message(f"model {name!r}", "no latent sample statement", "at least one", cure))
    _check_observations(found)
    plates = slicing.choose(found.reader.plates, requested)
    sites = _sites(found, plates)
    slices = slicing.find_slices(source.as_model(sites, plates)) if plates else {}
    terms = _terms(source, found, slices)
    scales = {
        label: term.scale * math.prod(p.scale for p in plates if p.name in dict(term.plates))
        for label, term in found.reader.terms.items()
    }
    factored = factorise(
        terms,
        {s.name: s.example() for s in sites},
        source.data,
        slicing.row_numbers(plates),
        scales=scales,
        indexed={s.name for s in sites if s.discrete},
    )
    consts = tuple(c if isinstance(c, jax.Array) else jnp.asarray(c) for c in factored.consts)
    factored = Factored(factored.program, consts, factored.overrides)
    _check_held(found, factored)
    if plates:
        run = compiled(terms, effort="quick")
        axes = {label: slicing.plate_axes(term, plates) for label, term in found.reader.terms.items()}
        checks.check_rows(lambda z, rows: run(z, source.data, rows), axes, sites, plates)
    _check_masks(source, found, sites)
    constrainer = None
    if any(s.support is None and not s.discrete for s in sites):
        constrainer = replay(lambda z, data: source.read(data, z=z).values, sites, source.data)
    notes, origin = _notes(source, found, slices), source.origin()
    return Target(name, sites, factored, source.data, plates, notes, constrainer, origin=origin)


def _discover(source: _Source) -> _Found:
    """Read the model at full size."""
    readers: list[Reader] = []
    bounds: dict[str, Any] = {}

    def flat(start: Any, *data: Any) -> list[Any]:
        reader = source.read(data, start=start)
        readers.append(reader)
        for label, latent in reader.latents.items():
            if base_support(latent.support).is_discrete:
                bounds[label] = latent.support
        impossible = [where for _, where in reader.outside.values()]
        return [*reader.missing.values(), *impossible, *reader.masks.values(), *jax.tree.leaves(bounds)]

    jaxpr, consts, _ = _jaxprs.trace(flat, jnp.zeros(()), *source.data)
    reader = readers[-1]
    values = [_fixed(jaxpr, k, consts, source.data) for k in range(len(jaxpr.outvars))]
    rest = iter(values)
    missing, outside, masks = (
        dict(zip(names, rest, strict=False)) for names in (reader.missing, reader.outside, reader.masks)
    )
    leaves, treedef = jax.tree.flatten(bounds)
    known = [old if value is None else _one_number(value) for old, value in zip(leaves, rest, strict=True)]
    return _Found(reader, missing, outside, masks, jax.tree.unflatten(treedef, known))


def _one_number(bound: Any) -> Any:
    """An integer bound; an array only where its elements differ, which `make_site` refuses."""
    numbers = np.unique(np.asarray(bound))
    return int(numbers[0]) if numbers.size == 1 else numbers


def _fixed(jaxpr: Any, output: int, consts: Sequence[Any], data: Sequence[Any]) -> Any:
    """Value of one output, or None where it depends on the latents (the input after the constants)."""
    small, used = _jaxprs.prune(jaxpr, [k == output for k in range(len(jaxpr.outvars))])
    if used[len(consts)]:
        return None
    inputs = [*consts, None, *data]
    return _jaxprs.evaluate(small, [x for x, u in zip(inputs, used, strict=True) if u])[0]


def _check_observations(found: _Found) -> None:
    for label, missing in found.missing.items():
        if (places := _places(missing)) is not None:
            cure = "wrap the statement in numpyro.handlers.mask(mask=~jnp.isnan(y)), or leave these rows out"
            expected = "observed values, or a mask on missing ones"
            raise TargetError(message(f"site {label!r}", f"NaN in the observations, {places}", expected, cure))
    for label, outside in found.outside.items():
        if (places := _places(outside)) is not None:
            kind = found.reader.outside[label][0]
            cure = "mend the data, or take the distribution that they come from (any log-density: numpyro.factor)"
            text = f"observations outside the support of {kind}, {places}"
            raise TargetError(message(f"site {label!r}", text, "values that the distribution can give", cure))


def _places(wrong: Any) -> str | None:
    """The first place, and how many more; None where there is none, or where it depends on the latents."""
    if wrong is None or not np.any(wrong):
        return None
    places = np.argwhere(np.asarray(wrong))
    more = len(places) - 1
    return f"first at index {[int(i) for i in places[0]]}" + (f" and at {more} more" if more else "")


def _sites(found: _Found, plates: Sequence[Plate]) -> tuple[Site, ...]:
    sites = []
    for label, latent in found.reader.latents.items():
        local = slicing.local_to(label, latent.plates, plates)
        support = found.supports.get(label, latent.support)
        leaves = jax.tree.leaves(support)
        # Arrays in a support may change between equal programs, so that only numbers make it static.
        if label in found.supports or all(not isinstance(x, jax.core.Tracer) and np.ndim(x) == 0 for x in leaves):
            sites.append(make_site(label, latent.shape, support, latent.plates, local, latent.ordered))
        else:
            sites.append(Site(label, latent.free, Values("real"), latent.shape, None, latent.plates, local))
    return tuple(sites)


def _notes(source: _Source, found: _Found, slices: slicing.Slices) -> tuple[str, ...]:
    notes = []
    if source.constant:
        names = ", ".join(source.arguments.names[k] for k in source.constant)
        notes.append(f"arguments {names}: read as constants, since Python code uses their values; new ones recompile")
    if all(term.latent or name in found.reader.latents for name, term in found.reader.terms.items()):
        notes.append("nothing is observed: the posterior is the prior (obs=... makes a statement an observation)")
    for k, pairs in slices.items():
        notes += [f"argument {source.names[k]}: axis {axis} is sliced along plate {plate!r}" for axis, plate in pairs]
    for name in found.reader.enumerated:
        notes.append(f"site {name!r}: infer={{'enumerate': ...}} is not used; the site gets its own q")
    notes += [f"site {name!r}: {how}" for name, how in found.reader.repeated.items()]
    notes += [
        f"site {name!r}: masked coordinates keep their prior; nothing else depends on them" for name in found.masks
    ]
    return tuple(notes)


def _terms(source: _Source, found: _Found, slices: slicing.Slices) -> Callable[..., dict[str, Any]]:
    def terms(z: Mapping[str, Any], data: Sequence[Any], rows: Mapping[str, Any]) -> dict[str, Any]:
        reader = source.read(slicing.take(data, rows, slices), z=z, rows=rows)
        if reader.terms.keys() != found.reader.terms.keys():
            names = sorted(reader.terms.keys() ^ found.reader.terms.keys())
            expected, cure = "the same statements for every minibatch", "do not let their number depend on the rows"
            raise TargetError(message(f"sites {names}", "statements that only some runs have", expected, cure))
        return {label: term.array for label, term in reader.terms.items()}

    return terms


def _check_held(found: _Found, factored: Factored) -> None:
    """An improper prior must be made proper by something else."""
    for label, latent in found.reader.latents.items():
        own = {label, f"jacobian({label})"}
        if latent.improper and not any(f.maps(label) for f in factored.factors if f.name not in own):
            cure = "give it a proper prior, or remove it"
            expected = "a term that depends on it"
            raise TargetError(message(f"site {label!r}", "an improper prior that nothing holds", expected, cure))


def _check_masks(source: _Source, found: _Found, sites: Sequence[Site]) -> None:
    if not found.masks:
        return
    for label, mask in found.masks.items():
        if mask is None or found.reader.latents[label].improper:
            text = "a mask that depends on other latents" if mask is None else "a mask on an improper prior"
            cure = "mask the observed statements only, or use jnp.where on the latent's value"
            raise TargetError(message(f"site {label!r}", text, "a fixed mask on a proper prior", cure))

    def evaluate(z: Mapping[str, Any], data: Sequence[Any]) -> dict[str, Any]:
        terms = source.read(data, z=z, masked=True).terms
        return {label: term.array for label, term in terms.items() if not term.latent}

    run = compiled(evaluate, effort="quick")
    checks.check_masks(lambda z: run(z, source.data), found.masks, sites)
