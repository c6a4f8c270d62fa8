"""`Fit`: an approximate posterior that can be asked, saved and loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hivi._bounds import AbstractBound
from hivi._compile import compiled, effort_for
from hivi._errors import FitError, LoadError, message, require_count
from hivi._estimators.cost import effort_of
from hivi._estimators.evaluation import log_weights
from hivi._families.base import AbstractProposal
from hivi._families.product import build_proposal
from hivi._fit import store
from hivi._fit.pointwise import Estimate, Pointwise, pointwise
from hivi._fit.rowwise import streamed_bounds
from hivi._fit.unseen import at_rows
from hivi._space import Latents, Plate, Site, constrain
from hivi._target.base import Target
from hivi._tree import Key

BATCH = 64
"""Draws evaluated at once."""
PER_PARAMETER = 10
"""Elementary operations of a draw from q, for each of its parameters."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """The result of `hivi.fit`.

    Attributes:
        proposal: the fitted parameters theta and phi.
        sites: the latent sites.
        bound: the bound that was optimised.
        family: the family's configuration.
        converged: whether the bound had stopped to rise by more than its noise.
        history: 1-d arrays, one entry per step: "step", "elbo" (the bound's estimate in nats; NaN in the warm-up of a streamed
            fit, whose objective is no bound) and "stderr".
        seconds: wall time of the optimisation, compilation included.
        message: in words, why it stopped.
        target: the target; None for a run loaded without it.
        strategies: site -> name of the gradient strategy that was used.
        program: the stored map to the model's space, for a loaded run whose supports depend on latents.
        pace: seconds per step without compilation; None where one compiled chunk of steps was all, or for a loaded run.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * (z["x"] - 2) ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=1000, progress=False)
        >>> draws = fit.sample(jax.random.key(1), 5)
        >>> draws["x"].shape
        (5,)
        >>> bool(abs(fit.elbo(jax.random.key(2)).mean - 0.919) < 0.05)  # log of the square root of 2 pi
        True
        >>> fit.log_prob(draws, key=jax.random.key(3)).shape
        (5,)
    """

    proposal: AbstractProposal
    sites: tuple[Site, ...]
    bound: AbstractBound
    family: Any
    converged: bool
    history: dict[str, np.ndarray]
    seconds: float
    message: str
    target: Target | None = None
    strategies: dict[str, str] = dataclasses.field(default_factory=dict)
    program: Callable[[Latents], Latents] | None = None
    pace: float | None = None

    def __repr__(self) -> str:
        steps = len(self.history["step"])
        return f"Fit({type(self.proposal).__name__}, {steps} steps, converged={self.converged}: {self.message})"

    def elbo(self, key: Key, samples: int | None = None, bound: AbstractBound | None = None) -> Estimate:
        """The bound that was optimised (or another), estimated afresh.

        Args:
            key: a JAX random key.
            samples: number of independent estimates of the bound, at least 2; 4096 if None, but 8 for a streamed target,
                where each visits all rows.
            bound: another bound, for example `ImportanceWeighted(outer=1, inner=64)` for a tighter one.

        Returns:
            Mean and standard error in nats.

        Raises:
            FitError: the run was loaded without its target, or fewer than 2 samples were asked for.
        """
        check_key("Fit.elbo", key)
        if not isinstance(bound, AbstractBound | None):
            cure = "for example hivi.ImportanceWeighted(64), with its ()"
            raise FitError(message("Fit.elbo(bound=...)", repr(bound), "a bound", cure))
        target = self._required("Fit.elbo")
        source = target.source
        samples = samples if samples is not None else (4096 if source is None else 8)
        require_count("Fit.elbo(samples=...)", samples, "ask for so many draws", 2, FitError)
        samples = int(samples)
        if source is None:
            arguments = self.proposal, target, bound or self.bound, key
            effort = effort_of(log_weights, *arguments, steps=samples)
            values = np.asarray(_bound_values.at(effort)(*arguments, samples), float)
        else:
            closed = [n for n, s in self.strategies.items() if s.startswith("Expectation")]
            values = streamed_bounds(target, self.proposal, closed, key, samples, bound or self.bound)
        return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(samples)))

    def pointwise(self, key: Key, plate: str, *, draws: int | None = None, samples: int = 256) -> Pointwise:
        """The ELBO taken apart by the rows of a plate with latents: how well each document, digit or group is explained.

        With draws, each row's share is a multi-sample bound of its own, `ImportanceWeighted(draws, plate=plate)`. In
        minibatches all rows are visited, a minibatch at a time.

        Args:
            key: a JAX random key.
            plate: name of the plate.
            draws: of the row's latents, for each estimate (of a mixture, of each component); None for the ELBO.
            samples: number of independent estimates, at least 2.

        Returns:
            `rows` (samples, rows) and `rest` (samples,) in nats, with `mean()`, `stderr()` and `total()`. Data whose
            term touches no latent of their row count in `rest`.

        Raises:
            FitError: no latents in the plate, terms that several rows share, another plate in minibatches, no target.
        """
        check_key("Fit.pointwise", key)
        target = self._required("Fit.pointwise")
        return pointwise(self.proposal, target, self.bound.inner, key, plate, draws, samples)

    def _required(self, where: str) -> Target:
        if self.target is None:
            cure = "hivi.load(folder, target=target)"
            raise FitError(message(where, "a run loaded without its target", "the target", cure))
        return self.target

    def sample(self, key: Key, samples: int = 1000) -> dict[str, Array]:
        """Draws from q(z), in the model's own (constrained) space.

        Args:
            key: a JAX random key.
            samples: number of draws.

        Returns:
            Site -> array of shape (samples, *site shape).

        Raises:
            FitError: no number of draws, or one below 1.
        """
        check_key("Fit.sample", key)
        require_count("Fit.sample(samples=...)", samples, "ask for so many draws", 1, FitError)
        samples = int(samples)
        draws = _draws.at(effort_for(float(PER_PARAMETER * _size(self.proposal)), samples))(self.proposal, key, samples)
        if self.target is not None:
            return _constrain_target(self.target, draws)
        return self.program(draws) if self.program is not None else _constrain_sites(self.sites, draws)

    def log_prob(self, z: Mapping[str, Array], *, key: Key, samples: int = 256) -> Array:
        """Log q(z) at values in the model's own space, per draw.

        Exact where the family has a density; for a hierarchical family the log of an unbiased estimate of it, by importance
        sampling of lambda from r(lambda|z), consistent as `samples` grows.

        Args:
            z: site -> values, shape (*batch, *site shape) with one common batch shape; every site is needed.
            key: a JAX random key.
            samples: draws of lambda per value.

        Returns:
            log q(z) with respect to the model's own space, in nats, shape (*batch,); -inf outside the sites' supports.

        Raises:
            FitError: a site is missing, or shapes do not match.
        """
        check_key("Fit.log_prob", key)
        require_count("Fit.log_prob(samples=...)", samples, "ask for so many draws", 1, FitError)
        samples = int(samples)
        batch = _batch_shape(self.sites, z)
        flat = {s.name: jnp.reshape(jnp.asarray(z[s.name]), (-1, *s.constrained_shape)) for s in self.sites}
        values = _log_density(self.proposal, self.sites, flat, key, samples)
        # A sum that is 1 but for rounding is on the simplex: of real values, those alone are outside that have no density.
        outside = jnp.zeros(values.shape, bool)
        for s in self.sites:
            outside |= ~s.inside(flat[s.name]) & (s.discrete | jnp.isnan(values))
        return jnp.where(outside, -jnp.inf, values).reshape(batch)

    def rows(self, features: Any, *, target: Target | None = None) -> Fit:
        """The same fit at other rows, by its inference network: no further fitting.

        Args:
            features: of the new rows, computed as those of the fit: (rows, features), or a dict from plate to such arrays.
            target: the model at the new rows, for bounds; draws and log q need none.

        Returns:
            A fit whose sites have the new rows; global sites keep their q.

        Raises:
            FitError: no `hivi.Amortised` in the family, features of another shape, or a target of other rows.
            FamilyError: a site of the plate that has parameters of its own for each row.

        Example:
            >>> import hivi, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> def model(y):
            ...     with numpyro.plate("data", len(y)):
            ...         z = numpyro.sample("z", dist.Normal(0, 1))
            ...         numpyro.sample("y", dist.Normal(z, 1), obs=y)
            >>> y, new = jnp.linspace(-2.0, 2.0, 20), jnp.array([0.3, 1.5])
            >>> family = hivi.Amortised(hivi.MeanField(), data=y[:, None], hidden=8)
            >>> options = {"key": jax.random.key(0), "steps": 100, "progress": False}
            >>> fit = hivi.fit(hivi.from_numpyro(model, y), family, **options)
            >>> unseen = fit.rows(new[:, None], target=hivi.from_numpyro(model, new))
            >>> unseen.sample(jax.random.key(1), 5)["z"].shape
            (5, 2)
        """
        return at_rows(self, features, target)

    def save(self, folder: str | Path) -> Path:
        """Save parameters, structure and history; neither the model nor the data.

        Returns:
            The folder, which `hivi.load` reads.
        """
        path = Path(folder)
        meta = {
            "format": 1,
            "family": store.encode(self.family),
            "bound": store.encode(self.bound),
            "sites": [store.encode_site(s) for s in self.sites],
            "converged": self.converged,
            "seconds": self.seconds,
            "message": self.message,
            "strategies": self.strategies,
        }
        arrays = {f"q{name}": a for name, a in store.pack(self.proposal.bare()).items()}
        arrays |= {f"history.{name}": np.asarray(a) for name, a in self.history.items()}
        store.write(path, "fit", arrays, meta)
        if self.target is not None and self.target.constrainer is not None:
            # Supports that depend on latents or data: the map to them is stored as a compiled program (StableHLO).
            store.write_program(
                path, "constrain", self.target.constrain, {s.name: s.full_example() for s in self.sites}
            )
        return path


def load(folder: str | Path, *, target: Target | None = None, family: Any = None) -> Fit:
    """Load a saved run; no pickle, and no code is run.

    Args:
        folder: what `Fit.save` wrote.
        target: the target, to evaluate bounds and to go on fitting; sampling and log q need none.
        family: the family of the run, where it has a network of your own: code is not saved. The features of an
            `Amortised` family are data, and not saved either: ask the loaded fit as `fit.rows(x)`.

    Raises:
        LoadError: no run there, a damaged one, or a target with other sites.

    Example:
        >>> import hivi, jax, tempfile
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, latents={"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=100, progress=False)
        >>> again = hivi.load(fit.save(tempfile.mkdtemp()))
        >>> again.sample(jax.random.key(1), 5)["x"].shape
        (5,)
    """
    path = Path(folder)
    arrays, meta = store.read(path, "fit")
    sites = tuple(store.decode_site(raw) for raw in meta["sites"])
    if target is not None:
        sites = _for_target(path, sites, target)
    family = store.decode(meta["family"]) if family is None else family
    # Closed over: as an argument, a dict of families would lose its order.
    like = eqx.filter_eval_shape(lambda key: build_proposal(family, sites, key).bare(), jax.random.key(0))
    like = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, like)
    saved = {name[1:]: a for name, a in arrays.items() if name.startswith("q")}
    return Fit(
        proposal=store.unpack(like, saved, path),
        sites=sites,
        bound=store.decode(meta["bound"]),
        family=family,
        converged=meta["converged"],
        history={n.removeprefix("history."): a for n, a in arrays.items() if n.startswith("history.")},
        seconds=meta["seconds"],
        message=meta["message"],
        target=target,
        strategies=meta["strategies"],
        program=store.read_program(path, "constrain"),
    )


def _for_target(path: Path, sites: tuple[Site, ...], target: Target) -> tuple[Site, ...]:
    """The sites of a saved run at another number of rows per minibatch, or at all rows: those of the target."""
    alone = [dataclasses.replace(s, local=None) for s in sites]
    known = {s.name: s.local for s in target.sites}
    if [dataclasses.replace(s, local=None) for s in target.sites] != alone or any(
        s.local is None and known[s.name] is not None for s in sites
    ):
        found = f"the sites {[(s.name, s.shape) for s in sites]}"
        expected = f"those of the target: {[(s.name, s.shape) for s in target.sites]}"
        raise LoadError(message(str(path), found, expected, "pass the target of the saved run"))

    def local(s: Site) -> tuple[Plate, int] | None:
        if s.local is None or known[s.name] is not None:
            return known[s.name]
        plate, axis = s.local
        return plate._replace(batch=plate.size), axis

    return tuple(dataclasses.replace(s, local=local(s)) for s in sites)


def check_key(where: str, key: Any) -> None:
    """Refuse what is no JAX random key: a seed, or a number of draws.

    Raises:
        FitError: naming the function.
    """
    try:
        jax.random.fold_in(key, 0)
    except (TypeError, ValueError):
        raise FitError(message(f"{where}(key=...)", repr(key), "a JAX random key", "use jax.random.key(0)")) from None


def _batch_shape(sites: tuple[Site, ...], z: Mapping[str, Any]) -> tuple[int, ...]:
    shapes = set()
    for s in sites:
        if s.name not in z:
            raise FitError(message(f"site {s.name!r}", "no value", "a value for every latent", "add it to z"))
        shape, rank = jnp.shape(z[s.name]), len(s.constrained_shape)
        if shape[len(shape) - rank :] != s.constrained_shape:
            raise FitError(
                message(f"site {s.name!r}", f"shape {shape}", f"(*batch, *{s.constrained_shape})", "reshape the values")
            )
        shapes.add(shape[: len(shape) - rank])
    if len(shapes) != 1:
        raise FitError(message("log_prob", f"batch shapes {sorted(shapes)}", "one batch shape", "broadcast the values"))
    return shapes.pop()


def _size(proposal: AbstractProposal) -> int:
    return sum(x.size for x in jax.tree.leaves(eqx.filter(proposal, eqx.is_array)))


@compiled
def _bound_values(proposal: AbstractProposal, target: Target, bound: AbstractBound, key: Key, samples: int) -> Array:
    def one(k: Key) -> Array:
        return log_weights(proposal, target, bound, k)

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=BATCH)


@compiled
def _draws(proposal: AbstractProposal, key: Key, samples: int) -> Latents:
    def one(k: Key) -> Latents:
        k1, k2 = jax.random.split(k)
        branch = jax.random.categorical(k1, proposal.log_weights()) if proposal.branches > 1 else 0
        return proposal.propose(k2, branch)[0]

    return jax.lax.map(one, jax.random.split(key, samples), batch_size=BATCH)


@compiled(effort="quick")
def _constrain_target(target: Target, draws: Latents) -> dict[str, Array]:
    return jax.vmap(target.constrain)(draws)


@compiled(effort="quick")
def _constrain_sites(sites: tuple[Site, ...], draws: Latents) -> dict[str, Array]:
    return jax.vmap(functools.partial(constrain, sites))(draws)


@compiled
def _log_density(
    proposal: AbstractProposal, sites: tuple[Site, ...], z: dict[str, Array], key: Key, samples: int
) -> Array:
    def one(args: tuple[dict[str, Array], Key]) -> Array:
        value, k = args
        free, jacobian = {}, jnp.zeros(())
        for s in sites:
            free[s.name] = s.unconstrain(value[s.name]).astype(s.dtype)
            jacobian = jacobian + s.log_jacobian(free[s.name])
        return proposal.log_density(free, k, samples) - jacobian

    count = next(iter(z.values())).shape[0]
    return jax.lax.map(one, (z, jax.random.split(key, count)), batch_size=BATCH)
