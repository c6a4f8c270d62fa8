"""How far a fit is to be trusted: its bound, a tighter one, k-hat of the marginal q(z), and what they say in words."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from hivi._bounds import Elbo, ImportanceWeighted
from hivi._errors import FitError, HiviError, message
from hivi._families.base import Conditional
from hivi._fit.result import Estimate, Fit, check_key
from hivi._fit.stopping import EARLIEST
from hivi._likelihoods.binomial import BinomialLikelihood
from hivi._likelihoods.poisson import PoissonLikelihood
from hivi._marginal import TRUSTED, KHat, marginal_khat
from hivi._stationarity import odds
from hivi._target.base import full_size
from hivi._tree import Key

DRAWS, EVALUATIONS = 64, 256
"""Draws of z in the multi-sample bound that shows what the ELBO misses, and its estimates."""
SURE = 3.0
"""Differences below so many standard errors are not called differences."""
ROUGH_SHARE = 0.05
"""From which share of a difference on its standard error is told."""
NEGLIGIBLE = 0.05
"""Differences of bounds below this, in nats, are not worth a word."""
FEWEST, MOST = 32, 32
"""Least estimates over all rows, where they are up to so many minibatches."""
BLIND = 0.5
"""Noise of a difference of bounds, in nats, from which on it is told what would not be seen."""
LEAST = 100
"""Fewest draws for k-hat."""
ROUGH = 0.3
"""Noise of log q, in nats, from which on k-hat is called rough."""


class Trust(NamedTuple):
    """What is known of the quality of a fit; print it.

    Attributes:
        bound: the ELBO, in nats.
        tighter: the bound with 64 draws of z (Burda, Grosse & Salakhutdinov 2016), in nats, row by row where rows come in
            minibatches; None where there is none.
        khat: Pareto k-hat of p(x,z)/q(z) with the marginal q(z); None where it cannot be had.
        faults: what is wrong, in words; empty where no fault was found.
        remarks: what could not be looked at, and why; what to try.
    """

    bound: Estimate
    tighter: Estimate | None
    khat: KHat | None
    faults: tuple[str, ...]
    remarks: tuple[str, ...]

    def words(self) -> list[str]:
        """What it says, beyond the figures: faults, or that none was found, and remarks."""
        seen = self.tighter is not None or self.khat is not None
        nothing = "no fault found (where q never draws, nothing looks)" if seen else "nothing could be looked at"
        return [*(self.faults or (nothing,)), *self.remarks]

    def as_dict(self) -> dict[str, Any]:
        """Numbers and text only, ready for JSON; what is not known is None."""
        return {
            "bound": _plain(self.bound),
            "bound_of_64_draws": _plain(self.tighter),
            "khat": self.khat.value if self.khat is not None and math.isfinite(self.khat.value) else None,
            "faults": list(self.faults),
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        lines = [f"bound {self.bound} nats"]
        lines += [] if self.tighter is None else [f"with 64 draws {self.tighter} nats"]
        lines += [] if self.khat is None else [str(self.khat)]
        return "\n".join([*lines, *self.words()])


def trust(fit: Fit, *, key: Key, samples: int = 1000) -> Trust:
    """Say how far a fit is to be trusted.

    Four looks: whether it converged; how much its bound rises with 64 draws (that much it misses of log p(x) at least); k-hat of
    the marginal q(z): up to 0.5 its draws are good, up to 0.7 they are after reweighting, above not even then; and whether a
    Gibbs step would move its discrete coordinates: q(z_i) against the mean of p(z_i | all else), where that is not too dear.
    None of them sees a mode that q never visits, but the last, where one coordinate alone leads there; `hivi.compare` holds
    other families against it.

    Args:
        fit: a fit with its target.
        key: a JAX random key.
        samples: draws of z for k-hat, at least 100.

    Raises:
        FitError: a fit loaded without its target, or fewer than 100 samples.

    Example:
        >>> import hivi, jax
        >>> target = hivi.from_log_joint(lambda z: -0.5 * z["x"] ** 2, {"x": hivi.Latent()})
        >>> fit = hivi.fit(target, hivi.MeanField(), key=jax.random.key(0), progress=False)
        >>> hivi.trust(fit, key=jax.random.key(1)).faults
        ()

    Source:
        Vehtari et al. (2024), *Pareto smoothed importance sampling*; Yao et al. (2018), *Yes, but did it work?*
    """
    if not isinstance(fit, Fit):
        raise FitError(
            message("trust(fit)", f"a {type(fit).__name__}", "what hivi.fit returns", "fit the target first")
        )
    check_key("trust", key)
    if samples < LEAST:
        raise FitError(message("trust(samples=...)", str(samples), f"at least {LEAST}", "ask for more draws"))
    k_bound, k_draw = jax.random.split(key)
    found = measure(fit, k_bound, k_draw, samples)
    faults, remarks = list(found.faults), list(found.remarks)
    if not fit.converged:
        faults.insert(0, unfinished(len(fit.history["step"])))
    if found.khat is not None and not found.khat.trusted:
        faults.append(mistrust(found.khat))
    if found.tighter is not None:
        rise = difference(found.tighter, found.bound)
        if clear(rise):
            rough = f" ± {rise.stderr:.1g}" if rise.stderr > ROUGH_SHARE * rise.mean else ""
            faults.append(f"its ELBO misses at least {rise.mean:.2g}{rough} nats of log p(x), more where q never draws")
        elif rise.stderr > BLIND / SURE:
            part = fit.target is not None and not full_size(fit.target)
            more = "; loaded with the whole data, the fit shows more (hivi.load(folder, target=whole))" if part else ""
            remarks.append(f"its bounds are noisy: a gap below {SURE * rise.stderr:.1g} nats would not be seen{more}")
    if faults:
        narrow = (PoissonLikelihood, BinomialLikelihood)
        plain = [n for n, q in _conditionals(fit).items() if isinstance(q.likelihood, narrow)]
        named = "hierarchical" if any(s.local is not None for s in fit.sites) else "mixture"
        cure = f"try dispersed=True (--family {named}-dispersed)"
        counts = f"counts ({', '.join(plain)}) may be narrower than any mixture of Poissons or binomials: {cure}"
        remarks += [counts] if plain else []
        remarks.append("hivi.compare shows what other families reach")
    return found._replace(faults=tuple(faults), remarks=tuple(remarks))


def measure(fit: Fit, k_bound: Key, k_draw: Key, samples: int) -> Trust:
    """The figures, with a fault where the bound is no number or conditionals are others', and what could not be had."""
    bound, tighter, missing = _bounds(fit, k_bound)
    faults, remarks = [] if math.isfinite(bound.mean) else ["its bound is not finite at fresh draws"], []
    if points := sorted(fit.proposal.points):
        remarks.append(
            f"{', '.join(map(repr, points))} at a point, whose uncertainty is left out: all is given the point"
        )
    remarks += [] if missing is None else [f"no tighter bound ({_found(missing)})"]
    khat: KHat | None = None
    try:
        khat = marginal_khat(fit, key=k_draw, samples=samples)
        remarks += [] if khat.noise < ROUGH else [f"its log q is estimated only to ± {khat.noise:.1f} nats"]
    except HiviError as error:
        remarks.append(f"no k-hat ({_found(error)})")
    try:
        faults += [str(found) for found in odds(fit, jax.random.fold_in(k_draw, 1)) if found.clear]
    except HiviError as error:
        remarks.append(f"no conditionals ({_found(error)})")
    return Trust(bound, tighter, khat, tuple(faults), tuple(remarks))


def _bounds(fit: Fit, key: Key) -> tuple[Estimate, Estimate | None, HiviError | None]:
    """The ELBO, and with 64 draws, or why not; of rows in some minibatches all of them, so that they add no noise."""
    rows = next((s.local[0] for s in fit.sites if s.local is not None), None)
    if rows is not None and rows.batch < rows.size <= MOST * rows.batch:
        samples = max(FEWEST, EVALUATIONS * rows.batch // rows.size)
        try:
            one, many = (fit.pointwise(key, rows.name, draws=n, samples=samples) for n in (None, DRAWS))
            return one.total(), many.total(), None
        except HiviError:  # rows that share terms, or two plates
            pass
    bound = fit.elbo(key, bound=Elbo())
    try:
        plate = fit.bound.plate if rows is None else rows.name
        return bound, fit.elbo(key, EVALUATIONS, ImportanceWeighted(DRAWS, plate=plate)), None
    except HiviError as error:
        return bound, None, error


def unfinished(steps: int) -> str:
    """What a fit that did not converge says."""
    if steps < EARLIEST:
        return (
            f"did not converge in {steps} steps, too few to tell whether its bound is level: take at least {EARLIEST}"
        )
    return f"did not converge in {steps} steps, its bound was still rising: take more steps"


def _conditionals(fit: Fit) -> dict[str, Conditional]:
    """q(z_i|lambda_i) of the sites that have one, at one draw of lambda."""
    return fit.proposal.conditionals(fit.proposal.propose(jax.random.key(0))[1])


def mistrust(khat: KHat) -> str:
    """What a k-hat that is too large says."""
    return f"k-hat {khat.value:.2f} > {TRUSTED}: its draws are not to be trusted, even reweighted"


def difference(high: Estimate, low: Estimate) -> Estimate:
    """How far one bound lies above another, in nats."""
    return Estimate(high.mean - low.mean, 0.0 if high is low else math.hypot(high.stderr, low.stderr))


def clear(difference: Estimate) -> bool:
    """Whether a difference is worth a word."""
    return difference.mean > max(NEGLIGIBLE, SURE * difference.stderr)


def _plain(value: Estimate | None) -> dict[str, float | None] | None:
    if value is None:
        return None
    return {name: x if math.isfinite(x) else None for name, x in value._asdict().items()}


def _found(error: HiviError) -> str:
    """The middle of an error's text: what was found."""
    text = str(error)
    return text.partition(": found ")[2].partition("; expected")[0] or text
