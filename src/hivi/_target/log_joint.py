"""`from_log_joint`: a target from any function of a dict of latents."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import IdentityTransform

from hivi._errors import TargetError, message
from hivi._factored import Difference, factorise
from hivi._space import Latent, Latents, Site, make_site
from hivi._target.base import Target


def from_log_joint(
    log_joint: Callable[..., Any],
    latents: Mapping[str, Latent],
    *,
    data: Any = None,
    differences: Mapping[tuple[str, str], Difference] | None = None,
) -> Target:
    """Make a target from a log-joint.

    Args:
        log_joint: function of a dict site -> value (in the latents' own, constrained space), and of `data` if that is
            given. It returns log p(x, z) in nats as a scalar, or an array or dict of arrays whose total it is; `hivi.explain`
            notes the shape of an array, which may be larger than meant: (n, 1) and (n,) broadcast to (n, n).
        latents: site -> its shape and support.
        data: optional PyTree of arrays, passed as second argument; new data of the same shapes compile nothing anew, but
            where integers in them pick elements of discrete latents, or zeros of a matrix leave them out: these are read, to know
            which element meets which datum. Arrays that the function closes over are treated likewise.
        differences: optional closed forms: (term name, discrete site) -> `fn(z, moved, data, rows)`, the change of that
            whole term when one coordinate at a time takes its value in `moved`, as an array of the site's shape.

    Raises:
        TargetError: no latents, an unusable support, or a result that is not a real number.

    Example:
        >>> import hivi, jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> table = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
        >>> target = hivi.from_log_joint(
        ...     lambda z: table[z["z"][0], z["z"][1]],
        ...     latents={"z": hivi.Latent(shape=(2,), support=constraints.boolean)},
        ... )
        >>> [s.name for s in target.sites]
        ['z']
    """
    if not latents:
        raise TargetError(message("from_log_joint", "no latents", "at least one", "describe them with hivi.Latent"))
    sites = tuple(_site(name, latent) for name, latent in latents.items())
    _check_arguments(log_joint, data is not None)
    notes: set[str] = set()

    def terms(z: Latents, data: Any, rows: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        out: dict[str, Any] = {}
        for s in sites:
            value, jacobian = constrain_with_jacobian(s, z[s.name])
            values[s.name] = value
            if jacobian is not None:
                out[f"jacobian({s.name})"] = jacobian
        result = log_joint(values) if data is None else log_joint(values, data)
        named = dict(result) if isinstance(result, Mapping) else {"log_joint": result}
        if not isinstance(result, Mapping) and (shape := jnp.shape(result)):
            notes.add(
                f"the log-joint returned an array of shape {shape}: log p(x, z) is the sum of its {math.prod(shape)} terms"
            )
        if missing := [name for name, value in named.items() if value is None]:
            raise TargetError(message(f"log_joint, term {missing[0]!r}", "None", "a number", "return the log-density"))
        return out | {str(name): value for name, value in named.items()}

    example, data = {s.name: s.example() for s in sites}, jax.tree.map(jnp.asarray, data)
    try:
        discrete = {s.name for s in sites if s.discrete}
        factored = factorise(terms, example, data, {}, overrides=differences, indexed=discrete)
    except KeyError as error:
        if error.args[:1] and isinstance(error.args[0], str) and error.args[0] not in latents:
            found = f"a look-up of {error.args[0]!r}, which is no latent's name"
            cure = "correct the name, describe that latent, or, if it is a look-up in data of yours, see what they have"
            raise TargetError(message("log_joint", found, f"one of {list(latents)}", cure)) from error
        raise
    except jax.errors.JAXTypeError as error:
        raise TargetError(traced_control_flow("log_joint", error)) from error
    return Target("log_joint", sites, factored, data, notes=tuple(notes))


def _check_arguments(log_joint: Callable[..., Any], given: bool) -> None:
    """Refuse a function of other arguments than the latents, and the data where they are given.

    Raises:
        TargetError: naming its arguments.
    """
    try:
        signature = inspect.signature(log_joint)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind({}, None) if given else signature.bind({})
    except TypeError as error:
        expected = "a function of the dict of latents" + (" and of data" if given else "")
        cure = (
            "take data as its second argument"
            if given
            else "pass the data: from_log_joint(log_joint, latents, data=...)"
        )
        raise TargetError(message("log_joint", f"the arguments {signature}", expected, cure)) from error


def _site(name: str, latent: Latent) -> Site:
    if not isinstance(latent, Latent):
        raise TargetError(
            message(f"latent {name!r}", repr(latent), "a hivi.Latent", "hivi.Latent(shape=..., support=...)")
        )
    try:
        shape = tuple(operator.index(n) for n in latent.shape)
    except TypeError:
        shape = (0,)
    if any(n < 1 for n in shape):
        found, cure = f"shape={latent.shape!r}", "for example shape=(3,)"
        raise TargetError(message(f"latent {name!r}", found, "a tuple of positive integers", cure))
    if not isinstance(latent.support, Constraint):
        cure = "for example numpyro.distributions.constraints.positive"
        raise TargetError(message(f"latent {name!r}", f"support={latent.support!r}", "a NumPyro constraint", cure))
    return make_site(name, shape, latent.support, tuple(latent.plates.items()))


def constrain_with_jacobian(site: Site, value: Any) -> tuple[Any, Any]:
    """The value in the model's space, and the log-Jacobian of its transform (None where it is constant)."""
    if site.discrete or site.support is None:
        return value, None
    transform = biject_to(site.support)
    constrained = transform(value)
    if isinstance(getattr(transform, "base_transform", transform), IdentityTransform):
        return constrained, None
    return constrained, transform.log_abs_det_jacobian(value, constrained)


def traced_control_flow(where: str, error: Exception) -> str:
    """Message for Python control flow on a latent's value."""
    first = str(error).strip().splitlines()[0]
    return message(
        where,
        f"Python control flow or NumPy code that needs the value of a latent ({first})",
        "code that JAX can trace",
        "use jnp.where or jax.lax.cond instead of `if`, and jax.numpy instead of numpy, on latents",
    )
