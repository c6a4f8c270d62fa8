"""`Auto`: the strategy with the least noise that a site's support and the cost allow, and why."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from hivi._bounds import AbstractBound, Elbo
from hivi._errors import FitError, message
from hivi._estimators.base import AbstractEstimator, AbstractStrategy, abstract_conditionals
from hivi._estimators.differences import Difference, LocalExpectation
from hivi._estimators.expectation import Expectation
from hivi._estimators.pathwise import Pathwise
from hivi._estimators.score import Score
from hivi._factored import factorise
from hivi._families.base import AbstractProposal
from hivi._families.product import ProductProposal, build_proposal
from hivi._locality.colour import colours
from hivi._space import Site
from hivi._target.base import Target


class Choice(NamedTuple):
    """What was chosen for one site, and why."""

    site: str
    strategy: AbstractStrategy
    evaluations: int
    reason: str


class Auto(AbstractEstimator):
    """Pathwise for continuous sites; exact local expectation or difference for discrete ones; score where too dear.

    Args:
        budget: the most evaluations of a site's factors that one draw may cost before the score function is taken.

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

    def choose(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> list[Choice]:
        """One choice per site, with the number of evaluations it costs and the reason."""
        conditionals = abstract_conditionals(proposal)
        palette = site_colours(target, proposal, bound)
        closed = closed_sites(target, proposal)
        return [
            Choice(s.name, Expectation(), 1, "log p meets it through means that its family has in closed form")
            if s.name in closed
            else self._choose(s, s.name in conditionals, palette.get(s.name, 1))
            for s in target.sites
        ]

    def _choose(self, site: Site, conditional: bool, count: int) -> Choice:
        plural = f"{count} colour{'s' * (count != 1)}"
        if not site.discrete:
            return Choice(site.name, Pathwise(), 1, "continuous: the draw is reparameterised")
        if not conditional:
            raise FitError(
                message(
                    f"site {site.name!r}",
                    "a discrete site whose family gives no q(z|lambda)",
                    "a family with factorised conditionals",
                    "use MeanField(), Mixture() or Hierarchical() for it",
                )
            )
        moves = site.values.count - 1 if site.values.kind == "finite" else 1
        cost = moves * count
        if cost > self.budget:
            return Choice(site.name, Score(), 1, f"exact would cost {cost} evaluations ({plural}), over {self.budget}")
        if site.values.kind == "finite":
            why = f"finite support of {site.values.count} values: every value summed, {plural}"
            return Choice(site.name, LocalExpectation(), cost, why)
        return Choice(site.name, Difference(), cost, f"{site.values.kind}: difference identity, {plural}")

    def resolve(self, target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, AbstractStrategy]:
        return {c.site: c.strategy for c in self.choose(target, proposal, bound)}

    def explain(self, target: Target, family: Any, bound: AbstractBound | None = None) -> str:
        """A table: site, strategy, evaluations per draw, and the reason."""
        proposal = family
        if not isinstance(family, AbstractProposal):
            proposal = build_proposal(family, target.sites, jax.random.key(0))
        rows = [("site", "strategy", "evaluations", "reason")]
        for c in self.choose(target, proposal, Elbo() if bound is None else bound):
            rows.append((c.site, type(c.strategy).__name__, str(c.evaluations), c.reason))
        widths = [max(len(r[k]) for r in rows) for k in range(3)]
        return "\n".join("  ".join([*(r[k].ljust(widths[k]) for k in range(3)), r[3]]) for r in rows)


def closed_sites(target: Target, proposal: AbstractProposal) -> set[str]:
    """Sites that both the target and their family can take in closed form."""
    parts = proposal.parts if isinstance(proposal, ProductProposal) else (proposal,)
    found: set[str] = set()
    for part in parts:
        if part.closed_form:
            found |= {s.name for s in part.sites}
    return found & set(target.closed)


def site_colours(target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, int]:
    """Discrete site -> number of evaluations that move each of its coordinates once, in log p and in log q."""
    discrete = {s.name: s for s in target.sites if s.discrete}
    if not discrete:
        return {}
    programs = [(target.factored.program, {(term, site) for term, site, _ in target.factored.overrides})]
    arrays, static = eqx.partition(proposal.gather(target.all_rows()), eqx.is_array)

    def look(a: Any) -> None:
        p = eqx.combine(a, static)
        z, context = p.propose(jax.random.key(0))
        free = {n: z[n] for n in discrete if n in p.conditionals(context)}
        if free:
            factored = factorise(lambda v: p.log_q({**z, **v}, context, jax.random.key(1), bound.inner), free)
            programs.append((factored.program, set()))

    jax.eval_shape(look, arrays)
    out = {}
    for name, site in discrete.items():
        counts = []
        for program, overridden in programs:
            factors = [f for f in program.factors if f.maps(name) and (f.name, name) not in overridden]
            palette = colours(factors, name, site.batch_shape)
            counts.append(math.prod(int(np.max(c, initial=0)) + 1 for c in palette))
        out[name] = max(counts)
    return out
