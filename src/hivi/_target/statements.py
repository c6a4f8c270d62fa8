"""Read a NumPyro model: one run under a handler that sets every latent and keeps log-densities element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro import primitives as numpyro_primitives
from numpyro.distributions import CategoricalLogits, CategoricalProbs, biject_to, constraints
from numpyro.distributions.distribution import Delta, ImproperUniform

from hivi._errors import TargetError, message
from hivi._space import make_site
from hivi._target.densities import base_support, log_prob, outside_support, unwrap


class Mismatch(ValueError):
    """Shapes that do not fit a minibatch; at full size they would."""


class Term(NamedTuple):
    """One additive part of the log-joint, element by element.

    Attributes:
        array: log-probabilities, batch axes first.
        events: how many of its last axes are event axes that were not summed.
        plates: pairs (plate, NumPyro's negative dim) of the statement.
        scale: the user's own constant scale; plate scales are not in it.
        latent: the site whose Jacobian this is, or "".
    """

    array: Any
    events: int
    plates: tuple[tuple[str, int], ...]
    scale: float = 1.0
    latent: str = ""

    def axis(self, dim: int) -> int:
        """The axis of the array that a plate of this dim runs along; negative where there is none."""
        return jnp.ndim(self.array) - self.events + dim


class Latent(NamedTuple):
    """A latent statement as the model makes it.

    Attributes:
        shape: shape of its value.
        free: shape of its unconstrained value (of its value, where it is discrete).
        plates: pairs (plate, axis), the same axis of both shapes.
        support: its constraint; may hold traced values.
        improper: whether its prior is `ImproperUniform`.
        ordered: whether its integers are in an order, not names of categories.
    """

    shape: tuple[int, ...]
    free: tuple[int, ...]
    plates: tuple[tuple[str, int], ...]
    support: constraints.Constraint
    improper: bool
    ordered: bool


class _Draw(NamedTuple):
    """What was decided when a latent got its value: one step of it, inside a scan."""

    lead: tuple[int, ...]
    shape: tuple[int, ...]
    free: tuple[int, ...]
    batch: int


class Reader(numpyro_primitives.Messenger):
    """Runs a model once, outside all of the model's own handlers.

    Args:
        z: latents in the engine's coordinates; None to discover them, each filled with `start`.
        start: a traced scalar, so that nothing is computed while shapes are discovered.
        rows: row numbers of the subsampled plates; all others are seen whole.
        masked: keep the masks of latent statements, as NumPyro does; else masked coordinates keep their prior.

    Attributes:
        terms: name -> its part of the log-joint; the Jacobian of site x is called `jacobian(x)`.
        latents: the latent statements.
        values: their values, in the model's own space.
        masks: masks on latent statements, ready to broadcast with the unconstrained value.
        missing: observed statements -> where an observation that counts is NaN.
        outside: observed statements -> (the distribution's name, where an observation that counts is not in its
            support).
        plates: plate -> (its size, the `subsample_size` that the model declares).
        subsamples: whether the model calls `numpyro.subsample`.
        enumerated: discrete latents that ask to be enumerated.
        repeated: observed statements whose values count more than once each, because their shape broadcasts -> a note on it.
    """

    def __init__(
        self,
        z: Mapping[str, Any] | None = None,
        start: Any = 0.0,
        rows: Mapping[str, Any] | None = None,
        masked: bool = False,
    ) -> None:
        self.z, self.start, self.rows, self.masked = z, start, dict(rows or {}), masked
        self.terms: dict[str, Term] = {}
        self.latents: dict[str, Latent] = {}
        self.values: dict[str, Any] = {}
        self.masks: dict[str, Any] = {}
        self.missing: dict[str, Any] = {}
        self.outside: dict[str, tuple[str, Any]] = {}
        self.plates: dict[str, tuple[int, int | None]] = {}
        self.subsamples = False
        self.enumerated: list[str] = []
        self.repeated: dict[str, str] = {}
        self._draws: dict[str, _Draw] = {}
        super().__init__()

    def run(self, model: Callable[[], Any]) -> Reader:
        """Run the model and return this reader, filled."""
        try:
            with self:
                model()
        except AssertionError as error:
            if "unique names" not in str(error):  # NumPyro's assertion, where a scan body repeats a name
                raise
            raise TargetError(_duplicate(str(error).split("`")[1])) from error
        return self

    def process_message(self, msg: dict[str, Any]) -> None:
        """Called for each statement of the model, after the handlers inside the model."""
        kind = msg["type"]
        if kind == "sample":
            self._sample(msg)
        elif kind == "plate":
            self._plate(msg)
        elif kind == "subsample":
            self.subsamples = True
        elif kind == "control_flow":
            msg["kwargs"]["substitute_stack"].append(("substitute", self._inside(msg["args"])))
        elif kind in ("param", "mutable"):
            raise TargetError(_parameter(kind, msg["name"]))
        elif kind == "prng_key" and msg["value"] is None and msg["kwargs"]["rng_key"] is None:
            raise TargetError(_random(hidden=_blocks() > 0))

    def _plate(self, msg: dict[str, Any]) -> None:
        name, (size, declared) = msg["name"], msg["args"]
        rows = self.rows.get(name)
        if rows is None and self.plates.get(name, (size, None))[0] != size:
            found = f"two sizes, {self.plates[name][0]} and {size}"
            raise TargetError(message(f"plate {name!r}", found, "one size for each name", "give the plates two names"))
        self.plates[name] = (size, declared)
        # The same rows wherever a name comes back, and no warning that they are not `subsample_size` many.
        msg["value"] = jnp.arange(size) if rows is None else rows
        msg["args"] = (size, msg["value"].shape[0])

    def _sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.terms:
            raise TargetError(_duplicate(msg["name"]))
        fresh = msg["value"] is None and not msg.get("_control_flow_done")
        if fresh and isinstance(unwrap(msg["fn"])[0], Delta):
            msg["value"] = msg["fn"](rng_key=None, sample_shape=msg["kwargs"].get("sample_shape", ()))
        elif fresh:
            msg["value"] = self._draw(msg)
        self._record(msg)

    def _inside(self, args: tuple[Any, ...]) -> Callable[[dict[str, Any]], Any]:
        """What sets the latents inside NumPyro's `scan` and `cond`, whose bodies hide their statements from us."""
        depth = _blocks() + 1
        length, reverse = 0, False
        if len(args) == 5:  # scan: (function, init, xs, length, reverse)
            length, reverse = args[3] or jnp.shape(jax.tree.leaves(args[2])[0])[0], args[4]

        def value(msg: dict[str, Any]) -> Any:
            if msg["type"] in ("param", "mutable"):
                raise TargetError(_parameter(msg["type"], msg["name"]))
            if msg["type"] != "sample" or msg["value"] is not None or msg["is_observed"]:
                return None
            if _blocks() > depth:
                raise TargetError(_nested(msg["name"]))
            if isinstance(unwrap(msg["fn"])[0], Delta):
                return msg["fn"](rng_key=None, sample_shape=msg["kwargs"].get("sample_shape", ()))
            step = msg["infer"].get("_scan_current_index")
            if step is None:
                return self._draw(msg)
            # Latents are in the order of xs, as the stacked results of the scan are.
            return self._draw(msg, (length,), length - 1 - step if reverse else step)

        return value

    def _draw(self, msg: dict[str, Any], lead: tuple[int, ...] = (), step: Any = None) -> Any:
        """Value of a latent, with its log-Jacobian left in the message."""
        name, fn = msg["name"], msg["fn"]
        if fn.support is None:
            raise TargetError(message(f"site {name!r}", f"{type(fn).__name__}, which has no support", "one", "set it"))
        discrete = base_support(fn.support).is_discrete
        shape = (*msg["kwargs"].get("sample_shape", ()), *fn.shape())
        free = shape if discrete else make_site(name, shape, fn.support).shape
        self._draws[name] = _Draw(lead, shape, free, len(shape) - len(fn.event_shape))
        if self.z is None:
            u = jnp.full(free, self.start)
        else:
            u = self._given(name, (*lead, *free))
            u = u if step is None else u[step]
        if discrete:
            return jnp.asarray(u, jnp.int32)
        if isinstance(base_support(fn.support), type(constraints.real)):
            return u
        transform = biject_to(fn.support)
        value = transform(u)
        msg["intermediates"] = [transform.log_abs_det_jacobian(u, value)]  # comes back stacked from a scan
        return value

    def _given(self, name: str, shape: tuple[int, ...]) -> Any:
        if self.z is None or name not in self.z:
            expected = "the same statements in every run of the model"
            raise TargetError(message(f"site {name!r}", "a latent that only some runs have", expected, _CONTROL_FLOW))
        u = self.z[name]
        if jnp.shape(u) != shape:
            raise Mismatch(f"site {name!r} has shape {shape} in a minibatch, where its plates say {jnp.shape(u)}")
        return u

    def _record(self, msg: dict[str, Any]) -> None:
        """Keep the log-density of a statement that has its value."""
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        base, mask, events = unwrap(fn)
        draw = self._draws.get(name) if not msg["is_observed"] else None
        plates = tuple((frame.name, frame.dim) for frame in msg["cond_indep_stack"])
        if draw is None:
            if not isinstance(value, jax.Array | np.ndarray | np.generic | float | int):
                found, cure = f"observations as a {type(value).__name__}", f"obs=jnp.asarray({name})"
                raise TargetError(message(f"site {name!r}", found, "an array or a number", cure))
            self._check_shape(name, fn, value)
            wrong = outside_support(base, mask, value) if msg["is_observed"] else None
            if wrong is not None:
                self.outside[name] = (type(base).__name__, wrong)
            if jnp.issubdtype(jnp.result_type(value), jnp.inexact) and jnp.size(value):
                unseen = jnp.reshape(mask, jnp.shape(mask) + (1,) * base.event_dim)
                self.missing[name] = jnp.isnan(jnp.asarray(value)) & unseen
            array = log_prob(fn, value, fixed=not msg["is_observed"])
        else:
            array = log_prob(fn, value, keep_mask=self.masked)
            self._latent(msg, draw, base, mask, array)
        scale, constant = self._user_scale(msg), 1.0
        if isinstance(scale, jax.Array) or np.ndim(scale):
            array = array * jnp.reshape(scale, jnp.shape(scale) + (1,) * events)
        else:
            constant = float(scale)
        self._keep(name, Term(array, events, plates, constant))

    def _check_shape(self, name: str, fn: Any, value: Any) -> None:
        """Fixed values that do not broadcast with their distribution; in a minibatch that tells how data are sliced."""
        shape, expected = jnp.shape(value), fn.shape()
        try:
            full = np.broadcast_shapes(shape, expected)
            if math.prod(shape) < math.prod(full) and math.prod(shape) > 1:
                said = f"observations of shape {shape} are broadcast to {full}, as NumPyro does"
                self.repeated[name] = f"{said}: each counts {math.prod(full) // math.prod(shape)} times"
        except ValueError as error:
            if self.rows:
                raise
            cure = "compare the data's shape with the plates' sizes"
            found = f"observations of shape {shape}"
            raise TargetError(message(f"site {name!r}", found, f"a shape like {expected}", cure)) from error

    def _latent(self, msg: dict[str, Any], draw: _Draw, base: Any, mask: Any, array: Any) -> None:
        name, lead, jacobian = msg["name"], draw.lead, msg["intermediates"]
        axes = [(frame.name, len(lead) + draw.batch + frame.dim) for frame in msg["cond_indep_stack"]]
        free, shape = (*lead, *draw.free), (*lead, *draw.shape)
        improper = isinstance(base, ImproperUniform)
        ordered = not isinstance(base, CategoricalProbs | CategoricalLogits)
        self.latents[name] = Latent(shape, free, tuple(axes), msg["fn"].support, improper, ordered)
        self.values[name] = jnp.reshape(msg["value"], shape)
        if mask is not True:
            full = jnp.broadcast_to(mask, jnp.shape(array))
            self.masks[name] = full.reshape(full.shape + (1,) * (len(free) - full.ndim))
        if "enumerate" in msg["infer"]:
            self.enumerated.append(name)
        if jacobian:
            plates = tuple((frame.name, frame.dim) for frame in msg["cond_indep_stack"])
            extra = jnp.ndim(jacobian[0]) - len(lead) - draw.batch
            self._keep(f"jacobian({name})", Term(jacobian[0], extra, plates, latent=name))

    def _keep(self, name: str, term: Term) -> None:
        if name in self.terms:
            raise TargetError(_duplicate(name))
        for plate, dim in term.plates:
            rows, axis = self.rows.get(plate), term.axis(dim)
            if rows is not None and (axis < 0 or jnp.shape(term.array)[axis] != len(rows)):
                shape = jnp.shape(term.array)
                raise Mismatch(f"{name!r} has shape {shape}, which does not run along {len(rows)} rows of {plate!r}")
        self.terms[name] = term

    def _user_scale(self, msg: dict[str, Any]) -> Any:
        """The scale of a message without what its plates put in: that part is taken from the full sizes."""
        if msg["scale"] is None:
            return 1.0
        seen = [(self.plates[f.name][0], f.size) for f in msg["cond_indep_stack"] if f.name in self.plates]
        ratio = math.prod(size / rows for size, rows in seen)
        return msg["scale"] if ratio == 1.0 else msg["scale"] / ratio


def _blocks() -> int:
    """How many blocks surround the statement: `scan` and `cond` put one around their bodies."""
    return sum(isinstance(h, handlers.block) for h in numpyro_primitives._PYRO_STACK)


_CONTROL_FLOW = "use jnp.where, jax.lax or numpyro.contrib.control_flow instead of `if` and `for` on changing values"


def _random(hidden: bool) -> str:
    if hidden:  # block asks for a key for each statement that it hides and that has no value
        found = "a statement hidden by handlers.block, or a scan, cond or subsampled plate inside a scan or cond"
        cure = "take it out of the block; use jax.lax for inner loops, and make subsampled plates outside"
        return message("numpyro.prng_key", found, "statements that inference can see", cure)
    cure = "make them a latent (numpyro.sample), draw them before the model, or wrap it in numpyro.handlers.seed"
    found = "random numbers outside sample statements"
    return message("numpyro.prng_key", found, "a log-joint without randomness", cure)


def _parameter(kind: str, name: str) -> str:
    return message(
        f"site {name!r}",
        f"a numpyro.{kind} statement, for which Bayesian inference has no prior",
        "sample statements only",
        f"replace it by numpyro.sample({name!r}, prior) or by a fixed value; a network's weights need a prior too",
    )


def _duplicate(name: str) -> str:
    cure = "rename one, wrap repeated parts in numpyro.handlers.scope, or use a plate"
    return message(f"site {name!r}", "a second statement of that name", "unique names", cure)


def _nested(name: str) -> str:
    cure = "use jax.lax.scan for the inner loop, with its latents sampled before it"
    return message(f"site {name!r}", "a latent inside nested scan or cond", "one level of them", cure)
