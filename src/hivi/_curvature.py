"""Would a hierarchy help? The second-order test at a mean-field optimum, before any flow is fitted."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hivi._compile import make_room
from hivi._errors import FitError, message
from hivi._estimators.hessian import Bend
from hivi._estimators.second_order import Block, Pairs, eigenpairs, information, signals
from hivi._families.base import AbstractProposal, Directions
from hivi._fit.result import Estimate, Fit
from hivi._likelihood import likelihood
from hivi._space import Plate, Site
from hivi._target.base import Rows, Target
from hivi._tree import Key

ROWS = 64
"""Rows of a subsampled plate that are tested by default."""
LEVEL = 2.0
"""A direction counts where its eigenvalue is positive beyond so many standard errors (of one normal variable; for
several directions of a block the bar is higher, so that a block without any passes just as rarely)."""
FLOOR = 1e-6
"""Eigenvalues below this, in nats per unit variance, are rounding."""
CREDIBLE_VARIANCE = 0.25
"""Largest spread that the expansion is trusted for: s^2 e'Fe, the squared distance in standard deviations of z."""
CREDIBLE_STEP = 1.0
"""Largest change of one natural parameter at one standard deviation of lambda: odds or rates times e."""
MEMORY = 2**28
"""Most numbers in the stored draws."""
SLACK_SHARE = 0.1
SLACK_NATS = 0.01
PARTNERS = 4
"""Most coordinates that are named per direction, and the smallest loading, as a share of the largest."""
LOADING = 0.3


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The second-order test: what mixing lambda = mu + s e epsilon is worth at a mean-field optimum.

    All arrays have the directions last; for sites of a subsampled plate a first axis runs over the rows tested.

    Attributes:
        fit: the mean-field fit that was tested.
        eigenvalues: kappa = e'Me of each direction, in nats per unit variance of the natural parameters; from draws
            that did not choose the direction, hence unbiased for it.
        stderr: standard errors of the eigenvalues.
        vectors: site -> unit directions e, (top, *site shape, width); for rows (rows, top, *shape of a row, width). A
            continuous site has its location, in standard deviations, and its log standard deviation.
        spread: s that the expansion is trusted for and that pays best, 0 where kappa is not above its noise.
        price: c, where c s^4 is the leading order of KL(q || q_0), which a spread s costs.
        rows: which rows of the plate were tested; None for global sites.
        plate: name of that plate.
        slack: nats (per row) that mean-field itself has left, to first order: near zero at an optimum.
        warning: in words, what makes the test doubtful; empty where nothing does.
    """

    fit: Fit
    eigenvalues: Float[np.ndarray, "*rows top"]
    stderr: Float[np.ndarray, "*rows top"]
    vectors: dict[str, np.ndarray]
    spread: Float[np.ndarray, "*rows top"]
    price: Float[np.ndarray, "*rows top"]
    rows: Int[np.ndarray, " rows"] | None
    plate: str | None
    slack: Estimate
    warning: str = ""

    def __repr__(self) -> str:
        return f"Curvature({len(self._found())} of {self._blocks} blocks have a direction worth mixing)"

    @property
    def _blocks(self) -> int:
        return 1 if self.rows is None else len(self.rows)

    def _found(self) -> np.ndarray:
        """Numbers of the blocks with at least one direction worth mixing, the largest promise first."""
        gain = self._gains().reshape(self._blocks, -1).sum(1)
        return np.array([k for k in np.argsort(-gain) if gain[k] > 0], int)

    def _gains(self) -> np.ndarray:
        return np.where(self.spread > 0, 0.5 * self.spread**2 * self.eigenvalues - self.price * self.spread**4, 0.0)

    @property
    def share(self) -> float:
        """Share of the blocks (rows) with a direction worth mixing; about 0.02 of those without one pass by chance."""
        return len(self._found()) / self._blocks

    def gain(self, spread: float) -> Estimate:
        """1/2 s^2 kappa of the first direction, in nats (mean over rows): the gain of a small spread s along it."""
        values, errors = (x.reshape(self._blocks, -1)[:, 0] for x in (self.eigenvalues, self.stderr))
        return _mean(0.5 * spread**2 * values, 0.5 * spread**2 * errors)

    @property
    def gain_to_expect(self) -> Estimate:
        """Sum over the directions worth mixing of 1/2 s^2 kappa - c s^4 at `spread`, in nats (mean over rows)."""
        gains, errors = self._gains(), 0.5 * self.spread**2 * self.stderr
        rows = gains.reshape(self._blocks, -1).sum(1)
        return _mean(rows, np.sqrt((errors.reshape(self._blocks, -1) ** 2).sum(1)))

    @property
    def directions(self) -> Directions:
        """What `Hierarchical(start=...)` starts along: unit vectors and spreads."""
        rows = None if self.rows is None else jnp.asarray(self.rows)
        lam, found = self.fit.proposal.parameters(), {n: jnp.asarray(v) for n, v in self.vectors.items()}
        for s in self.fit.sites:
            if s.name in found and not s.discrete:  # back to the location's own units
                scale = jnp.exp(lam[s.name][..., 1])
                row = None if s.local is None or rows is None else jnp.moveaxis(scale, s.local[1], 0)[rows][:, None]
                found[s.name] = found[s.name].at[..., 0].multiply(scale[None] if row is None else row)
        return Directions(found, jnp.asarray(self.spread), rows)

    @property
    def couples(self) -> tuple[str, ...]:
        """The largest loadings of each direction (of the row that promises most), as text."""
        block = int([*self._found(), 0][0])
        return tuple(self._text(block, k) for k in range(self.eigenvalues.shape[-1]))

    def _text(self, block: int, number: int) -> str:
        names, loads = [], []
        for s in self.fit.sites:
            if s.name in self.vectors:
                array = self.vectors[s.name] if self.rows is None else self.vectors[s.name][block]
                names += _names(s.row() if self.rows is not None else s)
                loads.append(np.asarray(array)[number].reshape(-1))
        load = np.concatenate(loads)
        # Loadings that read the same keep the order of the coordinates.
        ranked = np.argsort(-np.abs(load).round(2), kind="stable")
        order = [k for k in ranked if abs(load[k]) >= LOADING * np.abs(load).max()][:PARTNERS]
        sides = [[f"{names[k]} ({load[k]:+.2f})" for k in order if load[k] * sign > 0] for sign in (1, -1)]
        return " against ".join(" with ".join(side) for side in sides if side)

    def __str__(self) -> str:
        if self.rows is None:
            lines = ["kappa     stderr    spread  gain (nats)  direction"]
            table = zip(self.eigenvalues, self.stderr, self.spread, self._gains(), self.couples, strict=True)
            lines += [f"{k:<+9.3g} {e:<9.2g} {s:<7.3g} {g:<12.3g} {c}" for k, e, s, g, c in table]
        else:
            lines = [f"row     kappa     stderr    spread  gain (nats)  direction   (plate {self.plate!r})"]
            for r in self._found()[:5]:
                best = int(np.argmax(self._gains()[r]))
                k, e, s, g = (x[r, best] for x in (self.eigenvalues, self.stderr, self.spread, self._gains()))
                lines.append(f"{self.rows[r]:<7} {k:<+9.3g} {e:<9.2g} {s:<7.3g} {g:<12.3g} {self._text(int(r), best)}")
            lines.append(f"{len(self._found())} of {self._blocks} rows tested have a direction (chance: about 0.02)")
        return "\n".join([*lines, *([f"Warning: {self.warning}"] if self.warning else []), self._verdict()])

    def _verdict(self) -> str:
        if not len(self._found()):
            return "No direction is worth mixing: mean-field is locally best."
        where = "" if self.rows is None else f" per row of {self.plate!r} on average"
        along = self.couples[int(np.argmax(self._gains().reshape(self._blocks, -1)[self._found()[0]]))]
        what = f"Mixing along {along}" if self.rows is None else "Mixing the rows along such directions"
        return f"{what} is worth about {self.gain_to_expect.mean:.2g} nats{where}."


def curvature(
    fit: Fit,
    *,
    key: Key,
    samples: int = 2048,
    top: int = 3,
    rows: Sequence[int] | np.ndarray | None = None,
    sites: Sequence[str] | None = None,
) -> Curvature:
    r"""The second-order test at a mean-field optimum q_0 = q(z|mu): is there a direction worth mixing?

    Mixing lambda = mu + epsilon with a small covariance A changes the ELBO (with an exact r) by `1/2 tr(A M)`,
    `M = d2/dlambda2 E_q(z|lambda)[log p(x,z) - log q_0(z)]` at mu; off the diagonal, in natural parameters,
    `M_ij = v_i v_j E[D_i D_j log p]`. Estimated as `Cov(v D f, score)` over draws, matrix-vector products only.
    Among continuous sites, `M = E[d2 f / dlambda2]` by Hessian-vector products at draws, lambda the location in units of the
    standard deviation, and its log: `M_ij = s_i s_j E[d2 log p / dz_i dz_j]` between locations. The top directions come from
    one half of the draws, their eigenvalues from the other.

    Args:
        fit: a fit with mean-field sites, discrete or continuous; other sites are drawn from q. Where sites of a subsampled
            plate are among them, those are tested, row by row (M is block-diagonal over rows); else all in one block.
        key: a JAX random key.
        samples: draws, at least 64; standard errors fall with its square root.
        top: number of directions, at least 1.
        rows: which rows of the subsampled plate; None takes 64 at random.
        sites: names of the sites to test; None takes all mean-field ones.

    Returns:
        A `Curvature`; print it. `hivi.Hierarchical(start=curvature)` grows a hierarchy along what was found.

    Raises:
        FitError: no mean-field site, no target, or arguments out of range.

    Example:
        >>> import hivi, jax, jax.numpy as jnp
        >>> from numpyro.distributions import constraints
        >>> table = jnp.log(jnp.array([[0.1, 0.4], [0.4, 0.1]]))
        >>> target = hivi.from_log_joint(
        ...     lambda z: table[z["z"][0], z["z"][1]], {"z": hivi.Latent((2,), constraints.boolean)}
        ... )
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), steps=500, progress=False)
        >>> found = hivi.curvature(fit, key=jax.random.key(1))
        >>> [f"{k:+.2f}" for k in found.eigenvalues]
        ['+0.17', '-0.17']
        >>> found.couples[0]
        'z[0] (+0.71) against z[1] (-0.71)'
    """
    make_room()
    target, block = _check(fit, samples, top, sites)
    plate, chosen = _choose_rows(block, rows, key)
    size = samples * block.link.dim * (1 if chosen is None else -(-len(chosen) // plate.batch) * plate.batch)
    if size > MEMORY:
        raise FitError(
            message(
                f"curvature(samples={samples})", f"{size} numbers to keep", f"at most {MEMORY}", "fewer samples or rows"
            )
        )
    k_draws, k_pairs = jax.random.split(key)
    parts = []
    for number, group in enumerate(_groups(plate, chosen)):
        h, score = signals(fit.proposal, target, block, group, jax.random.fold_in(k_draws, number), samples)
        local = fit.proposal.gather({**target.all_rows(), **group}).parameters()
        fisher = {s.name: block.front(s, information(s, local[s.name])) for s in block.sites}
        _check_finite(block, h)
        count = min(top, block.link.dim)
        k_own = jax.random.fold_in(k_pairs, number)
        bend = _bend(fit.proposal, target, block, jax.random.fold_in(k_own, 1), samples)
        parts.append(eigenpairs(block.link, h, score, fisher, count, k_own, bend))
    keep = 1 if chosen is None else len(chosen)
    pairs = Pairs(*(jnp.concatenate(arrays)[:keep] for arrays in zip(*parts, strict=True)))
    return _result(fit, block, pairs, plate, chosen)


def _bend(proposal: AbstractProposal, target: Target, block: Block, key: Key, samples: int) -> tuple[Bend, Bend] | None:
    """Hessian-vector products of a global block's continuous sites, at draws for each half; None where there are none."""
    real = tuple(s for s in block.sites if not s.discrete)
    if block.local or not real:
        return None
    keys, half = jax.random.split(key, samples), samples // 2
    return Bend(proposal, target, real, keys[:half]), Bend(proposal, target, real, keys[half:])


def _check(fit: Fit, samples: int, top: int, names: Sequence[str] | None) -> tuple[Target, Block]:
    if not isinstance(fit, Fit):
        raise FitError(message("curvature", type(fit).__name__, "a mean-field Fit", "pass what hivi.fit returned"))
    if fit.target is None:
        cure = "hivi.load(folder, target=target)"
        raise FitError(message("curvature", "a run loaded without its target", "the target", cure))
    if fit.target.source is not None:
        cure = "for documents of a topic model: DeepExponentialFamily(family='mean-field').fit(X).curvature(X[:64], key=key)"
        raise FitError(message("curvature", "a streamed target, of which no rows are at hand", "data in memory", cure))
    if samples < 64:
        raise FitError(message("curvature(samples=...)", str(samples), "at least 64", "ask for more samples"))
    if top < 1:
        raise FitError(message("curvature(top=...)", str(top), "at least 1", "ask for one direction"))
    known = fit.proposal.parameters()
    wanted = {s.name for s in fit.sites} if names is None else {fit.target.site(n).name for n in names}
    sites = [s for s in fit.proposal.sites if s.name in wanted and s.name in known]
    missing = [s for s in fit.sites if s.name in wanted and s.name not in known]
    if not sites or (names is not None and missing):
        found = ", ".join(f"{s.name!r} ({s.values})" for s in missing)
        raise FitError(
            message(
                f"curvature at {'site' if len(missing) == 1 else 'sites'} {found}",
                f"no mean-field q in {type(fit.proposal).__name__}",
                "sites with a mean-field q",
                "fit them with family=hivi.MeanField()",
            )
        )
    other = [s for s in fit.proposal.sites if s.values.concentration > 0 or s.values.dispersed]
    if other:
        name, found = other[0].name, "a q of free spread" if other[0].values.dispersed else "a negative-binomial q"
        raise FitError(message(f"curvature at site {name!r}", found, "Poisson", "fit it with hivi.MeanField()"))
    local = [s for s in sites if s.local is not None]
    plates = {s.local[0].name for s in local if s.local is not None}
    if len(plates) > 1:
        raise FitError(
            message(
                "curvature", f"sites of the subsampled plates {sorted(plates)}", "one", "test a model with one of them"
            )
        )
    return fit.target, Block(tuple(local or sites))


def _choose_rows(block: Block, rows: Sequence[int] | np.ndarray | None, key: Key) -> tuple[Plate, np.ndarray | None]:
    if block.sites[0].local is None:
        if rows is not None:
            cure = "leave rows out: all sites are tested together"
            raise FitError(message("curvature(rows=...)", "sites without a subsampled plate", "rows=None", cure))
        return Plate("", 1, 1), None
    plate = block.sites[0].local[0]
    if rows is None:
        order = jax.random.permutation(jax.random.fold_in(key, 1), plate.size)
        return plate, np.sort(np.asarray(order)[:ROWS])
    chosen = np.asarray(rows)
    distinct = chosen.ndim == 1 and chosen.size > 0 and len(np.unique(chosen)) == len(chosen)
    whole = distinct and np.issubdtype(chosen.dtype, np.integer)
    if not whole or chosen.min() < 0 or chosen.max() >= plate.size:
        expected = f"distinct row numbers from 0 to {plate.size - 1} of plate {plate.name!r}"
        raise FitError(message("curvature(rows=...)", f"{rows!r}"[:80], expected, "correct them, or leave them out"))
    return plate, chosen


def _groups(plate: Plate, chosen: np.ndarray | None) -> list[Rows]:
    """Minibatches that hold the chosen rows; the last is filled up with the first rows again."""
    if chosen is None:
        return [{}]
    count = -(-len(chosen) // plate.batch)
    filled = np.resize(chosen, count * plate.batch).reshape(count, plate.batch)
    return [{plate.name: jnp.asarray(group)} for group in filled]


def _check_finite(block: Block, h: Array) -> None:
    start = 0
    for s, inner in zip(block.sites, block.link.sites, strict=True):
        stop = start + int(np.prod(inner.shape, initial=1)) * likelihood(s).width
        if not bool(jnp.all(jnp.isfinite(h[..., start:stop]))):
            raise FitError(
                message(
                    f"curvature at site {s.name!r}",
                    "differences of log p that are not finite at draws from q",
                    "a mean-field fit with a finite bound",
                    "look for values with probability zero, and check fit.elbo(key)",
                )
            )
        start = stop


def _result(fit: Fit, block: Block, pairs: Pairs, plate: Plate, chosen: np.ndarray | None) -> Curvature:
    value, stderr, price, information = (
        np.asarray(x, np.float64) for x in (pairs.value, pairs.stderr, pairs.price, pairs.information)
    )
    normal = statistics.NormalDist()
    bar = normal.inv_cdf(1 - (1 - normal.cdf(LEVEL)) / value.shape[1])
    kappa = np.where(value > bar * stderr + FLOOR, value, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        # The best s of 1/2 s^2 kappa - c s^4, within what the expansion is trusted for.
        step = CREDIBLE_STEP / np.abs(np.asarray(pairs.vectors)).max(-1)
        limits = [kappa / (4 * price), CREDIBLE_VARIANCE / information, step**2]
        spread = np.where(kappa > 0, np.sqrt(np.min(limits, 0)), 0.0)
    split = jax.vmap(jax.vmap(block.link.split))(pairs.vectors)
    rows = chosen is not None

    def drop(x: np.ndarray) -> np.ndarray:
        return x if rows else x[0]

    found = Curvature(
        fit=fit,
        eigenvalues=drop(value),
        stderr=drop(stderr),
        vectors={n: drop(np.asarray(v)) for n, v in split.items()},
        spread=drop(spread),
        price=drop(price),
        rows=chosen,
        plate=plate.name if rows else None,
        slack=_mean(np.asarray(pairs.slack), np.asarray(pairs.slack_stderr)),
    )
    return dataclasses.replace(found, warning=_doubt(found))


def _doubt(found: Curvature) -> str:
    """What is wrong with taking mu for an optimum, relative to what the curvature promises."""
    slack, promise = found.slack, found.gain_to_expect.mean
    if slack.mean < 3 * slack.stderr or slack.mean < max(SLACK_SHARE * promise, SLACK_NATS if promise <= 0 else 0.0):
        return ""
    return (
        f"mean-field itself still has at least about {slack.mean:.2g} nats to gain (gradient not zero within its noise): "
        "fit it longer before reading the curvature"
    )


def _mean(values: np.ndarray, errors: np.ndarray) -> Estimate:
    """Mean over blocks with the standard error that the blocks' own errors make."""
    return Estimate(float(np.mean(values)), float(np.sqrt(np.sum(np.square(errors))) / len(values)))


def _names(site: Site) -> list[str]:
    """Text of every parameter of a site: `z[0]`, `z[0]=2` where each value has a logit, `log sd of z[0]`."""
    own = likelihood(site)
    values = [""] if own.width == 1 else [f"={site.values.low + k}" for k in range(own.width)]
    places = [",".join(map(str, i)) for i in np.ndindex(*site.shape)]
    full = [f"{site.name}[{p}]" if p else site.name for p in places]
    if not site.discrete:
        return [text for name in full for text in (name, f"log sd of {name}")]
    return [f"{name}{v}" for name in full for v in values]
