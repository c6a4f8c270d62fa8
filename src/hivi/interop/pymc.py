"""`from_pymc`: a target from a PyMC model, through PyMC's own JAX backend."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint

from hivi._errors import TargetError, message
from hivi._factored import factorise
from hivi._space import Latents, Site, Values, make_site
from hivi._target.base import Target
from hivi._target.replay import replay

BOUNDED = ("Categorical", "Binomial", "BetaBinomial", "DiscreteUniform")
COUNTS = ("Poisson", "NegBinomial")  # the names of PyTensor's operations
DISCRETE = ", ".join(("Bernoulli", *BOUNDED, "Poisson", "NegativeBinomial", "Geometric"))


def from_pymc(model: Any) -> Target:
    """Make a target from a PyMC model.

    The log-density is PyMC's own, `model.logp(sum=False)`, one term per variable and potential, compiled to JAX by PyTensor:
    value transforms with their Jacobians, `total_size` and potentials are in it. Continuous sites have PyMC's unconstrained
    value as their coordinate; draws come back in PyMC's own constrained space, under the variables' names. Discrete
    latents are sites of integers. Data are constants; `pm.Data` is read when the target is made.

    Refused, with the variable's name and a cure: `pm.Minibatch`, discrete distributions other than Bernoulli, Categorical,
    Binomial, BetaBinomial, DiscreteUniform, Poisson, NegativeBinomial and Geometric, bounds of a discrete variable that
    depend on other variables, and operations that PyTensor cannot compile to JAX.

    Args:
        model: a `pymc.Model`.

    Returns:
        The target; `hivi.explain` prints what was read.

    Raises:
        TargetError: PyMC is not installed, or the model cannot be used.

    Example:
        >>> import hivi
        >>> import pymc as pm
        >>> with pm.Model() as model:
        ...     mu = pm.Normal("mu", 0, 10)
        ...     sigma = pm.HalfNormal("sigma", 1)
        ...     y = pm.Normal("y", mu, sigma, observed=[1.0, 2.0, 3.0])
        >>> [(s.name, s.shape) for s in hivi.from_pymc(model).sites]
        [('mu', ()), ('sigma', ())]

    Source:
        https://www.pymc.io (`pymc.sampling.jax.get_jaxified_graph`).
    """
    pm = _pymc()
    if not isinstance(model, pm.Model):
        raise TargetError(
            message("from_pymc", type(model).__name__, "a pymc.Model", "pass `model` of `with ... as model`")
        )
    if not model.free_RVs:
        raise TargetError(message("from_pymc", "a model without unobserved variables", "at least one", "add a prior"))
    with _quietly():
        read = _Read.of(model)
        terms, values = read.terms(), read.constrained()
        sites = tuple(_site(pm, model, rv, shape) for rv, shape in zip(model.free_RVs, read.shapes, strict=True))
        sites = _checked(sites, values)
        examples = {s.name: s.example() for s in sites}
        factored = factorise(lambda z, data, rows: terms(z), examples, (), {})
        own = any(s.support is None for s in sites)
        constrainer = replay(lambda z, data: values(z), sites, ()) if own else None
    return Target(model.name or "pymc model", sites, factored, (), constrainer=constrainer)


def _pymc() -> Any:
    """PyMC with its JAX backend, imported without what that does to JAX's precision and to the number of devices."""
    # In a thread of its own, where JAX's setting is the process's, not that of a surrounding `jax.enable_x64(...)`.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_import_pymc).result()


def _import_pymc() -> Any:
    settings: Any = jax.config
    wide, flags = settings.jax_enable_x64, os.environ.get("XLA_FLAGS")
    try:
        with _quietly():
            pm = importlib.import_module("pymc")
            importlib.import_module("pymc.sampling.jax")
    except ImportError as error:
        cure = "pip install 'hivi[pymc]' (or: pip install pymc)"
        raise TargetError(message("from_pymc", f"no PyMC ({error})", "PyMC 5.20 or later", cure)) from error
    finally:
        jax.config.update("jax_enable_x64", wide)
        if flags is None:
            os.environ.pop("XLA_FLAGS", None)
        else:
            os.environ["XLA_FLAGS"] = flags
    return pm


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """PyTensor asks JAX for double precision, which warns at every constant where it is off, and warns of its own C code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Read(NamedTuple):
    """A PyMC model, ready to be compiled to JAX.

    Attributes:
        model: the model.
        shapes: of every free variable, (shape of its value, shape of the variable).
    """

    model: Any
    shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, model: Any) -> _Read:
        found = model.eval_rv_shapes()
        known = {name: tuple(int(n) for n in shape) for name, shape in found.items()}
        names = [(model.rvs_to_values[rv].name, rv.name) for rv in model.free_RVs]
        return cls(model, tuple((known[value], known[rv]) for value, rv in names))

    def terms(self) -> Callable[[Latents], dict[str, Any]]:
        """The log-density, one array per variable and potential."""
        variables = [*self.model.basic_RVs, *self.model.potentials]
        graphs = self.model.logp(vars=variables, sum=False)
        return self._jax([v.name for v in variables], graphs)

    def constrained(self) -> Callable[[Latents], dict[str, Any]]:
        """The free variables in PyMC's own space."""
        names = [rv.name for rv in self.model.free_RVs]
        return self._jax(names, self.model.replace_rvs_by_values(list(self.model.free_RVs)))

    def _jax(self, names: Sequence[str], graphs: Sequence[Any]) -> Callable[[Latents], dict[str, Any]]:
        backend = importlib.import_module("pymc.sampling.jax")
        inputs = [self.model.rvs_to_values[rv] for rv in self.model.free_RVs]
        for name, graph in zip(names, graphs, strict=True):
            _refuse_randomness(name, graph)
        try:
            compiled = backend.get_jaxified_graph(inputs=inputs, outputs=list(graphs))
        except NotImplementedError as error:
            cure = "write it with operations that PyTensor has for JAX, or the model in NumPyro"
            found = f"an operation without JAX implementation ({str(error).splitlines()[0]})"
            raise TargetError(message("from_pymc", found, "a model that compiles to JAX", cure)) from error
        order = [rv.name for rv in self.model.free_RVs]
        return lambda z: dict(zip(names, compiled(*(jnp.asarray(z[n]) for n in order)), strict=True))


def _refuse_randomness(name: str, graph: Any) -> None:
    traversal = importlib.import_module("pytensor.graph.traversal")
    rng = importlib.import_module("pytensor.tensor.random.type").RandomType
    if any(isinstance(v.type, rng) for v in traversal.graph_inputs([graph])):
        cure = (
            "pass the whole data in place of pm.Minibatch, or write the model in NumPyro: from_numpyro(subsample=...)"
        )
        raise TargetError(message(f"variable {name!r}", "random numbers in its log-density", "none", cure))


def _site(pm: Any, model: Any, rv: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> Site:
    free, shape = shapes
    dims = model.named_vars_to_dims.get(rv.name) or ()
    plates = tuple((d, k) for k, d in enumerate(dims) if d is not None and free[k : k + 1] == shape[k : k + 1])
    if np.issubdtype(np.dtype(rv.dtype), np.integer) or rv.dtype == "bool":
        ordered = not type(rv.owner.op).__name__.startswith("Categorical")
        return make_site(rv.name, shape, _discrete(model, rv), plates, ordered=ordered)
    support = _support(model, rv)
    if support is None:
        return Site(rv.name, free, Values("real"), shape, None, plates)
    return make_site(rv.name, shape, support, plates)


def _support(model: Any, rv: Any) -> Constraint | None:
    """The constraint whose bijection is PyMC's transform, as far as its kind tells; `_checked` compares their values."""
    transform = model.rvs_to_transforms[rv]
    if transform is None:
        return constraints.real
    kind = type(transform).__name__
    if kind == "LogTransform":
        return constraints.positive
    if kind == "LogOddsTransform":
        return constraints.unit_interval
    if not kind.startswith("Interval"):
        return None
    lower, upper = (None if b is None else _number(model, b) for b in transform.args_fn(*rv.owner.inputs))
    if lower is not None and upper is not None:
        return constraints.interval(lower, upper)
    if lower is not None:
        return constraints.greater_than(lower)
    return None if upper is None else constraints.less_than(upper)


def _discrete(model: Any, rv: Any) -> Constraint:
    """The support of a discrete variable, from its distribution.

    Raises:
        TargetError: another distribution, or bounds that are not one fixed number.
    """
    kind = type(rv.owner.op).__name__.removesuffix("RV")
    kind = "Bernoulli" if rv.dtype == "bool" else kind
    if kind == "Bernoulli":
        return constraints.boolean
    if kind in COUNTS:
        return constraints.nonnegative_integer
    if kind == "Geometric":
        return constraints.positive_integer
    if kind not in BOUNDED:
        cure = "marginalise it (pymc_extras.marginalize), or write it with one of these"
        raise TargetError(message(f"variable {rv.name!r}", f"a discrete {kind}", f"one of {DISCRETE}", cure))
    parameters = rv.owner.op.dist_params(rv.owner)
    if kind == "Categorical":
        return constraints.integer_interval(0, _categories(rv, parameters[0]) - 1)
    if kind == "DiscreteUniform":
        low, high = (_fixed(model, rv, p) for p in parameters)
        return constraints.integer_interval(low, high)
    return constraints.integer_interval(0, _fixed(model, rv, parameters[0]))


def _categories(rv: Any, probabilities: Any) -> int:
    """The length of the last axis; known also where the probabilities are themselves random."""
    count = probabilities.type.shape[-1]
    if count is None:
        fold = importlib.import_module("pymc.pytensorf").constant_fold
        (count,) = fold([probabilities.shape[-1]], raise_not_constant=False)
    if not isinstance(count, int | np.integer | np.ndarray):
        cure = "give its probabilities a fixed shape"
        raise TargetError(message(f"variable {rv.name!r}", "a number of categories that varies", "a fixed one", cure))
    return int(count)


def _fixed(model: Any, rv: Any, bound: Any) -> int:
    found = _number(model, bound)
    if found is None:
        cure = "give it fixed bounds; split variables whose elements have different ones"
        raise TargetError(message(f"variable {rv.name!r}", "bounds that are not one number", "one fixed integer", cure))
    return int(found)


def _number(model: Any, graph: Any) -> float | None:
    """Value of a graph that depends on no variable of the model and is one number; else None."""
    pt = importlib.import_module("pytensor.tensor")
    graph = pt.as_tensor(graph)
    ancestors = importlib.import_module("pytensor.graph.traversal").ancestors
    if set(ancestors([graph])) & set(model.basic_RVs):
        return None
    values = np.unique(np.asarray(graph.eval()))
    return float(values[0]) if values.size == 1 and np.isfinite(values[0]) else None


def _checked(sites: tuple[Site, ...], values: Callable[[Latents], Mapping[str, Any]]) -> tuple[Site, ...]:
    """The sites; those whose constraint maps a point elsewhere than PyMC's transform does lose the constraint."""
    rng = np.random.default_rng(0)
    point = {
        s.name: jnp.asarray(rng.normal(size=s.shape) if not s.discrete else np.full(s.shape, s.values.low), s.dtype)
        for s in sites
    }
    theirs, out = values(point), []
    for s in sites:
        same = s.support is not None and np.allclose(s.constrain(point[s.name]), theirs[s.name], rtol=1e-4, atol=1e-5)
        if same or s.discrete:
            out.append(s)
        else:
            out.append(Site(s.name, s.shape, Values("real"), s.constrained_shape, None, s.plates))
    return tuple(out)
