"""A sigmoid belief network with 50 units on binarised digits: held-out bounds of mean-field and of a hierarchy.

    python benchmarks/discrete/digits.py [--seeds N] [--seconds S] [--choose T]

Each family learns weights of its own on 1437 digits (an inference network gives the units of a digit), mean-field under its
ELBO, the hierarchy under a multi-sample bound, digit by digit; and then, with the weights as learned, gets a fit of its own on
the 360 held-out digits. The hierarchy's prior q(lambda) has six points for the weights, of equal probability, each learned in a
sixth of the time from another key under 32 draws, and for the units of a held-out digit a mixture of six above each; a digit
is explained by all six. Both parts take the same wall time for both families, compilation excluded, on the same machine and in
the same run: the hierarchy first, and then mean-field with at least the time that the hierarchy took. The prior's width, and
whether weights are points or have a posterior, are each family's best on 288 of the training digits (`--choose`), mean-field's
among fits under its ELBO; six components in place of four for held-out units make no difference there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402
from common import RESULTS, write  # noqa: E402
from scipy.special import logsumexp  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from suite import known, record  # noqa: E402

import hivi  # noqa: E402
from hivi._fit.run import USUAL_STEPS  # noqa: E402

UNITS, BATCH, HIDDEN = 50, 120, 200
RATES = {"learn": 0.01, "held-out": 0.1}
PROBE = 6.0
"""Seconds of the fits that tell how long a step takes."""
DRAWS = 1024
"""Of the multi-sample bound that is reported, components included."""
PATH = RESULTS / "discrete_digits.json"
OPTIONS: dict[str, Any] = {
    "samples": 1,
    "progress": False,
    "tolerance": None,
    "estimator": {"z": hivi.LocalExpectation()},
}


class Setting(NamedTuple):
    """How a family learns: the units' q, its draws, the weights' q, their prior's width, how many fits; q of held-out units."""

    family: hivi.MeanField | hivi.Mixture
    outer: int
    weights: hivi.MeanField | hivi.Delta
    deviation: float
    rate: float = RATES["learn"]
    parts: int = 1
    unseen: hivi.MeanField | hivi.Mixture = hivi.MeanField()

    @property
    def learning(self) -> dict[str, Any]:
        """Options of the fit that learns weights: many draws take the score function, whose cost is a fifth."""
        if self.outer == 1:
            return OPTIONS
        bound = hivi.ImportanceWeighted(self.outer, plate="digits")
        return {**OPTIONS, "bound": bound, "estimator": {"z": hivi.Score()}}


POINT, POSTERIOR = hivi.Delta(), hivi.MeanField()
FLAT = Setting(hivi.MeanField(), 1, POINT, 1.0)
UNITS_MIXED, MORE_MIXED = hivi.Mixture(4, equal=True), hivi.Mixture(6, equal=True)
MANY = Setting(hivi.MeanField(), 32, POINT, 2.0, 0.015)
HVM = MANY._replace(parts=6, unseen=MORE_MIXED)
MIXED = Setting(UNITS_MIXED, 16, POINT, 2.0, 0.02, unseen=UNITS_MIXED)
CHOSEN = {"mean-field": FLAT, "HVM": HVM}
CANDIDATES = {
    "mean-field, point, 1": (FLAT, 1),
    "mean-field, point, 2": (FLAT._replace(deviation=2.0), 1),
    "mean-field, posterior, 1": (FLAT._replace(weights=POSTERIOR), 1),
    "mean-field, posterior, 2": (FLAT._replace(weights=POSTERIOR, deviation=2.0), 1),
    "mean-field under 64 draws, point, 2": (MANY._replace(outer=64, rate=0.02), 1),
    "HVM, mixture of 4 under 16 draws each, point, 1": (MIXED._replace(deviation=1.0), 1),
    "HVM, mixture of 4 under 16 draws each, point, 2": (MIXED, 1),
    "mean-field, point, 1, long": (FLAT, 3),
    "mean-field under 32 draws, point, 2, long": (MANY, 3),
    "six times mean-field, point, 1, long": (FLAT._replace(parts=6), 3),
    "HVM, six points, 2, long": (HVM._replace(unseen=UNITS_MIXED), 3),
    "HVM, six points, mixture of 6, 2, long": (HVM, 3),
}
"""Name -> setting, and in how many times the seconds."""


def digits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Binary images (rows, 64): 1437 to train on, 360 held out."""
    images = (load_digits().data > 7.5).astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(images))
    return images[order[360:]], images[order[:360]]


def network(x: Any, weights: dict[str, Any] | None = None, deviation: float = 1.0) -> None:
    """One layer of units above the pixels; weights are latent, with this deviation of their prior, or given."""
    if weights is None:
        w = numpyro.sample("w", dist.Normal(0.0, deviation).expand([UNITS, x.shape[1]]).to_event(2))
        b = numpyro.sample("b", dist.Normal(0.0, 3.0).expand([x.shape[1]]).to_event(1))
        a = numpyro.sample("a", dist.Normal(0.0, 3.0).expand([UNITS]).to_event(1))
    else:
        w, b, a = weights["w"], weights["b"], weights["a"]
    with numpyro.plate("digits", len(x)):
        z = numpyro.sample("z", dist.Bernoulli(logits=a).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=b + z @ w).to_event(1), obs=x)


def timed(target: hivi.Target, family: Any, seconds: float, options: dict[str, Any], least: bool) -> hivi.Fit:
    """A fit of as many steps as the seconds allow; repeated with more steps, while `least` and it took less.

    A step's time is what the steps of some seconds take more than a few, since every fit also has a part of its own. A fit of
    few steps is compiled in more haste than one of many: what is timed has been compiled before as it is there.
    """
    few = USUAL_STEPS
    hivi.fit(target, family, steps=few, **options)  # compiles
    short = hivi.fit(target, family, steps=few, **options).seconds
    count = few + max(few, round(few * PROBE / short))
    each = max(hivi.fit(target, family, steps=count, **options).seconds - short, 0.5 * short) / (count - few)
    steps = max(300, round((1.08 if least else 1.0) * (few + (seconds - short) / each)))
    if steps < few:
        hivi.fit(target, family, steps=steps, **options)
    fit = hivi.fit(target, family, steps=steps, **options)
    while least and fit.seconds < seconds:
        steps = round(1.05 * steps * seconds / fit.seconds)
        fit = hivi.fit(target, family, steps=steps, **options)
    return fit


class Part(NamedTuple):
    """What one fit found: its bounds by digit, (estimates, digits), ELBO and many draws."""

    elbo: np.ndarray
    many: np.ndarray
    figures: dict[str, float]


def part(
    setting: Setting, keys: tuple[int, int], seconds: tuple[float, float], least: bool, data: tuple[Any, Any]
) -> Part:
    """One fit: weights, and the units of held-out digits. Seconds of learning, and of the held-out fit."""
    train, test = data
    seed, number = keys
    key = jax.random.key(seed) if not number else jax.random.fold_in(jax.random.key(seed), number)
    target = hivi.from_numpyro(network, train, None, setting.deviation, subsample={"digits": BATCH})
    amortised = hivi.Amortised(setting.family, data=train.astype(np.float32), hidden=HIDDEN)
    options = {**setting.learning, "key": key, "learning_rate": setting.rate}
    learnt = timed(target, {"z": amortised, ".*": setting.weights}, seconds[0], options, least)
    draws = learnt.sample(jax.random.key(seed + 1), 100)
    weights = {n: np.asarray(draws[n]).mean(0) for n in ("w", "b", "a")}
    unseen = hivi.from_numpyro(network, test, weights, subsample={"digits": BATCH})
    options = {**OPTIONS, "key": key, "learning_rate": RATES["held-out"]}
    fit = timed(unseen, setting.unseen, seconds[1], options, least)
    outer = DRAWS // (getattr(setting.unseen, "components", 1) * setting.parts)
    chance = 1 / (1 + np.exp(-weights["a"]))
    figures = {
        "units": int(np.sum((np.linalg.norm(weights["w"], axis=1) > 1) & (np.abs(chance - 0.5) < 0.49))),
        "seconds": learnt.seconds, "seconds held-out": fit.seconds,
        "steps": len(learnt.history["elbo"]), "steps held-out": len(fit.history["elbo"]),
    }  # fmt: skip
    return Part(
        fit.pointwise(jax.random.key(99), "digits", samples=800).rows,
        fit.pointwise(jax.random.key(98), "digits", draws=outer, samples=60).rows,
        figures,
    )


def estimate(each: np.ndarray) -> tuple[float, float]:
    """Mean per digit and standard error of (estimates, digits)."""
    values = each.mean(1)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def one(
    setting: Setting, seed: int, seconds: tuple[float, float], least: bool, data: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    """A family's figures, of all its parts together; bounds in nats per digit.

    With weights w_k of equal probability, log p(x) is at least sum_k r_k (ELBO_k(x) - log(r_k K)) for any r that sums to one:
    q's share of part k. The best r is estimated from half of the draws, and the bound from the others.
    """
    share = (seconds[0] / setting.parts, seconds[1] / setting.parts)
    found = [part(setting, (seed, k), share, least, data) for k in range(setting.parts)]
    elbo, many = np.stack([f.elbo for f in found]), np.stack([f.many for f in found])
    half = elbo.shape[1] // 2
    first = elbo[:, :half].mean(1, keepdims=True)
    log_r = first - logsumexp(first, 0)
    bound, stderr = estimate(np.sum(np.exp(log_r) * (elbo[:, half:] - log_r - np.log(setting.parts)), 0))
    more, error = estimate(logsumexp(many, 0) - np.log(setting.parts))
    summed = {n: sum(f.figures[n] for f in found) for n in found[0].figures}
    return {
        "bound": bound, "stderr": stderr, "many": more, "many stderr": error,
        **summed, "units": summed["units"] / setting.parts,
        "parts": [[float(x.mean()) for x in (f.elbo, f.many)] for f in found],
    }  # fmt: skip


def row(seed: int, seconds: float) -> dict[str, float]:
    """The hierarchy, and then mean-field with at least the time that the hierarchy took."""
    hvm = one(CHOSEN["HVM"], seed, (seconds, seconds / 3), False, digits())
    flat = one(CHOSEN["mean-field"], seed, (hvm["seconds"], hvm["seconds held-out"]), True, digits())
    found = {f"{key} {name}": v for name, part in (("HVM", hvm), ("mean-field", flat)) for key, v in part.items()}
    found |= {
        "gain": hvm["bound"] - flat["bound"],
        "gain many": hvm["many"] - flat["many"],
        "both": hvm["many"] - flat["bound"],
    }
    print(found, flush=True)
    return found


def choose(seconds: float) -> None:
    """Every candidate, on 1149 of the training digits and 288 others of them."""
    train, _ = digits()
    for name, (setting, times) in CANDIDATES.items():
        if f"choose {name}" not in known(PATH):
            found = one(setting, 0, (times * seconds, times * seconds / 3), False, (train[288:], train[:288]))
            print(name, found, flush=True)
            record(PATH, f"choose {name}", found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Held-out digits: mean-field and a hierarchy at equal wall time.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=480.0, help="of learning, for each; a third more held out")
    text = "first try the candidates, in this time, or thrice that"
    parser.add_argument("--choose", type=float, metavar="SECONDS", help=text)
    args = parser.parse_args()
    if args.choose:
        choose(args.choose)
    for seed in range(args.seeds):
        if str(seed) not in known(PATH):
            record(PATH, str(seed), row(seed, args.seconds))
    report(args.seeds, args.seconds, args.choose)


def report(seeds: int, seconds: float, tried_for: float | None = None) -> None:
    """The committed table."""
    found = known(PATH)
    tried = {k.removeprefix("choose "): found.pop(k) for k in list(found) if k.startswith("choose ")}
    for r in found.values():
        r["one of six"], r["one of six, many"] = (float(x) for x in np.mean(r["parts HVM"], 0))
    names = ("bound mean-field", "bound HVM", "gain", "many mean-field", "many HVM", "gain many", "both",
             "one of six", "one of six, many", "units mean-field", "units HVM",
             "seconds mean-field", "seconds HVM", "steps mean-field", "steps HVM")  # fmt: skip
    form = {n: ".0f" if n[0] in "su" else ".3f" for n in names}
    chosen = f" --choose {tried_for:.0f}" if tried_for else ""
    rows = [[k, *(format(r[n], form[n]) for n in names)] for k, r in found.items()]
    rows.append(["median", *(format(statistics.median(r[n] for r in found.values()), form[n]) for n in names)])
    error = statistics.median(np.hypot(r["stderr HVM"], r["stderr mean-field"]) for r in found.values())
    choice = "; ".join(f"{n}: {r['bound']:.2f}, {r['many']:.2f}" for n, r in tried.items())
    notes = (
        "Bounds in nats per held-out digit, each family at the weights that it learned. HVM: q(lambda) has six points for the "
        "weights, of equal probability, each learned from another key in a sixth of the time under 32 draws of mean-field "
        "units, digit by digit; for the units of a held-out digit it has a mixture of 6 points above each, of equal weight, and "
        "a probability for each of the six, estimated from other draws than the bound; r(component|z) is exact. Mean-field: one "
        "point for the weights, learned under the ELBO in all of the time. Bound: the ELBO, of HVM that of eq. 5. Many: the "
        f"bound with {DRAWS} draws per digit of the same q (of HVM {DRAWS // 36 * 36}, the six together). Gain: HVM less "
        "mean-field, ELBO and ELBO, many and many; both: HVM's with many draws less mean-field's ELBO. One of six: the mean of "
        "HVM's six, each by itself. Units: of 50, those with weights, and a probability between 0.01 and "
        f"0.99. Standard error of a gain by draws: {error:.3f}. Seconds of learning (a third more on the held-out digits); "
        "compilation excluded. Chosen on 288 of the training digits, at weights learned on the other 1149 (as points or with "
        "a posterior, deviation of their prior: ELBO, many; long: in thrice the time; mixtures of 4 where no "
        f"number is given): {choice}. What the model could be: "
        "discrete_digits_em.md."
    )
    write(
        "discrete_digits", "A sigmoid belief network on held-out digits",
        f"python benchmarks/discrete/digits.py{chosen} --seeds {seeds} --seconds {seconds:.0f}",
        ("seed", *names), rows, textwrap.wrap(notes, 130),
    )  # fmt: skip


if __name__ == "__main__":
    main()
