"""Matrix products under a change of a few coordinates: `eta + (z_k' - z_k) W_k` instead of a whole product.

Where a latent enters a product through the axis that is summed, one colour changes one index of that axis, or a few. The
product's change is then an outer product, and all K differences cost about as much elementwise work as K evaluations
of what follows the product, without the products themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex
from jaxtyping import Array

from hivi import _jaxprs
from hivi._locality.base import FINITE, Along, Maps


class Product(NamedTuple):
    """A product of which one colour changes few indices of the summed axis.

    Attributes:
        moving: which operand depends on the latent, 0 or 1.
        axes: the summed axis of either operand.
        latent: the latent's axis that runs along it.
        places: colour on that axis -> indices of the summed axis that it changes; -1 for none.
    """

    moving: int
    axes: tuple[int, int]
    latent: int
    places: tuple[tuple[int, ...], ...]


class Plan(NamedTuple):
    """What is evaluated once, once for a move, and once for every colour.

    Attributes:
        once: program with all that the rest needs as outputs.
        kept: its outputs.
        early: equations that give the moving operands of products.
        late: equations that depend on the moving latent otherwise, or are cheaper to repeat than to keep.
        products: result of a product -> how to update it.
        site: the moving latent's variable.
        outs: the program's outputs.
    """

    once: jex.Jaxpr
    kept: tuple[Any, ...]
    early: tuple[jex.JaxprEqn, ...]
    late: tuple[jex.JaxprEqn, ...]
    products: dict[Any, Product]
    site: Any
    outs: tuple[Any, ...]


def candidates(jaxpr: jex.Jaxpr, site: Any) -> list[tuple[jex.JaxprEqn, int]]:
    """Products of which one operand (its number) depends on an input, and the other does not.

    An operand that may be infinite, such as log z, is left out: its change may be inf - inf where the product is finite. One that
    is clamped (`lax.clamp`) is not infinite.
    """
    finite, touched = {site}, _downstream(jaxpr, site)
    for eqn in jaxpr.eqns:
        moving = [v for v in eqn.invars if not isinstance(v, jex.Literal) and v in touched]
        held = eqn.primitive.name == "clamp" and moving == [eqn.invars[1]]
        if moving and (held or (eqn.primitive.name in FINITE and finite.issuperset(moving))):
            finite.update(eqn.outvars)
    found = []
    for eqn in jaxpr.eqns:
        numbers = [k for k, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and v in touched]
        if eqn.primitive.name == "dot_general" and len(numbers) == 1:
            operand: Any = eqn.invars[numbers[0]]
            signed = any(jnp.issubdtype(operand.aval.dtype, kind) for kind in (jnp.signedinteger, jnp.inexact))
            if signed and operand in finite:
                found.append((eqn, numbers[0]))
    return found


def product(eqn: jex.JaxprEqn, moving: int, maps: Maps, palette: Sequence[np.ndarray]) -> Product | None:
    """How a product changes under one colour, or None where more than a quarter of the summed axis may change.

    Args:
        eqn: the product.
        moving: which of its operands depends on the latent.
        maps: how.
        palette: colours of the indices of each of the latent's axes.
    """
    summed = eqn.params["dimension_numbers"][0]
    operand: Any = eqn.invars[moving].aval
    for latent, colours in enumerate(palette):
        entries = {m[latent] for m in maps}
        entry = entries.pop() if len(entries) == 1 else None
        if not isinstance(entry, Along) or entry.axis not in summed[moving]:
            continue
        reached = entry.offset + entry.stride * np.arange(operand.shape[entry.axis])
        inside = np.flatnonzero((reached >= 0) & (reached < len(colours)))
        own = colours[reached[inside]]
        changed = [inside[own == colour].tolist() for colour in range(int(colours.max()) + 1)]
        most = max(map(len, changed))
        if most == 1 or 0 < 4 * most <= operand.shape[entry.axis]:
            places = tuple((*of, *[-1] * (most - len(of))) for of in changed)
            place = list(summed[moving]).index(entry.axis)
            return Product(moving, (int(summed[0][place]), int(summed[1][place])), latent, places)
    return None


def plan(jaxpr: jex.Jaxpr, site: Any, updates: Mapping[Any, Product]) -> Plan:
    """Split a program into what is evaluated once and what for every colour.

    Args:
        jaxpr: an inlined open jaxpr.
        site: the input variable that moves.
        updates: result of a product -> how it changes.
    """
    touched = _downstream(jaxpr, site)
    # Constants spread over large arrays are not kept: reading them costs more than making them.
    cheap = {v for e in jaxpr.eqns if e.primitive.name in ("broadcast_in_dim", "iota") for v in e.outvars}
    again = touched | cheap
    outs = tuple(jaxpr.outvars)
    late, kept = _needed(jaxpr, outs, again, updates)
    products = {v: updates[v] for e in late for v in e.outvars if v in updates}
    operands = [e.invars[products[v].moving] for e in late for v in e.outvars if v in products]
    early, more = _needed(jaxpr, operands, again, {})
    kept |= more | {v for v in (*outs, *operands, *products) if not isinstance(v, jex.Literal)}
    order = tuple(v for v in [*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)] if v in kept)
    return Plan(_jaxprs.rebuild(jaxpr, outvars=list(order)), order, tuple(early), tuple(late), products, site, outs)


def _needed(
    jaxpr: jex.Jaxpr, outs: Sequence[Any], again: set[Any], stops: Mapping[Any, Product]
) -> tuple[list[jex.JaxprEqn], set[Any]]:
    """Equations that must be run again to get `outs`, and the variables that they need from before.

    Of a product that is updated, the operand that moves is not needed.
    """
    wanted = {v for v in outs if not isinstance(v, jex.Literal)}
    steps: list[jex.JaxprEqn] = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in wanted and v in again for v in eqn.outvars):
            steps.append(eqn)
            how = stops.get(eqn.outvars[0])
            wanted |= {
                v for k, v in enumerate(eqn.invars) if not isinstance(v, jex.Literal) and not (how and k == how.moving)
            }
    made = {v for e in steps for v in e.outvars}
    return steps[::-1], wanted - made


Deltas = dict[Any, Array]
"""Result of a product -> change of its moving operand."""


def deltas(plan: Plan, base: Mapping[Any, Array], value: Array) -> Deltas:
    """Changes of the operands of products when the latent takes another value."""
    env = _run(plan.early, base, {plan.site: value})
    found = {}
    for eqn in plan.late:
        out = eqn.outvars[0]
        if out in plan.products:
            operand = eqn.invars[plan.products[out].moving]
            found[out] = env[operand] - base[operand]
    return found


def moved(plan: Plan, base: Mapping[Any, Array], value: Array, changes: Deltas, colour: Sequence[Array]) -> list[Array]:
    """Outputs of the program with the latent at another value, for one colour.

    Args:
        plan: the split program.
        base: values of `plan.kept` before the move.
        value: the latent after it: only coordinates of this colour have moved.
        changes: of the products' operands, when these coordinates (or all) move.
        colour: the colour on each axis of the latent.
    """
    env: dict[Any, Any] = {plan.site: value}

    def update(eqn: jex.JaxprEqn, operands: list[Any]) -> Array | None:
        out = eqn.outvars[0]
        return _update(eqn, plan.products[out], operands, base[out], changes[out], colour) if out in changes else None

    env = _run(plan.late, base, env, update)
    return [env[v] if v in env else base[v] for v in plan.outs]


def _run(
    steps: Sequence[jex.JaxprEqn],
    base: Mapping[Any, Array],
    env: dict[Any, Any],
    update: Callable[[jex.JaxprEqn, list[Any]], Array | None] = lambda eqn, operands: None,
) -> dict[Any, Any]:
    """Run equations on new values where there are any, else on those from before."""
    for eqn in steps:
        operands = [v.val if isinstance(v, jex.Literal) else env[v] if v in env else base.get(v) for v in eqn.invars]
        short = update(eqn, operands)
        env.update(
            zip(eqn.outvars, _jaxprs.evaluate_equation(eqn, operands) if short is None else [short], strict=True)
        )
    return env


def _update(
    eqn: jex.JaxprEqn, how: Product, operands: list[Any], before: Array, change: Array, colour: Sequence[Array]
) -> Array:
    index = colour[how.latent]
    single = len(how.places[0]) == 1
    if not single or [p for (p,) in how.places] != list(range(change.shape[how.axes[how.moving]])):
        index = jnp.asarray(how.places)[index]
    operands[how.moving] = change
    if single:
        index = jnp.reshape(index, ())
        parts = [lax.dynamic_slice_in_dim(x, index, 1, axis) for x, axis in zip(operands, how.axes, strict=True)]
        found = _outer(eqn, parts)
        return before + (jnp.where(index >= 0, found, jnp.zeros((), found.dtype)) if (-1,) in how.places else found)
    parts = [_taken(x, index, axis) for x, axis in zip(operands, how.axes, strict=True)]
    return before + _jaxprs.evaluate_equation(eqn, parts)[0]


def _taken(x: Array, index: Array, axis: int) -> Array:
    """Some slices of an array, and zeros for those of number -1."""
    inside = jnp.expand_dims(index >= 0, [d for d in range(x.ndim) if d != axis])
    return jnp.where(inside, jnp.take(x, jnp.maximum(index, 0), axis), jnp.zeros((), x.dtype))


def _outer(eqn: jex.JaxprEqn, parts: Sequence[Array]) -> Array:
    """The product of operands whose summed axis has size 1: written as a multiplication, XLA fuses it with what follows."""
    summed, batch = eqn.params["dimension_numbers"]
    if len(summed[0]) > 1:
        return _jaxprs.evaluate_equation(eqn, parts)[0]
    free = [[d for d in range(x.ndim) if d not in (*s, *b)] for x, s, b in zip(parts, summed, batch, strict=True)]
    left, right = (
        jnp.squeeze(jnp.transpose(x, [*b, *f, *s]), -1) for x, s, b, f in zip(parts, summed, batch, free, strict=True)
    )
    out: Any = eqn.outvars[0]
    left = jnp.expand_dims(left, range(left.ndim, left.ndim + len(free[1])))
    right = jnp.expand_dims(right, range(len(batch[0]), len(batch[0]) + len(free[0])))
    return left.astype(out.aval.dtype) * right.astype(out.aval.dtype)


def _downstream(jaxpr: jex.Jaxpr, site: Any) -> set[Any]:
    """Variables that depend on an input."""
    touched = {site}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, jex.Literal) and v in touched for v in eqn.invars):
            touched.update(eqn.outvars)
    return touched
