"""All differences of a latent that enters a term only through a matrix product, against a product for every one of them.

    python benchmarks/discrete/differences.py

f(z) = sum over rows and words of l(x, z W) with z of shape (rows, topics). For every coordinate of z the change of f when it
moves: as `hivi` finds it from the log-joint as written; by one whole evaluation for each topic (rows have no term in
common, so that they move at once); and by hand, `l(x, eta + dz_k W_k) - l(x, eta)` in a loop over the topics.
"""

from __future__ import annotations

import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from common import write  # noqa: E402
from jaxtyping import Array  # noqa: E402
from numpyro.distributions import constraints  # noqa: E402

import hivi  # noqa: E402
from hivi._compile import compiled  # noqa: E402

SIZES = ((120, 64, 50), (500, 1000, 30), (500, 1000, 100), (500, 1000, 300))
REPEATS = 5
Term = Callable[[Array, Array], Array]
TERMS: dict[str, tuple[Term, bool]] = {
    "Poisson": (lambda x, eta: x * jnp.log(eta + 0.1) - eta, True),
    "Bernoulli, logits": (lambda x, eta: x * eta - jax.nn.softplus(eta), False),
    "Normal": (lambda x, eta: -0.5 * (x - eta) ** 2, False),
}
"""Name -> log p(x|eta) up to a constant, and whether eta has to be positive."""
Differences = Callable[[Array, Array], Array]


def methods(term: Term, x: Array, w: Array) -> dict[str, Differences]:
    """Name -> the differences of f at (z, moved), both (rows, topics)."""
    shape = (x.shape[0], w.shape[0])
    latents = {"z": hivi.Latent(shape, constraints.nonnegative_integer)}
    target = hivi.from_log_joint(lambda z, data: term(data[0], z["z"] @ data[1]), latents, data=(x, w))

    def found(z: Array, moved: Array) -> Array:
        return target.factored.differences("z", moved[None], {"z": z}, target.data, target.all_rows())[0]

    def whole(z: Array, moved: Array) -> Array:
        before = term(x, z @ w)

        def one(k: Array) -> Array:
            now = jnp.where(jnp.arange(shape[1]) == k, moved, z)
            return jnp.sum(term(x, now @ w) - before, -1)

        return jax.lax.map(one, jnp.arange(shape[1])).T

    def by_hand(z: Array, moved: Array) -> Array:
        eta = z @ w
        before = term(x, eta)

        def one(pair: tuple[Array, Array]) -> Array:
            step, row = pair
            return jnp.sum(term(x, eta + step[:, None] * row) - before, -1)

        return jax.lax.map(one, ((moved - z).T.astype(w.dtype), w)).T

    return {"hivi": found, "whole": whole, "by hand": by_hand, "once": lambda z, moved: jnp.sum(term(x, z @ w))}


def measure(name: str, rows: int, words: int, topics: int) -> dict[str, float]:
    """Median seconds of each way, interleaved; and the largest deviation of hivi's from the whole ones, in nats."""
    term, positive = TERMS[name]
    rng = np.random.default_rng([rows, words, topics])
    w = rng.gamma(0.3, 1.0, (topics, words)) if positive else 0.3 * rng.standard_normal((topics, words))
    z = jnp.asarray(rng.poisson(1.0, (rows, topics)), jnp.int32)
    x = jnp.asarray(rng.poisson(1.0, (rows, words)), jnp.float32)
    ways = {k: compiled(f, effort="full") for k, f in methods(term, x, jnp.asarray(w, jnp.float32)).items()}
    answers = {k: jax.block_until_ready(f(z, z + 1)) for k, f in ways.items()}
    seconds: dict[str, list[float]] = {k: [] for k in ways}
    for _ in range(REPEATS):
        for k, f in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(f(z, z + 1))
            seconds[k].append(time.perf_counter() - began)
    row = {k: statistics.median(s) for k, s in seconds.items()}
    return row | {"deviation": float(jnp.abs(answers["hivi"] - answers["whole"]).max())}


def main() -> None:
    """The command."""
    rows = []
    for name in TERMS:
        for size in SIZES:
            found = measure(name, *size)
            gain, least = found["whole"] / found["hivi"], found["hivi"] / found["by hand"]
            each = found["hivi"] / size[2] / found["once"]
            label = "×".join(map(str, size))
            rows.append([name, label, f"{found['hivi']:.3g}", f"{gain:.2f}", f"{least:.2f}", f"{each:.2f}",
                         f"{found['deviation']:.1g}"])  # fmt: skip
    notes = textwrap.wrap(
        f"Medians of {REPEATS}, the ways in turn, one process, each compiled as a fit of many steps is. Whole "
        "evaluations / hivi: how many times quicker than a matrix "
        "product for every topic. hivi / by hand: against a loop over the topics that was written for this term. Per topic / "
        "evaluation: one topic's differences against one evaluation of f, product included. What is left is the arithmetic of "
        "the term itself, once for each topic: the gain is what the products cost beside it. Deviation: the largest, in nats.",
        130,
    )
    head = ("term", "rows×words×topics", "seconds, hivi", "whole evaluations / hivi", "hivi / by hand",
            "per topic / evaluation", "deviation")  # fmt: skip
    write("discrete_differences", "Differences through a matrix product", "python benchmarks/discrete/differences.py",
          head, rows, notes)  # fmt: skip


if __name__ == "__main__":
    main()
