"""Deep exponential families as a scikit-learn estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import gammaln
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data

from hivi._curvature import Curvature
from hivi._errors import CorpusError, FamilyError, TargetError, message, nearest, require_count, require_positive
from hivi._families.base import AbstractFamily
from hivi._families.mean_field import MeanField
from hivi._fit.progress import plain_lines
from hivi._tree import Key
from hivi.topics.base import Corpus, as_counts, check_same_words
from hivi.topics.batches import Counts
from hivi.topics.coherence import liveness
from hivi.topics.document_curvature import document_curvature
from hivi.topics.fitting import amortised, hierarchical
from hivi.topics.heldout import perplexity
from hivi.topics.inference import Inference
from hivi.topics.model import Architecture, Priors
from hivi.topics.passes import Watch, levelled_off, watching
from hivi.topics.scoring import predictive
from hivi.topics.storage import load_model, save_model
from hivi.topics.trained import Trained, absorb, blank, infer, latents, learn, mean_latents, without_documents

OVERFLOW, BLOCK = 700.0, 4096
NUMBERS = [np.float64, np.float32, np.int64, np.int32]
FAMILY = "amortised"
"""Of a document's latents, unless another is asked for."""
PREDEFINED: dict[str, Callable[[Architecture], AbstractFamily]] = {
    "mean-field": lambda _: MeanField(),
    "hierarchical": lambda _: hierarchical(),
    "amortised": amortised,
}

OWN = "DeepExponentialFamily"
"""Name of the class in its errors."""


class DeepExponentialFamily(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Topics, and topics of topics: a deep exponential family, fitted by variational inference.

    x_dv ~ Poisson(Σ_k z1_dk w0_vk + floor_v), z1_dj ~ Poisson(Σ_k z2_dk w1_jk + floor), ..., Gamma weights. Each document has
    its own counts z of every topic, super-topic and so on.

    Args:
        layers: number of topics, of super-topics, ...: from the words up.
        latent: "poisson", "bernoulli" (sigmoid belief network) or "gamma".
        observations: "poisson" counts of words, or "bernoulli" for whether a word occurs.
        weights: "gamma", or "normal" through a softplus.
        family: variational family of a document's latents: "amortised" (or None), an inference network, which gives the best
            perplexities; "mean-field", parameters per document, which compiles in half of the time; "hierarchical"; or
            `hivi.MeanField()` or a `hivi.Hierarchical(..., shared=True)`, which grows from a mean-field fit.
        priors: hyperparameters, `hivi.topics.Priors`; its defaults if None.
        passes: passes over the documents in `fit`, warm-up included.
        warm_up: passes at the start with point estimates of the weights; at most half of `passes`.
        batch_size: documents per minibatch, at most.
        transform_passes: gradient steps per document, for documents that are not part of `fit`; 60 if None, also from where
            an inference network starts them. Without a network as many small ones follow, but in `partial_fit`.
        total_documents: size of the corpus of which `partial_fit` sees parts. After `fit` it is that of its documents.
        random_state: an int, a `numpy.random.RandomState`, or None for NumPy's global one, as everywhere in scikit-learn: with
            None, `numpy.random.seed` makes results repeat. It is read in `fit` (and at the first `partial_fit`) alone: what
            a fitted model makes of the same X is always the same.
        verbose: 1 shows the progress of `fit` on standard error.

    Attributes:
        components_: rates of the words of each topic, E[w0] transposed, (layers[0], words).
        layer_components_: weights of every layer, (parents, children); the first is `components_`.
        topic_shares_: share of each topic in the tokens that topics are expected to make; after `partial_fit`, in its documents.
        alive_: topics with more than a hundredth of an equal share.
        layer_means_: mean of each unit of every layer over the documents.
        bound_history_: the bound at every pass, in nats: the mean over its minibatches. In the warm-up without the entropy of
            weights; after `partial_fit`, for all `total_documents`.
        converged_: whether the bound had levelled off at the end of `fit`, see `hivi.topics.passes.levelled_off`; if not, more
            passes would help. None after `partial_fit`, where every part has its own bound.
        n_iter_: passes over the data so far.
        n_features_in_: number of words.
        feature_names_in_: the words, where X is a data frame.
        vocabulary_: the words, where X is a data frame or a `Corpus` that knows them; else None.

    Raises:
        TargetError: parameters of no use.
        FamilyError: no such family.

    Example:
        >>> import numpy as np
        >>> from hivi.topics.estimator import DeepExponentialFamily
        >>> X = np.kron(np.eye(2, dtype=int), np.full((20, 4), 3))  # two kinds of documents
        >>> model = DeepExponentialFamily(layers=(2,), passes=40, warm_up=0, random_state=0).fit(X)
        >>> model.components_.shape, model.transform(X[:3]).shape
        ((2, 8), (3, 2))

    Source: Ranganath, Tang, Charlin and Blei (2015), Deep Exponential Families.
    """

    # Of any type, since scikit-learn wants no checks before `fit`, which makes them.
    def __init__(
        self,
        layers: Any = (100, 30, 15),
        *,
        latent: Any = "poisson",
        observations: Any = "poisson",
        weights: Any = "gamma",
        family: Any = FAMILY,
        priors: Any = None,
        passes: Any = 120,
        warm_up: Any = 60,
        batch_size: Any = 180,
        transform_passes: Any = None,
        total_documents: Any = 1e6,
        random_state: Any = None,
        verbose: Any = 0,
    ):
        self.layers = layers
        self.latent = latent
        self.observations = observations
        self.weights = weights
        self.family = family
        self.priors = priors
        self.passes = passes
        self.warm_up = warm_up
        self.batch_size = batch_size
        self.transform_passes = transform_passes
        self.total_documents = total_documents
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None, *, watch: Watch | None = None) -> DeepExponentialFamily:
        """Fit to documents.

        Args:
            X: counts of words, (documents, words): sparse or dense, from 0, fractions allowed; or a `Corpus`, which may be on
                disk.
            y: ignored.
            watch: called after every few steps with (passes done, bound in nats), instead of what `verbose` shows.

        Returns:
            The estimator itself.
        """
        architecture, family = self._architecture(), self._family()
        documents = self._documents(X, "fit", reset=True)
        _some_words(documents)
        seed, warm_up = self._seed(), min(self.warm_up, self.passes // 2)
        shown = bool(self.verbose) and watch is None
        with plain_lines(), watching("topics", self.passes, documents.n_tokens, shown) as progress:
            fit = learn(
                documents, architecture, family, seed=seed, passes=self.passes, warm_up=warm_up,
                batch=self.batch_size, watch=progress if watch is None else watch,
            )  # fmt: skip
        self._set(without_documents(fit, documents.n_documents, seed), mean_latents(fit, seed))
        self.bound_history_ = np.nanmean(fit.elbo.reshape(self.passes, -1), axis=1)
        self.converged_: bool | None = levelled_off(self.bound_history_[warm_up:])
        return self

    def partial_fit(self, X: Any, y: Any = None) -> DeepExponentialFamily:
        """Go on with a part of a stream of documents; each is met once.

        The first part gives the scale of everything: word frequencies and the mean length of documents; several hundred
        documents are a good size. For each minibatch the documents' own parameters are fitted in `transform_passes`
        gradient steps; then the weights take one conjugate step, the smaller the later.

        Args:
            X: as in `fit`, with the same words.
            y: ignored.

        Returns:
            The estimator itself.
        """
        first = not hasattr(self, "_trained")
        architecture, family = self._architecture(), self._family()
        documents = self._documents(X, "partial_fit", reset=first)
        if first:
            _some_words(documents)
            total = max(int(self.total_documents), 1)
            trained = blank(documents, architecture, family, seed=self._seed(), total=total)
            history = np.zeros(0)
        else:
            trained, history = self._trained, self.bound_history_
        moved, bound, means = absorb(trained, documents, batch=self.batch_size, passes=self.transform_passes)
        self._set(moved, means)
        self.bound_history_, self.converged_ = np.append(history, bound), None
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Topics of documents: E[z1 | x], (documents, layers[0]); an empty document has about the prior's.

        A document's parameters are fitted with noise that its place in X decides: among other documents the answer may differ by
        some tenths. `transform_passes=0`, the inference network's own answer, depends on the document alone.
        """
        check_is_fitted(self)
        documents = self._documents(X, "transform")
        found = self._latents(documents)[0]
        return found if getattr(X, "dtype", None) == np.float32 else found.astype(np.float64)

    def latents(self, X: Any) -> list[np.ndarray]:
        """Posterior means of all layers, (documents, units) each; the first is what `transform` returns."""
        check_is_fitted(self)
        return [np.asarray(z, np.float64) for z in self._latents(self._documents(X, "latents"))]

    def score(self, X: Any, y: Any = None) -> float:
        """Bound on the log-likelihood of documents, in nats, summed over them; higher is better.

        As in scikit-learn's `LatentDirichletAllocation` it is that of tokens in their order: of log p(x), the likelihood of
        counts, less log(n_d! / Π_v x_dv!), in how many orders the n_d tokens of a document can stand; with Bernoulli observations
        of log p(x) itself. Under q of the weights as they are: what these cost is not in it.
        """
        check_is_fitted(self)
        return self._score(self._documents(X, "score"))

    def perplexity(self, X: Any) -> float:
        """exp(-score / tokens), lower is better; comparable with `LatentDirichletAllocation.perplexity`, also a bound.

        Documents are seen whole; `completion_perplexity` is the fairer test. Bernoulli observations: per different word.

        Raises:
            CorpusError: X has no tokens.
        """
        check_is_fitted(self)
        documents = self._documents(X, "perplexity")
        counted = self._trained.architecture.observations == "poisson"
        tokens = float(documents.counts.sum()) if counted else float(documents.indptr[-1])
        _some_words(documents)
        return math.exp(min(-self._score(documents) / tokens, OVERFLOW))

    def _score(self, documents: Corpus | Counts) -> float:
        bound = float(self._infer(documents).bound.sum())
        if self._trained.architecture.observations == "bernoulli":
            return bound
        lengths, orders = np.zeros(documents.n_documents), 0.0
        for start in range(0, documents.n_documents, BLOCK):
            ids = np.arange(start, min(start + BLOCK, documents.n_documents))
            rows = documents.rows(ids)
            lengths[ids] = rows.sum(axis=1)
            orders -= float(gammaln(rows.data + 1.0).sum())
        return bound - orders - float(gammaln(lengths + 1.0).sum())

    def completion_perplexity(self, observed: Any, heldout: Any) -> float:
        """Perplexity of held-out tokens of documents, of which the observed ones are known; lower is better.

        p(w|d) ∝ Σ_k E[z1_dk] E[w0_wk] + floor_w, over the whole vocabulary.

        Args:
            observed: counts, as X elsewhere; see `hivi.topics.hold_out_tokens`.
            heldout: counts of the same documents.
        """
        check_is_fitted(self)
        mixture, topics = predictive(self._trained.fit, self._infer(self._documents(observed, "completion_perplexity")))
        return perplexity(mixture, topics, heldout.to_csr() if isinstance(heldout, Corpus) else heldout)

    def curvature(self, X: Any, *, key: Key, samples: int = 2048, top: int = 3) -> Curvature:
        """Would a hierarchy help these documents? `hivi.curvature`, document by document, at their mean-field optimum.

        Args:
            X: counts of some documents, as in `fit`: 64 or so, memory grows with documents times samples.
            key: a JAX random key.
            samples: draws; with fewer, small directions are taken for noise.
            top: directions per document.

        Raises:
            FitError: Gamma latents, or a model that was not fitted with `family="mean-field"`.
        """
        check_is_fitted(self)
        documents = self._documents(X, "curvature")
        rows = documents.to_csr() if isinstance(documents, Corpus) else documents.counts
        return document_curvature(self._trained, rows, key=key, samples=samples, top=top)

    def save(self, folder: str | Path, vocabulary: Iterable[str] | None = None) -> None:
        """Write the fitted model to a folder, without pickle; see `DeepExponentialFamily.load`, and `hivi topics show`.

        A `random_state` that is no int is not saved.

        Args:
            folder: where.
            vocabulary: the words, for a model that was fitted without them, such as the last step of a pipeline.

        Raises:
            CorpusError: more or fewer words than the model has columns, or it knows its words.
        """
        check_is_fitted(self)
        save_model(self, folder, vocabulary)

    @classmethod
    def load(cls, folder: str | Path) -> DeepExponentialFamily:
        """A model that `save` wrote.

        Raises:
            LoadError: no such model, or a damaged one.
        """
        return load_model(folder, cls)

    @property
    def _n_features_out(self) -> int:
        return int(self.components_.shape[0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_trained")

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _architecture(self) -> Architecture:
        for name, least in (("passes", 1), ("batch_size", 1), ("warm_up", 0), ("transform_passes", 0)):
            value = getattr(self, name)
            if value is not None or name != "transform_passes":
                require_count(f"{OWN}({name}=...)", value, "correct the number", least, TargetError)
        require_positive(f"{OWN}(total_documents=...)", self.total_documents, error=TargetError)
        if not isinstance(self.priors, Priors | None):
            found, expected = repr(self.priors), "a hivi.topics.Priors, or None"
            raise TargetError(message(f"{OWN}(priors=...)", found, expected, "pass one"))
        if not isinstance(self.layers, Sequence | np.ndarray):
            found, cure = repr(self.layers), "pass (100,) for one layer"
            raise TargetError(message(f"{OWN}(layers=...)", found, "a sequence of integers", cure))
        layers = tuple(int(k) if isinstance(k, np.integer) else k for k in self.layers)
        priors = Priors() if self.priors is None else self.priors
        return Architecture(layers, self.latent, self.observations, self.weights, priors)

    def _family(self) -> AbstractFamily:
        chosen = FAMILY if self.family is None else self.family
        if isinstance(chosen, AbstractFamily):
            return chosen
        if isinstance(chosen, str) and chosen in PREDEFINED:
            return PREDEFINED[chosen](self._architecture())
        expected = f"None, one of {list(PREDEFINED)}, or a family"
        cure = nearest(str(chosen), PREDEFINED, "pass hivi.MeanField(), or hivi.Hierarchical(..., shared=True)")
        raise FamilyError(message(f"{OWN}(family=...)", repr(chosen), expected, cure))

    def _documents(self, X: Any, method: str, *, reset: bool = False) -> Corpus | Counts:
        """What scikit-learn accepts, or a corpus, as documents; checked."""
        if isinstance(X, Corpus):
            return self._corpus(X, reset)
        if _texts(X):
            cure = "count their words first, by sklearn.feature_extraction.text.CountVectorizer"
            raise TypeError(message(f"{OWN}.{method}(X)", "texts", "counts of words, (documents, words)", cure))
        X = validate_data(self, X, reset=reset, accept_sparse="csr", dtype=NUMBERS)
        check_non_negative(X, f"{type(self).__name__}.{method}")
        if reset:
            names = getattr(self, "feature_names_in_", None)
            self.vocabulary_ = None if names is None else tuple(map(str, names))
        return Counts(as_counts(X))

    def _corpus(self, corpus: Corpus, reset: bool) -> Corpus:
        if reset:
            self.n_features_in_, self.vocabulary_ = corpus.n_words, corpus.vocabulary
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        elif corpus.n_words != self.n_features_in_:
            expected = f"{self.n_features_in_}, as in the corpus of the fit"
            cure = "count words by the vocabulary that the model was fitted with"
            raise CorpusError(message(f"corpus {corpus.name!r}", f"{corpus.n_words} words", expected, cure))
        elif self.vocabulary_ is not None and corpus.vocabulary is not None:
            check_same_words(f"corpus {corpus.name!r}", corpus.vocabulary, self.vocabulary_, "the corpus of the fit")
        return corpus

    def _infer(self, documents: Corpus | Counts) -> Inference:
        return infer(self._trained, documents, passes=self.transform_passes)

    def _latents(self, documents: Corpus | Counts) -> list[np.ndarray]:
        return latents(self._trained, documents, passes=self.transform_passes)

    def _set(self, trained: Trained, means: list[np.ndarray]) -> None:
        """The fitted attributes."""
        self._trained, self.layer_means_ = trained, means
        fit = trained.fit
        weights = [np.asarray(fit.weights(layer).T, np.float64) for layer in range(trained.architecture.depth)]
        self.components_, self.layer_components_ = weights[0], weights
        used = liveness(means[0][None], self.components_)
        self.topic_shares_, self.alive_ = used.share, used.alive
        self.n_iter_ = trained.passes


def _texts(X: Any) -> bool:
    """Whether X is a sequence of texts, or of lists of words."""
    rows = getattr(X, "to_numpy", lambda: X)() if getattr(X, "ndim", 0) == 1 else X  # a pandas Series
    first = next(iter(rows), None) if isinstance(rows, list | tuple | np.ndarray) else None
    words = first[:1] if isinstance(first, list | tuple) else [first]
    return any(isinstance(w, str | bytes) for w in words)


def _some_words(documents: Corpus | Counts) -> None:
    if not documents.indptr[-1]:
        raise CorpusError(message("X", "no words", "at least one document with a word", "check the counts"))
