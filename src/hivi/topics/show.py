"""A trained hierarchy of topics as text: topics by their words, super-topics as trees of what they are made of."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64, Real

from hivi._errors import CorpusError, message

Rank = Literal["relevance", "probability"]

BLEND = 0.6
"""Relevance: this share of log p(w|topic), the rest of its lift over the corpus."""
LEAST = 0.01
"""A unit is alive with more than this part of an equal share of its layer."""
NEGLIGIBLE = 0.01
"""Children with less of their parent are not shown."""


@dataclasses.dataclass(frozen=True)
class Topic:
    """One unit of one layer.

    Attributes:
        layer: 1 for topics, 2 and more for super-topics.
        number: of the unit in its layer, from 0.
        share: of the tokens that its layer makes.
        alive: whether that is more than a hundredth of an equal share.
        words: its top words, best first.
        children: units of the layer below that it is made of, strongest first; none for topics.
        part: what its parent is made of it, where it is shown under one.
    """

    layer: int
    number: int
    share: float
    alive: bool
    words: tuple[str, ...]
    children: tuple[Topic, ...] = ()
    part: float | None = None

    def lines(self, indent: int = 0) -> list[str]:
        """The unit and, below it, its children, as text."""
        size = f"{self.share:6.1%}" if self.part is None else f"{self.part:4.0%}"
        own = f"{'  ' * indent}{size}  {self.layer}.{self.number:<3} {' '.join(self.words)}"
        return [own + ("" if self.alive else "  (unused)"), *(x for c in self.children for x in c.lines(indent + 2))]


def hierarchy(
    weights: Sequence[Real[np.ndarray, "_ _"]],
    vocabulary: Sequence[str],
    shares: Sequence[Real[np.ndarray, " _"]],
    frequencies: Float[np.ndarray, " words"] | None = None,
    *,
    words: int = 8,
    children: int = 4,
    top: int | None = None,
) -> list[list[Topic]]:
    """Every layer's units, the largest share first, each with its words and the tree of what it is made of.

    Args:
        weights: w0 (words, topics), w1 (topics, super-topics), ...: as they act in the rates.
        vocabulary: the words.
        shares: of the units of each layer; see `unit_shares`.
        frequencies: of the words in the corpus: words, and children by their parts, are ranked by relevance; without them by
            probability.
        words: per unit.
        children: per super-topic, at most.
        top: units per layer, at most; all if None.

    Raises:
        CorpusError: sizes that do not fit.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.show import as_text, hierarchy
        >>> w0 = np.array([[4.0, 0.1], [3.0, 0.1], [0.1, 2.0], [0.1, 1.0]])
        >>> weights, shares = [w0, np.array([[3.0], [1.0]])], [np.array([0.8, 0.2]), np.array([1.0])]
        >>> layers = hierarchy(weights, ["cat", "dog", "sea", "sky"], shares, words=2)
        >>> print(as_text(layers[1]))
        100.0%  2.0   cat dog
             75%  1.0   cat dog
             25%  1.1   sea sky
    """
    _check(weights, vocabulary, shares)
    ranked = [rank_words(np.asarray(t), frequencies, words) for t in mixed_words(weights)]
    made_of = [None, *(composition(np.asarray(w)) for w in weights[1:])]

    def unit(layer: int, number: int, part: float | None = None) -> Topic:
        share = float(shares[layer][number])
        inner: tuple[Topic, ...] = ()
        parts = made_of[layer]
        if parts is not None:
            own = parts[:, number]
            usual = 1.0 if frequencies is None else np.maximum(parts.mean(axis=1), 1e-300) ** (1 - BLEND)
            order = [int(k) for k in np.argsort(-own / usual, kind="stable")[:children] if own[k] > NEGLIGIBLE]
            inner = tuple(unit(layer - 1, k, float(own[k])) for k in order)
        best = tuple(vocabulary[v] for v in ranked[layer][number])
        return Topic(layer + 1, number, share, share > LEAST / len(shares[layer]), best, inner, part)

    found = []
    for layer, share in enumerate(shares):
        order = np.argsort(-np.asarray(share), kind="stable")[:top]
        found.append([unit(layer, int(k)) for k in order])
    return found


def _check(
    weights: Sequence[Real[np.ndarray, "_ _"]], vocabulary: Sequence[str], shares: Sequence[Real[np.ndarray, " _"]]
) -> None:
    sizes = [np.shape(w) for w in weights]
    fits = all(lower[1] == upper[0] for lower, upper in itertools.pairwise(sizes))
    if not fits or not sizes or sizes[0][0] != len(vocabulary) or [len(s) for s in shares] != [s[1] for s in sizes]:
        found = f"weights {sizes}, {len(vocabulary)} words and shares of {[len(s) for s in shares]} units"
        cure = "pass the weights of all layers from the words up, and one share per unit"
        raise CorpusError(message("the hierarchy of topics", found, "sizes that belong together", cure))


def as_text(topics: Sequence[Topic]) -> str:
    """Units of one layer as lines: share, layer.number, words; the children below, with their part of the parent."""
    return "\n".join(line for t in topics for line in t.lines())


def mixed_words(weights: Sequence[Real[np.ndarray, "_ _"]]) -> list[Float64[np.ndarray, "units words"]]:
    """Rates of the words of each unit of each layer: a super-topic's are those of its children, by their parts."""
    found = [np.asarray(weights[0], np.float64).T]
    for w in weights[1:]:
        found.append(composition(np.asarray(w)).T @ found[-1])
    return found


def composition(weights: Real[np.ndarray, "children parents"]) -> Float64[np.ndarray, "children parents"]:
    """Parts of the children in each parent, which add up to 1; negative weights (of Bernoulli layers) count as none.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.show import composition
        >>> composition(np.array([[3.0, -1.0], [1.0, 2.0]]))
        array([[0.75, 0.  ],
               [0.25, 1.  ]])
    """
    positive = np.maximum(np.asarray(weights, np.float64), 0)
    total = positive.sum(axis=0)
    return positive / np.where(total > 0, total, 1.0)


def rank_words(
    topics: Float[np.ndarray, "units words"], frequencies: Float[np.ndarray, " words"] | None = None, top: int = 8
) -> Int64[np.ndarray, "units top"]:
    """The top words of each unit: by probability, or, with the corpus' frequencies p(w), by relevance.

    relevance(w, k) = b log p(w|k) + (1 - b) log(p(w|k) / p(w)), b = 0.6: it puts words that are common everywhere back.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.show import rank_words
        >>> topics = np.array([[0.5, 0.3, 0.2]])
        >>> rank_words(topics, top=2), rank_words(topics, np.array([0.9, 0.05, 0.05]), top=2)
        (array([[0, 1]]), array([[1, 2]]))

    Source: Sievert and Shirley (2014), LDAvis, section 3.
    """
    rates = np.asarray(topics, np.float64)
    score = np.log(np.maximum(rates / np.maximum(rates.sum(axis=1, keepdims=True), 1e-300), 1e-300))
    if frequencies is not None:
        score = score - (1 - BLEND) * np.log(np.maximum(frequencies, 1e-300))
    return np.argsort(-score, axis=1, kind="stable")[:, : min(top, rates.shape[1])].astype(np.int64)


def unit_shares(
    weights: Sequence[Real[np.ndarray, "_ _"]], means: Sequence[Real[np.ndarray, " _"]]
) -> list[Float64[np.ndarray, " units"]]:
    """Share of each unit in the tokens that its layer is expected to make, one array per layer.

    share_lk ∝ E[z_lk] t_lk, where t_1k = Σ_v w0_vk is the tokens that one count of a topic makes, and t_lk = Σ_j w_jk t_jk
    those of a super-topic, through its children. Layers whose weights have either sign (Bernoulli) count E[z] alone.

    Args:
        weights: w0 (words, topics), w1 (topics, super-topics), ...
        means: E[z] of every unit, on average over documents, one array per layer.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.show import unit_shares
        >>> unit_shares([np.array([[1.0, 1.0], [0.0, 2.0]])], [np.array([3.0, 1.0])])
        [array([0.5, 0.5])]
    """
    found, tokens = [], np.ones(np.shape(weights[0])[0])
    for w, mean in zip(weights, means, strict=True):
        signed = np.min(w, initial=0) < 0
        tokens = np.ones(np.shape(w)[1]) if signed else np.asarray(w, np.float64).T @ tokens
        used = np.asarray(mean, np.float64) * tokens
        total = used.sum()
        found.append(used / total if total > 0 else np.full(len(used), 1 / len(used)))
    return found


def alive(shares: Real[np.ndarray, " units"]) -> int:
    """How many units have more than a hundredth of an equal share.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.show import alive
        >>> alive(np.array([0.6, 0.4, 0.0]))
        2
    """
    return int(np.sum(np.asarray(shares) > LEAST / len(shares)))
