"""Deep exponential families (Ranganath et al. 2015) as targets: local layers per document, global weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hivi._errors import TargetError, message
from hivi._factored import factorise
from hivi._target.base import Target
from hivi.topics.architecture import PLATE, Architecture, Latent, Observations, Priors, Weights, w_name, z_name
from hivi.topics.base import Corpus
from hivi.topics.batches import CorpusSource, Documents
from hivi.topics.terms import Features, Terms, background

BATCH = 180
"""Documents per minibatch."""
BLOCK = 4096


def deep_exponential_family(corpus: Corpus, architecture: Architecture | None = None, *, batch: int = BATCH) -> Target:
    """The log-joint of a deep exponential family over a corpus, as a streamed target of the engine.

    With rates `eta_l = floor + w_l z_(l+1)`: x ~ Poisson(eta_0), z_l ~ Poisson(eta_l) (or Bernoulli(sigmoid(eta_l)), or
    Gamma with mean eta_l), the top layer with a fixed rate; w ~ Gamma, or softplus(w) with w ~ Normal. The sites are z1,
    z2, ... of shape (documents, units) and w0, w1, ... of shape (children, parents).

    Args:
        corpus: the documents.
        architecture: layers, kinds and priors; three Poisson layers if None.
        batch: documents per minibatch.

    Returns:
        A target for `hivi.fit`.

    Raises:
        TargetError: an empty corpus or a layer that is no positive number.

    Source: Ranganath, Tang, Charlin & Blei (2015), Deep Exponential Families, eq. 1-4.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.base import Corpus
        >>> from hivi.topics.model import Architecture, deep_exponential_family
        >>> corpus = Corpus.from_matrix(np.array([[2, 0, 1], [0, 3, 0]]))
        >>> target = deep_exponential_family(corpus, Architecture(layers=(4, 2)))
        >>> [s.name for s in target.sites]
        ['z1', 'z2', 'w0', 'w1']
    """
    architecture = Architecture() if architecture is None else architecture
    if corpus.n_documents == 0 or corpus.n_tokens == 0:
        raise TargetError(message("corpus", "no words", "at least one document with a word", "check the file"))
    source = CorpusSource(corpus, min(batch, corpus.n_documents), architecture.observations)
    return build_target(architecture, source, corpus_statistics(corpus, architecture.observations))


def corpus_statistics(corpus: Documents, kind: Observations) -> dict[str, np.ndarray]:
    """Smoothed word frequencies and mean document length: what priors and starts are scaled by."""
    totals = np.zeros(corpus.n_words)
    for start in range(0, corpus.n_documents, BLOCK):
        found = corpus.rows(np.arange(start, min(start + BLOCK, corpus.n_documents)))
        weights = None if kind == "bernoulli" else found.data
        totals += np.bincount(found.indices, weights, minlength=corpus.n_words)
    frequencies = (totals + 0.5) / (totals.sum() + 0.5 * corpus.n_words)
    return {
        "frequencies": frequencies.astype(np.float32),
        "length": np.asarray(max(totals.sum() / corpus.n_documents, 1e-3), np.float32),
    }


def build_target(architecture: Architecture, source: CorpusSource, statistics: dict[str, np.ndarray]) -> Target:
    """The target of documents from a source; `statistics` are those of the training corpus, also for new documents."""
    sites = architecture.sites(source.corpus.n_words, source.plate)
    fixed = {name: jnp.asarray(value) for name, value in statistics.items()}
    data = {"rows": jax.tree.map(lambda a: jnp.asarray(a[0]), source.load(source.blocks()[:1])), "fixed": fixed}
    model = Terms(architecture)
    examples = {s.name: s.example() for s in sites}
    rows = {PLATE: jnp.arange(source.plate.batch)}
    local = dict.fromkeys(model.local_terms(), source.plate.scale)
    factored = factorise(
        model.terms,
        examples,
        data,
        rows,
        scales=local,
        overrides=model.overrides(source.plate.scale),
        declared=model.declared(),
    )
    closed = tuple(w_name(k) for k in range(architecture.depth) if model.closed(k))
    return Target(
        "deep exponential family", sites, factored, data, (source.plate,), source=source, closed=closed, views=model.views(),
        averaged=model.averaged(), starts=model.starts(fixed), features=Features(model),
    )  # fmt: skip


__all__ = [
    "BATCH", "Architecture", "Latent", "Priors", "Weights", "background", "build_target", "corpus_statistics",
    "deep_exponential_family", "w_name", "z_name",
]  # fmt: skip
