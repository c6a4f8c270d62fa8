"""`Auto`: the strategy with the least noise that a site's support and the cost allow, and why."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hivi._bounds import AbstractBound, Elbo
from hivi._errors import FitError, message, require_count
from hivi._estimators.base import AbstractEstimator, AbstractStrategy, abstract_conditionals
from hivi._estimators.cost import operations
from hivi._estimators.differences import Difference, LocalExpectation
from hivi._estimators.enumeration import Enumeration
from hivi._estimators.exact import Programs, noiseless, site_colours, site_programs
from hivi._estimators.expectation import Expectation
from hivi._estimators.factor_expectation import FactorExpectation
from hivi._estimators.hierarchical_score import HierarchicalScore
from hivi._estimators.measured import Measured, Setting, measure_each
from hivi._estimators.pathwise import Pathwise
from hivi._estimators.score import Score
from hivi._estimators.sticking import StickTheLanding
from hivi._families.base import AbstractProposal, Conditional
from hivi._families.product import ProductProposal, build_proposal
from hivi._space import Site
from hivi._target.base import Target
from hivi._tree import Key


class Choice(NamedTuple):
    """What was chosen for one site, and why."""

    site: str
    strategy: AbstractStrategy
    evaluations: int
    reason: str


class Auto(AbstractEstimator):
    """Pathwise for continuous sites; for discrete ones what is exact and cheap, and else what measures best.

    A discrete site whose exact local expectation (or difference) costs at most `cheap` evaluations, or `work` elementary
    operations, gets it; one whose lambda is not random, the sum over all of its joint values if these are at most `cheap`, or
    else over those of what each factor touches, if `cheap` evaluations show them all. To compile the alternatives would
    take longer than a fit. For others a fit takes 100 steps of warm-up, then measures every
    strategy that can serve the site (exact ones within `budget`, DisARM, double control variates, the score function with
    leave-one-out baseline): the variance of the gradient over 64 draws, times its elementary operations, counted, so that
    the choice depends on the key alone and not on the machine's mood. The best product wins, and the fit starts afresh with
    it.

    Args:
        budget: the most evaluations of a site's factors that one draw may cost with an exact strategy; more for a table in one
            colour whose sum takes at most ten times `work`.
        cheap: up to this many evaluations an exact strategy is taken without measurement; 0 measures always.
        work: up to this many elementary operations a draw (evaluations times those of log p), too; not if `cheap` is 0.

    Example:
        >>> import hivi
        >>> from numpyro.distributions import constraints
        >>> target = hivi.from_log_joint(
        ...     lambda z: 0.5 * z["z"], latents={"z": hivi.Latent(shape=(3,), support=constraints.boolean)}
        ... )
        >>> print(hivi.Auto().explain(target, hivi.MeanField()))
        site  strategy          evaluations  reason
        z     LocalExpectation  1            finite support of 2 values: every value summed, 1 colour
    """

    budget: int = 256
    cheap: int = 16
    work: int = 100_000

    def __check_init__(self) -> None:
        for name in ("budget", "cheap", "work"):
            require_count(f"Auto({name}=...)", getattr(self, name), "correct the number", 0, FitError)

    def choose(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> list[Choice]:
        """One choice per site, with the number of evaluations it costs and the reason."""
        conditionals = abstract_conditionals(proposal)
        programs = site_programs(target, proposal, bound)
        palette = site_colours(target, programs)
        closed = closed_sites(target, proposal)
        fixed = proposal.parameters() if bound.plate is None else {}  # row by row no sum goes over all rows at once
        return [
            Choice(s.name, Expectation(), 1, "log p meets it through means that its family has in closed form")
            if s.name in closed
            else Choice(s.name, HierarchicalScore(), 1, "other draws depend on it: score of the whole log-weight")
            if s.name in proposal.upstream
            else self._choose(
                s,
                conditionals.get(s.name),
                palette.get(s.name, 1),
                target,
                programs.get(s.name) if s.name in fixed else None,
                bound.linear(proposal.branches),
            )
            if s.discrete
            else _continuous(s, proposal, bound)
            for s in target.sites
        ] + [
            Choice(s.name, HierarchicalScore(), 1, "other draws depend on it: score of the whole log-weight")
            for s in proposal.above
        ]

    def _choose(
        self,
        site: Site,
        conditional: Conditional | None,
        count: int,
        target: Target,
        programs: Programs | None,
        linear: bool,
    ) -> Choice:
        """`count` is its colours; `programs` its factors, where its lambda is not random, so that sums leave no noise."""
        plural = f"{count} colour{'s' * (count != 1)}"
        if conditional is None:
            raise FitError(
                message(
                    f"site {site.name!r}",
                    "a discrete site whose family gives no q(z|lambda)",
                    "a family with factorised conditionals",
                    "use MeanField(), Mixture() or Hierarchical() for it",
                )
            )
        table = conditional.likelihood.table
        moves = site.values.count - 1 if table else 1
        cost = moves * count
        short = table and count == 1 and cost > self.budget and cost * _evaluation(target) <= 10 * self.work
        if cost > self.budget and not short:
            return Choice(site.name, Score(), 1, f"exact would cost {cost} evaluations ({plural}), over {self.budget}")
        if table and programs is not None and count > 1 and min(self.cheap, self.budget) > 0:
            summed = self._summed(site, target, programs, linear)
            if summed is not None:
                return summed
        if table:
            why = f"finite support of {site.values.count} values: every value summed, {plural}"
            return Choice(site.name, LocalExpectation(), cost, why)
        return Choice(site.name, Difference(), cost, f"{site.values.kind}: difference identity, {plural}")

    def _summed(self, site: Site, target: Target, programs: Programs, linear: bool) -> Choice | None:
        """A sum over joint values that leaves no noise, if it is cheap; `linear`: so is the bound in the log-weight."""
        most, each = min(self.cheap, self.budget), _evaluation(target)
        few = site.local is None and math.prod(site.batch_shape) <= most
        joint = site.values.count ** math.prod(site.batch_shape) if few else math.inf
        if joint <= most and joint * each <= self.work:
            return Choice(site.name, Enumeration(), int(joint), f"all its {joint} joint values summed")
        factors = FactorExpectation()
        rows = noiseless(factors, site, programs) if linear and 4 * each <= self.work else None
        if rows is None or rows > most or rows * each > self.work:
            return None
        why = f"{rows} evaluations show every factor all joint values of what it touches"
        return Choice(site.name, factors, rows, why)

    def resolve(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, AbstractStrategy]:
        return {c.site: c.strategy for c in self.choose(target, proposal, bound)}

    def undecided(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> tuple[str, ...]:
        if target.source is not None:  # rows are not at hand
            return ()
        chosen = {c.site: c for c in self.choose(target, proposal, bound)}
        dear = [s.name for s in target.sites if s.discrete and self._dear(chosen[s.name])]
        exact = [n for n in dear if not isinstance(chosen[n].strategy, Score)]
        if exact and self.cheap > 0:
            each = _evaluation(target)
            dear = [n for n in dear if n not in exact or chosen[n].evaluations * each > self.work]
        return tuple(dear)

    def _dear(self, choice: Choice) -> bool:
        return isinstance(choice.strategy, Score) or choice.evaluations > self.cheap

    def measure(
        self, target: Target, proposal: AbstractProposal, bound: AbstractBound, samples: int, key: Key
    ) -> list[list[Measured]]:
        """What every strategy measures at a proposal, best first; one list for each undecided site."""
        chosen, sites = self.resolve(target, proposal, bound), self.undecided(target, proposal, bound)
        return measure_each(chosen, sites, Setting(target, proposal, bound, samples), key)

    def explain(
        self,
        target: Target,
        family: Any,
        bound: AbstractBound | None = None,
        *,
        key: Key | None = None,
        samples: int = 16,
    ) -> str:
        """A table: site, strategy, evaluations per draw, and the reason; with a key also what was measured.

        Args:
            target: the target.
            family: a family, a built proposal, or a fit, at which to measure.
            bound: `Elbo()` if None.
            key: a JAX random key: measure, and append variance and cost of every strategy for the sites that are undecided.
            samples: estimates of the bound per gradient, as in `fit`.
        """
        bound = Elbo() if bound is None else bound
        proposal = getattr(family, "proposal", family)
        if not isinstance(proposal, AbstractProposal):
            proposal = build_proposal(family, target.sites, jax.random.key(0))
        table = self._table(target, proposal, bound)
        if key is None:
            return table
        rows = [("site", "strategy", "variance", "operations", "variance x operations")]
        for found in self.measure(target, proposal, bound, samples, key):
            rows += [
                (m.site, label(m.strategy), f"{m.variance:.4g}", f"{m.operations:.4g}", f"{m.product:.4g}")
                for m in found
            ]
        widths = [max(len(r[k]) for r in rows) for k in range(5)]
        lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        return (
            "\n".join([table, "", *lines])
            if len(rows) > 1
            else f"{table}\n\nnothing to measure: all are cheap and exact"
        )

    def _table(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> str:
        rows = [("site", "strategy", "evaluations", "reason")]
        open_ = self.undecided(target, proposal, bound)
        for c in self.choose(target, proposal, bound):
            reason = c.reason + ("; a fit measures" if c.site in open_ else "")
            rows.append((c.site, label(c.strategy), str(c.evaluations), reason))
        widths = [max(len(r[k]) for r in rows) for k in range(3)]
        return "\n".join("  ".join([*(r[k].ljust(widths[k]) for k in range(3)), r[3]]) for r in rows)


def _evaluation(target: Target) -> float:
    """Operations of one log p; beyond any limit where the rows are not at hand."""
    if target.source is not None:
        return math.inf
    return operations(target.log_joint, {s.name: jnp.zeros(s.batch_shape, s.dtype) for s in target.sites})


def _continuous(site: Site, proposal: AbstractProposal, bound: AbstractBound) -> Choice:
    landing = StickTheLanding()
    if proposal.lands and landing.unsuited(site, proposal, bound) is None:
        return Choice(site.name, landing, 1, "continuous, and its family starts near the posterior: no score of q")
    return Choice(site.name, Pathwise(), 1, "continuous: the draw is reparameterised")


def label(strategy: AbstractStrategy) -> str:
    """Its name, with the options that differ from the default."""
    options = [f"{f.name}={getattr(strategy, f.name)}" for f in dataclasses.fields(strategy)]
    usual = [f"{f.name}={f.default}" for f in dataclasses.fields(strategy)]
    return type(strategy).__name__ + "".join(f"({o})" for o, u in zip(options, usual, strict=True) if o != u)


def closed_sites(target: Target, proposal: AbstractProposal) -> set[str]:
    """Sites that both the target and their family can take in closed form."""
    parts = proposal.parts if isinstance(proposal, ProductProposal) else (proposal,)
    found: set[str] = set()
    for part in parts:
        if part.closed_form:
            found |= {s.name for s in part.sites}
    return found & set(target.closed)
