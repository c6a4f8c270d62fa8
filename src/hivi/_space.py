"""The latent variables of a target: user-facing `Latent`, engine-facing `Site`, and their supports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.constraints import Constraint

from hivi._errors import TargetError, message

Latents: TypeAlias = dict[str, Array]
"""One value of all latents: site name -> array."""

FINITE_LIMIT = 64
"""Integer intervals up to this many values get a categorical q; in longer ones values are taken to be ordered."""


@dataclasses.dataclass(frozen=True)
class Latent:
    """A latent variable of a log-joint.

    Args:
        shape: shape of its value, event dimensions included; a Python tuple of positive integers.
        support: a NumPyro constraint. Continuous supports need a bijection from the reals (`biject_to`);
            discrete ones are `boolean`, `nonnegative_integer`, `positive_integer` and `integer_interval`.
        plates: plate name -> axis of `shape`; used for names, sharding and messages, never for locality.

    Example:
        >>> import hivi
        >>> from numpyro.distributions import constraints
        >>> hivi.Latent(shape=(2,), support=constraints.boolean).shape
        (2,)
    """

    shape: Sequence[SupportsIndex] = ()
    support: Constraint = dataclasses.field(default_factory=lambda: constraints.real)
    plates: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Values:
    """What values a site takes in the engine's coordinates.

    Attributes:
        kind: "real" (unconstrained coordinates), "finite" (low..low+count-1, enumerable), "binomial" (the
            same range, ordered and long) or "count" (low, low+1, ...).
        low: the smallest integer value.
        count: number of values, 0 where it is infinite.
        concentration: of the q of a count, negative binomial; 0 for Poisson.
        dispersed: whether the spread of q is free, for a count or a long range.
    """

    kind: Literal["real", "finite", "binomial", "count"]
    low: int = 0
    count: int = 0
    concentration: float = 0.0
    dispersed: bool = False

    @property
    def ordered(self) -> bool:
        """Whether q of a value is one of counts (Poisson or binomial, or these with a free spread), not a table."""
        return self.kind in ("count", "binomial")

    def __str__(self) -> str:
        if self.kind == "real":
            return "real"
        return (
            f"counts from {self.low}" if self.kind == "count" else f"integers {self.low} to {self.low + self.count - 1}"
        )


class Plate(NamedTuple):
    """A plate of conditionally independent rows, seen `batch` rows at a time.

    Attributes:
        name: its name in the model.
        size: number of rows of the full data.
        batch: number of rows in a minibatch; equal to `size` where the plate is not subsampled.
    """

    name: str
    size: int
    batch: int

    @property
    def scale(self) -> float:
        """N/B, the factor that makes a minibatch's terms unbiased."""
        return self.size / self.batch


@dataclasses.dataclass(frozen=True)
class Site:
    """A latent site in the engine's coordinates: unconstrained reals, or integers.

    Attributes:
        name: the sample site.
        shape: shape in engine coordinates at full size (a simplex of 3 has shape (2,)).
        values: what values it takes.
        constrained_shape: shape of the value that the model sees, at full size.
        support: NumPyro constraint of that value; None where it depends on other latents.
        plates: pairs (plate name, axis of `shape`).
        local: the subsampled plate whose rows the site has, with the axis; None for a global site.
        bounds: class and parameters of the support, as text.
    """

    name: str
    shape: tuple[int, ...]
    values: Values
    constrained_shape: tuple[int, ...]
    support: Constraint | None = dataclasses.field(default=None, compare=False)
    plates: tuple[tuple[str, int], ...] = ()
    local: tuple[Plate, int] | None = None
    bounds: str = dataclasses.field(default="", init=False)

    def __post_init__(self) -> None:
        # Constraints cannot be hashed; two sites with other bounds must still be unequal, or compiled maps are reused.
        object.__setattr__(self, "bounds", "" if self.support is None else fingerprint(self.support))

    @property
    def discrete(self) -> bool:
        """Whether the site takes integer values."""
        return self.values.kind != "real"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape within one minibatch."""
        if self.local is None:
            return self.shape
        plate, axis = self.local
        return (*self.shape[:axis], plate.batch, *self.shape[axis + 1 :])

    @property
    def scale(self) -> float:
        """N/B of the site's subsampled plate, 1 for a global site."""
        return 1.0 if self.local is None else self.local[0].scale

    @property
    def dtype(self) -> Any:
        """Integers for a discrete site, the default float otherwise."""
        return jnp.int32 if self.discrete else jnp.result_type(float)

    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of one minibatch value, for tracing."""
        return jax.ShapeDtypeStruct(self.batch_shape, self.dtype)

    def full_example(self) -> jax.ShapeDtypeStruct:
        """Shape and type of one value at full size."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def row(self) -> Site:
        """The same site for a single row of its subsampled plate."""
        if self.local is None:
            raise ValueError(f"{self.name} has no subsampled plate")
        _, axis = self.local
        plates = tuple((n, a - (a > axis)) for n, a in self.plates if a != axis)
        shape, seen = ((*x[:axis], *x[axis + 1 :]) for x in (self.shape, self.constrained_shape))
        return dataclasses.replace(self, shape=shape, constrained_shape=seen, plates=plates, local=None)

    def constrain(self, value: Array) -> Array:
        """Map one value from engine coordinates to the model's own space."""
        if self.discrete:
            return value
        return biject_to(self._fixed_support())(value)

    def _fixed_support(self) -> Constraint:
        if self.support is None:
            raise TargetError(
                message(
                    f"site {self.name!r}",
                    "a support that depends on other latents or on arrays",
                    "a fixed support, to map values between the model's space and the engine's",
                    "draw with Fit.sample, which runs the model; for densities, reparameterise the site",
                )
            )
        return self.support

    def inside(self, values: Array) -> Array:
        """Which draws of the model's own space, along a leading axis, lie in the support."""
        good = [jnp.ones(len(values), bool) if self.support is None else self.support(values)]
        good += [values == jnp.round(values)] if self.discrete and jnp.issubdtype(values.dtype, jnp.floating) else []
        return jnp.all(jnp.stack([jnp.all(g.reshape(len(values), -1), -1) for g in good]), 0)

    def log_jacobian(self, value: Array) -> Array:
        """Log |d constrained / d unconstrained| of one value, summed; 0 for a discrete site."""
        return jnp.zeros(()) if self.discrete else jnp.sum(self.log_jacobians(value))

    def log_jacobians(self, value: Array) -> Array:
        """The same of a continuous site before its sum: one number for each of its independent parts."""
        transform = biject_to(self._fixed_support())
        return transform.log_abs_det_jacobian(value, transform(value))

    def unconstrain(self, value: Array) -> Array:
        """Map one value from the model's own space to engine coordinates."""
        if self.discrete:
            return jnp.asarray(value)
        return biject_to(self._fixed_support()).inv(jnp.asarray(value))

    def unconstrained_mean(self, mean: Array) -> Array:
        """A mean in the model's own space, in engine coordinates; that of a discrete site as it is."""
        return mean if self.discrete else self.unconstrain(mean)


def fingerprint(support: Constraint) -> str:
    """Class and parameters of a constraint, as text."""
    children, (_, aux) = support.tree_flatten()
    if any(isinstance(c, jax.core.Tracer) for c in children):
        return f"{type(support).__name__} while tracing"
    parts = [fingerprint(c) if isinstance(c, Constraint) else np.asarray(c).tolist() for c in children]
    return f"{type(support).__name__}{parts}{sorted(dict(aux).items())}"


def make_site(
    name: str,
    shape: tuple[int, ...],
    support: Constraint,
    plates: tuple[tuple[str, int], ...] = (),
    local: tuple[Plate, int] | None = None,
    ordered: bool = True,
) -> Site:
    """Build a site from the shape and support that the model sees.

    Args:
        name: the sample site.
        shape: shape of its value.
        support: its constraint.
        plates: pairs (plate name, axis of `shape`).
        local: the subsampled plate whose rows the site has, with the axis.
        ordered: whether integers near each other mean something alike; not so for those of a Categorical.

    Raises:
        TargetError: the support has no bijection from the reals and no discrete q.
    """
    values = classify(name, support, ordered)
    if values.kind != "real":
        return Site(name, shape, values, shape, support, plates, local)
    try:
        unconstrained = biject_to(support).inverse_shape(shape)
    except NotImplementedError:
        raise TargetError(_no_bijection(name, support)) from None
    return Site(name, tuple(unconstrained), values, shape, support, plates, local)


def classify(name: str, support: Constraint, ordered: bool = True) -> Values:
    """Read off what values a support has.

    Raises:
        TargetError: a discrete support without a variational likelihood, or with bounds that are not fixed.
    """
    base = support
    while hasattr(base, "base_constraint"):  # NumPyro's own class: `to_event` hides the support inside
        base = base.base_constraint
    if not base.is_discrete:
        return Values("real")
    if base is constraints.boolean:
        return Values("finite", 0, 2)
    if base is constraints.nonnegative_integer:
        return Values("count", 0, 0)
    if base is constraints.positive_integer:
        return Values("count", 1, 0)
    lower, upper = getattr(base, "lower_bound", None), getattr(base, "upper_bound", None)
    if (lower is not None and isinstance(lower, jax.core.Tracer)) or isinstance(upper, jax.core.Tracer):
        raise TargetError(
            message(
                f"site {name!r}",
                "integer bounds that depend on other latents",
                "fixed bounds",
                "give it fixed ones; for two in order, draw both freely and take jnp.minimum and jnp.maximum of them",
            )
        )
    if type(base) is type(constraints.integer_greater_than(0)) and lower is not None:
        return Values("count", _fixed(name, lower), 0)
    if lower is not None and upper is not None:
        low, count = _fixed(name, lower), int(np.max(np.asarray(upper))) - _fixed(name, lower) + 1
        if np.min(np.asarray(upper)) != np.max(np.asarray(upper)):
            raise TargetError(
                message(
                    f"site {name!r}",
                    f"integer upper bounds that differ between elements ({np.unique(np.asarray(upper))[:4]}...)",
                    "one upper bound for the whole site",
                    "make one site per bound, for example Binomial sites grouped by total_count",
                )
            )
        return Values("binomial" if ordered and count > FINITE_LIMIT else "finite", low, count)
    raise TargetError(
        message(
            f"site {name!r}",
            f"the discrete support {base!r}",
            "boolean, nonnegative_integer, positive_integer or integer_interval",
            "write multinomial and one-hot latents as Categorical ones (an index instead of a vector)",
        )
    )


def _fixed(name: str, bound: Any) -> int:
    values = np.unique(np.asarray(bound))
    if values.size != 1:
        raise TargetError(
            message(
                f"site {name!r}",
                f"integer lower bounds that differ between elements ({values[:4]})",
                "one lower bound for the whole site",
                "shift the variable so that all elements start at the same integer",
            )
        )
    return int(values[0])


def _no_bijection(name: str, support: Constraint) -> str:
    return message(
        f"site {name!r}",
        f"the support {support!r}, for which NumPyro has no bijection from the reals",
        "a support that `biject_to` knows",
        "reparameterise the site, for example with numpyro.handlers.reparam or a real-valued site and a deterministic one",
    )


def constrain(sites: tuple[Site, ...], z: Mapping[str, Array]) -> Latents:
    """Map one draw of all sites to the model's own space."""
    return {site.name: site.constrain(z[site.name]) for site in sites}
