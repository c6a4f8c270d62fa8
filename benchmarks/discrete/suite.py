"""The discrete suite: problems with exact answers, and the figures of every family and estimator on them.

    python benchmarks/discrete/suite.py [PROBLEM ...] [--seeds N] [--list]

Fits every family with every estimator, and adds to `benchmarks/results/discrete_suite.json` as it goes: what is there
already is not fitted again. `benchmarks/results/discrete_suite.md` is the table of medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bernoulli  # noqa: E402
import change_point  # noqa: E402
import gaussian_mixture  # noqa: E402
import ising  # noqa: E402
import jax  # noqa: E402
import poisson  # noqa: E402
import sherrington_kirkpatrick  # noqa: E402
import sigmoid_belief  # noqa: E402
from base import Problem  # noqa: E402
from common import RESULTS, write  # noqa: E402
from measure import figures  # noqa: E402

import hivi  # noqa: E402
from hivi._estimators.base import AbstractStrategy  # noqa: E402
from hivi._space import Site  # noqa: E402

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "bernoulli-paper": bernoulli.paper,
    "bernoulli-2": lambda: bernoulli.random_table(2),
    "bernoulli-4": lambda: bernoulli.random_table(4),
    "bernoulli-8": lambda: bernoulli.random_table(8),
    "bernoulli-12": lambda: bernoulli.random_table(12),
    "ising-chain-12": lambda: ising.chain(12),
    "ising-chain-100": lambda: ising.chain(100),
    "ising-4x4-0.4": lambda: ising.lattice(4, 0.4),
    "ising-8x8-0.4": lambda: ising.lattice(8, 0.4),
    "sk-20": sherrington_kirkpatrick.glass,
    "sbn-layers": sigmoid_belief.two_layers,
    "sbn-rows": sigmoid_belief.rows,
    "poisson-mixture-2": poisson.two_counts,
    "poisson-mixture-3": poisson.three_counts,
    "poisson-sources": poisson.sources,
    "change-point": change_point.one,
    "change-points-2": change_point.two,
    "change-point-rates": change_point.with_rates,
    "gmm-fixed": gaussian_mixture.fixed,
    "gmm-collapsed": gaussian_mixture.collapsed,
    "gmm-means": gaussian_mixture.with_means,
}
"""Name -> what makes the problem, its exact answers included (a second at most)."""

Maker = Callable[[hivi.Fit, Any], Any]
FAMILIES: dict[str, Maker] = {
    "mean-field": lambda fit, found: hivi.MeanField(),
    "HVM": lambda fit, found: hivi.Hierarchical(start=fit, along=found),
    "HVM, afresh": lambda fit, found: hivi.Hierarchical(),
    "HVM, full-rank": lambda fit, found: hivi.Hierarchical(hivi.FullRank(), hivi.Linearised(), start=fit, along=found),
    "HVM, mixture of 4": lambda fit, found: hivi.Hierarchical(prior=hivi.Mixture(4)),
    "mixture of 4": lambda fit, found: hivi.Mixture(4),
    "mixture of 8 (default)": lambda fit, found: hivi.Mixture(8, dispersed=any(s.values.ordered for s in fit.sites)),
    "mean-field, dispersed": lambda fit, found: hivi.MeanField(dispersed=True),
    "HVM, dispersed": lambda fit, found: hivi.Hierarchical(dispersed=True),
    "HVM, mixture of 4, dispersed": lambda fit, found: hivi.Hierarchical(prior=hivi.Mixture(4), dispersed=True),
}
"""Name -> family, from a mean-field fit of the problem and its `hivi.curvature` (None where there is none)."""

COUNTS = ("poisson-mixture-2", "poisson-mixture-3", "poisson-sources")
"""Problems with counts: the dispersed families are theirs."""


def families_of(name: str) -> list[str]:
    """The families that are fitted to a problem."""
    return [f for f in FAMILIES if "dispersed" not in f or name in COUNTS]


def exact(site: Site) -> AbstractStrategy:
    """Every value summed where the support is finite and short; else the difference identity of counts."""
    return hivi.LocalExpectation() if site.values.kind == "finite" else hivi.Difference()


ESTIMATORS: dict[str, Callable[[Site], AbstractStrategy]] = {
    "exact differences": exact,
    "score": lambda site: hivi.Score(),
}
"""Name -> strategy of a discrete site; a new strategy is a new row."""

STEPS, SAMPLES, RATE = 3000, 16, 0.02

NOTES = (
    f"Medians over seeds; bounds in nats, ± the median standard error of 4096 draws. {STEPS} steps of "
    f"{SAMPLES} draws at learning rate {RATE}; all steps are taken. Gap: exact log Z less the "
    "bound; for a hierarchical family it exceeds KL(q‖p), that of the marginal q(z), by what the auxiliary r "
    "loses. KL: over the exact table; q(z) is an average over 65,536 draws of lambda, which overstates it a "
    "little. Worst marginal: the largest error of a probability p(z_i = v|x), or of a continuous site's mean in "
    "posterior standard deviations; where there is no table, from 32,768 draws. Seconds: of the fit; only the "
    "first seed's includes compilation; one thread. HVM: `Hierarchical()` with its default prior `Flow(8)`, grown from the "
    "mean-field fit; "
    "full-rank: `FullRank()` with `Linearised()`, grown along `hivi.curvature`, where all sites are discrete; "
    "afresh and the mixtures: without a start; default: what `hivi.fit` takes without a family, but for one finite variable; "
    "dispersed: counts of free spread, without a start. Exact differences: "
    "`LocalExpectation`, for counts `Difference`. What each "
    "problem is: `benchmarks/discrete/README.md`. "
)
"""What the columns and rows of the table are."""


def run(name: str, how: str, seeds: Iterable[int], path: Path) -> None:
    """Every family on one problem, with one estimator; seeds share the compiled programs."""
    wanted = {s: [f for f in families_of(name) if f"{name}|{f}|{how}|{s}" not in known(path)] for s in seeds}
    if any(wanted.values()):
        problem = PROBLEMS[name]()
        target = problem.target()
        for seed, families in wanted.items():
            if families:
                run_families(problem, target, families, how, seed, path)
        jax.clear_caches()  # each program keeps mappings of memory, of which a process has 65,530


def run_families(problem: Problem, target: hivi.Target, wanted: list[str], how: str, seed: int, path: Path) -> None:
    """Families on one problem with one estimator and seed; those that grow share one mean-field fit."""
    k_fit, k_curve, k_measure = jax.random.split(jax.random.key(seed), 3)
    estimator = {s.name: ESTIMATORS[how](s) for s in target.sites if s.discrete}
    options: dict[str, Any] = {
        "steps": STEPS,
        "samples": SAMPLES,
        "learning_rate": RATE,
        "progress": False,
        "tolerance": None,
    }
    first = hivi.fit(target, hivi.MeanField(), key=k_fit, estimator=estimator, **options)
    found = None if len(estimator) < len(target.sites) else hivi.curvature(first, key=k_curve)
    for label in wanted:
        began = time.monotonic()
        try:
            family = FAMILIES[label](first, found)
            grown = label == "mean-field"
            fit = first if grown else hivi.fit(target, family, key=k_fit, estimator=estimator, **options)
            row = figures(problem, fit, k_measure) | {"seconds": fit.seconds}
        except hivi.HiviError as error:
            row = {"refused": str(error)}
        row["total seconds"] = time.monotonic() - began
        record(path, f"{problem.name}|{label}|{how}|{seed}", row)


def known(path: Path) -> dict[str, Any]:
    """The rows that there are."""
    return json.loads(path.read_text()) if path.exists() else {}


def record(path: Path, key: str, row: dict[str, Any]) -> None:
    """Add a row."""
    rows = known(path) | {key: row}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    print(key, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def table(path: Path) -> None:
    """Medians over all seeds that there are, one row per problem, family and estimator."""
    rows, found = [], known(path)
    for name in PROBLEMS:
        for family in FAMILIES:
            for how in ESTIMATORS:
                runs = [r for k, r in found.items() if k.rsplit("|", 1)[0] == f"{name}|{family}|{how}"]
                if runs:
                    rows.append([name, family, how, *cells(runs), str(len(runs))])
    head = (
        "problem", "family", "estimator", "bound", "gap to log Z", "KL(q‖p)", "worst marginal", "seconds", "seeds",
    )  # fmt: skip
    write(
        "discrete_suite", "Discrete suite", "python benchmarks/discrete/suite.py", head, rows, textwrap.wrap(NOTES, 130)
    )


def cells(runs: list[dict[str, Any]]) -> list[str]:
    """The figures of one row of the table."""
    good = [r for r in runs if "bound" in r]
    if not good:
        return ["refused", "-", "-", "-", "-"]

    def median(key: str) -> float:
        return statistics.median(r[key] for r in good)

    kl = f"{median('kl'):.4f}" if all("kl" in r for r in good) else "-"
    bound = f"{median('bound'):.4f} ± {median('stderr'):.4f}"
    return [bound, f"{median('gap'):.4f}", kl, f"{median('worst'):.3f}", f"{median('seconds'):.1f}"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Fit every family and estimator on problems with exact answers.")
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help="names; all if none is given")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--list", action="store_true", help="only list the problems, with their exact log Z")
    options = parser.parse_args()
    unknown = set(options.problems) - PROBLEMS.keys()
    if unknown:
        parser.error(f"no such problem: {', '.join(sorted(unknown))}; there are {', '.join(PROBLEMS)}")
    path = RESULTS / "discrete_suite.json"
    names = options.problems or list(PROBLEMS)
    if options.list:
        for made in (PROBLEMS[name]() for name in names):
            print(f"{made.name:20s} {made.coordinates:4d} coordinates  log Z {made.log_z:10.4f}  {made.about}")
        return
    # The first seed of all comes first: a run that is cut short has the whole table.
    for seeds, how, name in itertools.product(([0], range(1, options.seeds)), ESTIMATORS, names):
        run(name, how, seeds, path)
    table(path)


if __name__ == "__main__":
    main()
