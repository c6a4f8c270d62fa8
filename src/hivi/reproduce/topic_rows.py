"""One architecture of the table of deep exponential families: hierarchical against mean-field, from scratch and converged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
import scipy.sparse as sp
from jaxtyping import Float64

from hivi._curvature import Curvature
from hivi._families.base import AbstractFamily
from hivi._families.mean_field import MeanField
from hivi._fit.result import Estimate
from hivi.topics.base import Corpus
from hivi.topics.document_curvature import PASSES, document_curvature
from hivi.topics.fitting import GROWN_DRAWS, TopicFit, grow, hierarchical, start
from hivi.topics.fitting import train as go_on
from hivi.topics.heldout import Scores, Split, paired_difference
from hivi.topics.inference import LOCAL_PASSES
from hivi.topics.model import BATCH, Architecture, Latent
from hivi.topics.scoring import HeldOut, hold_out
from hivi.topics.trained import Trained, without_documents

EVERY = 10.0
"""Seconds between two lines of progress."""
DEARER = 2.0
"""What a pass of a hierarchical family costs, in passes of mean-field."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fitted, and how long.

    Attributes:
        layers: the rows of the table.
        latent: kind of the latent layers.
        passes: over the corpus, from scratch, warm-up included.
        warm_up: of these, passes with point estimates of the weights.
        extra: further passes of the converged comparison.
        seeds: of the fits; the split into documents and tokens is one.
        batch: documents per minibatch.
        words: tokens that every document is cut to; None for whole documents.
        reverse: show a tenth of a test document's tokens and hold out the rest, instead of the other way round.
        peers: fit LDA and NMF, too.
        family: the hierarchical family.
        local_passes: gradient steps per test document.
        settled_passes: the same in the converged comparison, where what is left to gain must be small.
        tested: documents of the curvature test; 0 for none.
        draws: of the curvature test.
        curvature_passes: gradient steps per document and learning rate, before the curvature test.
    """

    layers: tuple[tuple[int, ...], ...] = ((100,), (100, 30), (100, 30, 15))
    latent: Latent = "poisson"
    passes: int = 120
    warm_up: int = 60
    extra: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = BATCH
    words: int | None = None
    reverse: bool = False
    peers: bool = True
    family: AbstractFamily = dataclasses.field(default_factory=hierarchical)
    local_passes: int = LOCAL_PASSES
    settled_passes: int = 2 * LOCAL_PASSES
    tested: int = 64
    draws: int = 2048
    curvature_passes: int = PASSES

    def cost(self, layers: tuple[int, ...]) -> float:
        """Work of one row, in units of the clock."""
        passes = self.passes * (1 + DEARER) + self.extra * (1 + DEARER)
        return len(self.seeds) * passes * sum(layers)


class Clock:
    """How much of all work is done, and how long the rest takes: lines of text, not too often.

    Args:
        total: work, in any unit.
        say: prints a line; None for silence.
    """

    def __init__(self, total: float, say: Callable[[str], None] | None):
        self._total, self._say = total, say
        self._began = self._printed = time.monotonic()
        self._done = 0.0

    def watch(self, label: str, passes: int, unit: float, offset: float) -> Callable[[float, float], None]:
        """A `Watch` of a fit of so many passes, each of `unit` work; `offset` passes were before it."""
        start = self._done

        def tell(at: float, bound: float) -> None:
            here = at - offset
            self._done = start + here * unit
            if time.monotonic() - self._printed >= EVERY or here >= passes:
                self.line(f"{label}: pass {here:.0f} of {passes}, bound {bound:.6g}")

        return tell

    def line(self, text: str) -> None:
        """A remark, with what is left."""
        self._printed = time.monotonic()
        share, seconds = self._done / self._total, self._printed - self._began
        left = f"; {share:.0%} of all fits, about {seconds * (1 / share - 1) / 60:.1f} minutes left" if share else ""
        if self._say is not None:
            self._say(text + left)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """The same documents under both families, one entry per seed."""

    hvm: tuple[HeldOut, ...]
    flat: tuple[HeldOut, ...]

    def bounds(self) -> Float64[np.ndarray, "seeds documents"]:
        """How much higher the hierarchical bound of each document's observed part is, in nats."""
        return np.stack([a.bounds - b.bounds for a, b in zip(self.hvm, self.flat, strict=True)])

    def difference(self) -> Estimate:
        """Mean of `bounds` over seeds and documents; standard error over documents."""
        each = self.bounds().mean(axis=0)
        return Estimate(float(each.mean()), float(each.std(ddof=1) / np.sqrt(len(each))))

    def uncertainty(self) -> float:
        """Standard error of the difference over documents and seeds together."""
        per_seed = self.bounds().mean(axis=1)
        over_seeds = per_seed.std(ddof=1) / np.sqrt(len(per_seed)) if len(per_seed) > 1 else 0.0
        return float(np.hypot(self.difference().stderr, over_seeds))

    def tokens(self) -> Estimate:
        """How much better held-out tokens are foreseen, in nats per token; standard error over documents."""
        hvm, flat = (
            Scores(np.mean([x.scores.log_likelihood for x in side], axis=0), side[0].scores.tokens)
            for side in (self.hvm, self.flat)
        )
        return paired_difference(hvm, flat)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """Everything that was measured of one architecture.

    Attributes:
        layers: sizes.
        scratch: both families from scratch, equal passes.
        converged: from the same mean-field fit: grown into the hierarchical family, or left as it was; equal further passes.
        curvature: the second-order test at the converged mean-field fit of the first seed.
    """

    layers: tuple[int, ...]
    scratch: Pair
    converged: Pair
    curvature: Curvature | None


def fit_row(train: Corpus, split: Split, layers: tuple[int, ...], plan: Plan, clock: Clock) -> Row:
    """Fit and measure one architecture with all seeds."""
    architecture = Architecture(layers=layers, latent=plan.latent)
    found: dict[str, list[HeldOut]] = {"hvm": [], "flat": [], "grown": [], "longer": []}
    tested: Curvature | None = None
    for number, seed in enumerate(plan.seeds):
        label = f"{row_name(layers)}, seed {seed}"
        flat = _scratch(train, architecture, MeanField(), plan, seed, clock, f"{label}, mean-field")
        found["flat"].append(_measure(flat, train, split, plan.local_passes))
        hvm = _scratch(train, architecture, plan.family, plan, seed, clock, f"{label}, HVM")
        found["hvm"].append(_measure(hvm, train, split, plan.local_passes))
        del hvm
        grown = grow(flat, plan.family, key=jax.random.fold_in(jax.random.key(seed), 1))
        for name, fit in (("grown", grown), ("longer", flat)):
            unit = sum(layers) * (DEARER if name == "grown" else 1.0)
            watch = clock.watch(
                f"{label}, {'HVM grown' if name == 'grown' else 'mean-field on'}", plan.extra, unit, _passes(fit)
            )
            go_on(fit, plan.extra, rng=np.random.default_rng((seed, 1)), samples=GROWN_DRAWS, watch=watch)
            found[name].append(_measure(fit, train, split, plan.settled_passes))
        if number == 0 and plan.tested and plan.latent != "gamma":
            clock.line(f"{label}: curvature test of {min(plan.tested, len(split.test))} documents")
            tested = _curvature(flat, train, split, plan)
    sides = {name: tuple(values) for name, values in found.items()}
    return Row(layers, Pair(sides["hvm"], sides["flat"]), Pair(sides["grown"], sides["longer"]), tested)


def row_name(layers: tuple[int, ...]) -> str:
    """`100-30-15`."""
    return "-".join(map(str, layers))


def cut_documents(corpus: Corpus, words: int, seed: int = 0) -> Corpus:
    """Documents of at most so many tokens, drawn without replacement from each.

    Example:
        >>> import numpy as np
        >>> from hivi.reproduce.topic_rows import cut_documents
        >>> from hivi.topics.base import Corpus
        >>> cut_documents(Corpus.from_matrix(np.array([[5, 3], [1, 0]])), 4).lengths()
        array([4, 1])
    """
    rng, counts = np.random.default_rng(seed), corpus.to_csr()
    data = counts.data.astype(np.int64)
    for first, stop in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        if data[first:stop].sum() > words:
            data[first:stop] = rng.multivariate_hypergeometric(data[first:stop], words)
    rows = sp.csr_array((data, counts.indices, counts.indptr), shape=counts.shape)
    return Corpus.from_matrix(rows, corpus.vocabulary, f"{corpus.name}, {words} words")


def _scratch(
    train: Corpus, a: Architecture, family: AbstractFamily, plan: Plan, seed: int, clock: Clock, label: str
) -> TopicFit:
    fit = start(train, a, family, key=jax.random.key(seed), batch=plan.batch)
    unit = sum(a.layers) * (1.0 if isinstance(family, MeanField) else DEARER)
    watch = clock.watch(label, plan.passes, unit, 0.0)
    return go_on(fit, plan.passes, rng=np.random.default_rng(seed), warm_up=plan.warm_up, watch=watch)


def _passes(fit: TopicFit) -> float:
    """Passes that the fit's history holds."""
    return len(fit.stream.elbo) / len(fit.stream.source.passes(np.random.default_rng(0)))


def _trained(fit: TopicFit, train: Corpus) -> Trained:
    return without_documents(fit, train.n_documents, 0)


def _measure(fit: TopicFit, train: Corpus, split: Split, passes: int) -> HeldOut:
    return hold_out(_trained(fit, train), split.observed, split.heldout, passes=passes)


def _curvature(fit: TopicFit, train: Corpus, split: Split, plan: Plan) -> Curvature:
    """The test at documents drawn from those for testing."""
    number = min(plan.tested, len(split.test))
    chosen = np.sort(np.random.default_rng(0).permutation(len(split.test))[:number])
    rows = sp.csr_array(split.observed)[chosen]
    key = jax.random.key(0)
    return document_curvature(_trained(fit, train), rows, key=key, samples=plan.draws, passes=plan.curvature_passes)
