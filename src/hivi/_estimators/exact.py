"""What exact strategies would cost at a site: its colours, and the evaluations that cover its factors."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import numpy as np

from hivi._bounds import AbstractBound
from hivi._estimators.factor_expectation import FactorExpectation
from hivi._factored import Program, factorise
from hivi._families.base import AbstractProposal
from hivi._locality.colour import colours
from hivi._locality.covering import covering
from hivi._space import Site
from hivi._target.base import Target

Programs = list[tuple[Program, set[str]]]
"""Of log p and of log q, each with the names of the terms whose differences have a closed form."""


def site_programs(target: Target, proposal: AbstractProposal, bound: AbstractBound) -> dict[str, Programs]:
    """Discrete site -> the factors that its strategies meet."""
    discrete = {s.name: s for s in target.sites if s.discrete}
    if not discrete:
        return {}
    closed = {n: {term for term, site, _ in target.factored.overrides if site == n} for n in discrete}
    out: dict[str, Programs] = {n: [(target.factored.program, closed[n])] for n in discrete}
    arrays, static = eqx.partition(proposal.gather(target.all_rows()), eqx.is_array)

    def look(a: Any) -> None:
        p = eqx.combine(a, static)
        z, context = p.propose(jax.random.key(0))
        free = {n: z[n] for n in discrete if n in p.conditionals(context)}
        if free:
            factored = factorise(lambda v: p.log_q({**z, **v}, context, jax.random.key(1), bound.inner), free)
            for n in free:
                out[n].append((factored.program, set()))

    jax.eval_shape(look, arrays)
    return out


def site_colours(target: Target, programs: dict[str, Programs]) -> dict[str, int]:
    """Discrete site -> number of evaluations that move each of its coordinates once, in log p and in log q."""
    out = {}
    for name, found in programs.items():
        counts = []
        for program, closed in found:
            factors = [f for f in program.factors if f.maps(name) and f.name not in closed]
            palette = colours(factors, name, target.site(name).batch_shape)
            counts.append(math.prod(int(np.max(c, initial=0)) + 1 for c in palette))
        out[name] = max(counts)
    return out


def noiseless(strategy: FactorExpectation, site: Site, programs: Programs) -> int | None:
    """Evaluations of a strategy that covers all factors of a site, None where it would leave some to local expectations."""
    groups = [(program.factors, closed) for program, closed in programs]
    found = covering(groups, site.name, site.batch_shape, site.values.count, strategy.states)
    factors = [f for some, _ in groups for f in some]
    if found is None or any(f.maps(site.name) and o is None for f, o in zip(factors, found.owners, strict=True)):
        return None
    return len(found.rows)
