"""`DeepExponentialFamily`: scikit-learn's contract, files, streams, and topics that are known."""

from __future__ import annotations

import inspect
import pickle
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import linear_sum_assignment
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.utils._testing import SkipTest
from sklearn.utils.estimator_checks import estimator_checks_generator

import hivi
from hivi._families.amortised import Amortised
from hivi.cli import topics as cli_topics
from hivi.topics.base import Corpus
from hivi.topics.estimator import DeepExponentialFamily
from hivi.topics.heldout import hold_out_tokens
from hivi.topics.model import Priors
from hivi.topics.passes import levelled_off

# Every shape of data compiles its own programs, in seconds: the tests share one corpus, and most of them one model. A network
# compiles for twice as long: the default family has tests of its own here, and all of those of the command line.
TOPICS = np.kron(np.eye(5), np.full((1, 8), 1 / 8))
SMALL = {"layers": (5, 2), "family": "mean-field", "passes": 60, "warm_up": 30, "transform_passes": 60}
TINY = {**SMALL, "passes": 2, "warm_up": 1, "transform_passes": 2}


def documents(number: int, seed: int = 0) -> sp.csr_array:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(5, 0.2), number)
    return sp.csr_array(rng.poisson(60 * shares @ TOPICS))


X = documents(300)


@pytest.fixture(scope="module")
def model() -> DeepExponentialFamily:
    return DeepExponentialFamily(**SMALL, random_state=0).fit(X)


@pytest.fixture(scope="module")
def latents(model: DeepExponentialFamily) -> np.ndarray:
    return model.transform(X)


def similarities(components: np.ndarray) -> np.ndarray:
    """Cosine of each true topic with the component that is matched to it."""
    a = components / np.linalg.norm(components, axis=1, keepdims=True)
    b = TOPICS / np.linalg.norm(TOPICS, axis=1, keepdims=True)
    rows, columns = linear_sum_assignment(-(a @ b.T))
    return (a @ b.T)[rows, columns]


# scikit-learn's own checks ------------------------------------------------------------------------------------------------

_ALONE = (
    "documents are inferred by Monte Carlo steps, with draws per minibatch and place in it: the same document in other company "
    "has slightly other latents (after four passes; less after more)"
)
EXPECTED_TO_FAIL = {
    "check_methods_sample_order_invariance": _ALONE,
    "check_methods_subset_invariance": _ALONE,
}
# These bring data of other shapes, each of which compiles for seconds: minutes in all.
SLOW = {
    "check_dict_unchanged",
    "check_dont_overwrite_parameters",
    "check_dtype_object",
    "check_estimator_sparse_array",
    "check_estimator_sparse_matrix",
    "check_estimator_sparse_tag",
    "check_estimators_dtypes",
    "check_estimators_fit_returns_self",
    "check_estimators_nan_inf",
    "check_estimators_overwrite_params",
    "check_estimators_pickle",
    "check_fit2d_1feature",
    "check_fit2d_1sample",
    "check_fit_check_is_fitted",
    "check_fit_idempotent",
    "check_f_contiguous_array_estimator",
    "check_fit_score_takes_y",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_n_features_in",
    "check_n_features_in_after_fitting",
    "check_pipeline_consistency",
    "check_readonly_memmap_input",
}


def sklearn_checks() -> list:
    out = []
    for family in ("mean-field", "amortised"):
        tiny = DeepExponentialFamily(layers=(3, 2), family=family, passes=4, warm_up=4, transform_passes=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of checks that are skipped before they start
            for estimator, check in estimator_checks_generator(tiny):
                name = getattr(check, "func", check).__name__
                memory = ", memory map" if getattr(check, "keywords", {}).get("readonly_memmap") else ""
                marks = [pytest.mark.slow] if name in SLOW or family == "amortised" else []
                if name in EXPECTED_TO_FAIL:
                    marks.append(pytest.mark.xfail(reason=EXPECTED_TO_FAIL[name], raises=AssertionError, strict=True))
                out.append(pytest.param(estimator, check, id=f"{name}{memory}, {family}", marks=marks))
    return out


@pytest.mark.parametrize(("estimator", "check"), sklearn_checks())
def test_scikit_learn(estimator, check):
    try:
        check(estimator)
    except SkipTest as reason:
        pytest.skip(str(reason))


# What it learns -----------------------------------------------------------------------------------------------------------


def test_finds_the_topics(model, latents):
    assert similarities(model.components_).min() > 0.95
    assert model.alive_.all()
    np.testing.assert_allclose(model.topic_shares_.sum(), 1)
    assert len(model.bound_history_) == model.n_iter_ == 60
    assert model.bound_history_[-10:].mean() > model.bound_history_[:10].mean()
    assert [w.shape for w in model.layer_components_] == [(5, 40), (2, 5)]
    assert latents.shape == (300, 5)
    expected = latents @ model.components_
    np.testing.assert_allclose(expected.sum(), X.sum(), rtol=0.1)


def test_empty_documents(model, latents):
    nothing = sp.csr_array((6, 40))
    found = model.transform(sp.vstack([nothing[:3], X, nothing[3:]], format="csr"))
    empty = np.concatenate([found[:3], found[-3:]])
    assert np.all(np.isfinite(found))
    assert 0 < empty.max() < 0.1 * latents.mean()
    again = found[3:-3]  # of the same documents, by other draws
    assert np.corrcoef(again.ravel(), latents.ravel())[0, 1] > 0.95
    with pytest.raises(hivi.HiviError, match="no words"):
        model.perplexity(nothing)
    with pytest.raises(ValueError, match="no words"):
        DeepExponentialFamily(**SMALL).fit(np.zeros((3, 4)))


def test_score_and_perplexity(model):
    shuffled = sp.csr_array(np.random.default_rng(0).permuted(X.toarray(), axis=1))
    assert model.score(X) > model.score(shuffled)
    np.testing.assert_allclose(model.perplexity(X), np.exp(-model.score(X) / X.sum()))
    observed, heldout = hold_out_tokens(X, 0.1)
    foreseen = model.completion_perplexity(observed, heldout)
    # The best possible: words by the true shares; here by those of the topics in the whole document.
    shares = X @ (TOPICS > 0).T / np.maximum(X.sum(axis=1), 1)[:, None]
    truth = (shares @ TOPICS)[heldout.nonzero()]
    best = np.exp(-(heldout.data * np.log(truth)).sum() / heldout.sum())
    assert best * 0.98 < foreseen < best * 1.15
    assert model.perplexity(X) > best  # in order: not smaller than the entropy of the words


def test_converged(model):
    """It says how the passes after the warm-up ended, and nothing of the warm-up."""
    assert model.converged_ == levelled_off(model.bound_history_[30:])
    assert not DeepExponentialFamily(**TINY, random_state=0).fit(X).converged_


def test_the_bound_has_levelled_off():
    noise = np.random.default_rng(1).normal(size=(200, 60))
    steady = np.linspace(-640.0, -600.0, 60)
    assert np.mean([levelled_off(x - 500.0) for x in noise]) > 0.98
    assert not any(levelled_off(x + steady) for x in noise), "a rise of two thirds of the noise per pass"
    late = np.where(np.arange(60) < 45, steady, steady[45])
    assert np.mean([levelled_off(x + late) for x in noise]) > 0.98, "the rise is over"
    assert levelled_off(steady[:16] * 0 - 5.0)
    assert not levelled_off(steady[:15] * 0 - 5.0), "too few passes to tell"
    assert levelled_off(-600.0 + 1e-5 * np.arange(60)), "without noise, and without worth"
    assert not levelled_off(np.append(steady * 0, np.nan))


def test_the_default_family_is_one():
    default = inspect.signature(DeepExponentialFamily).parameters["family"].default
    assert default == cli_topics.DEFAULT_FAMILY == inspect.signature(cli_topics.fit).parameters["family"].default
    assert isinstance(DeepExponentialFamily()._family(), Amortised)
    assert isinstance(DeepExponentialFamily(family=None)._family(), Amortised)
    assert DeepExponentialFamily(family="mean-field")._family() == hivi.MeanField()


def test_layers_of_latents(model, latents):
    first, second = model.latents(X)
    np.testing.assert_array_equal(first, latents)
    assert second.shape == (300, 2)


def test_random_state(model, latents):
    again = DeepExponentialFamily(**SMALL, random_state=0).fit(X)
    np.testing.assert_array_equal(again.transform(X), latents)
    one, two = (DeepExponentialFamily(**SMALL, random_state=np.random.RandomState(s)).fit(X) for s in (1, 2))
    assert not np.array_equal(one.components_, two.components_)
    state = np.random.get_state()  # noqa: NPY002  scikit-learn's None is this state
    try:
        np.random.seed(3)  # noqa: NPY002
        first = DeepExponentialFamily(**TINY).fit(X)
        np.random.seed(3)  # noqa: NPY002
        second = DeepExponentialFamily(**TINY).fit(X)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    np.testing.assert_array_equal(first.components_, second.components_)


@pytest.mark.slow
def test_partial_fit():
    stream = DeepExponentialFamily(
        **SMALL, random_state=0, total_documents=300
    )  # as those of `test_partial_fit_after_fit`
    rng = np.random.default_rng(0)
    parts = [X[:150][rng.permutation(150)] for _ in range(8)]  # of one shape
    scores = []
    for number, part in enumerate(parts):
        stream.partial_fit(part)
        if number in (0, 3, 7):
            scores.append(stream.score(X))
    assert scores[0] < scores[1] < scores[2]
    assert similarities(stream.components_).min() > 0.9
    assert stream.alive_.all()
    assert stream.n_iter_ == len(stream.bound_history_) == len(parts)


def test_partial_fit_after_fit(model):
    more = pickle.loads(pickle.dumps(model)).partial_fit(X[:150])
    assert similarities(more.components_).min() > 0.95
    np.testing.assert_allclose(more.components_, model.components_, rtol=0.5, atol=1.0)
    assert more.n_iter_ == model.n_iter_ + 1


# Data in, names out -------------------------------------------------------------------------------------------------------


def test_pipeline(tmp_path):
    """On texts with the counts of X, whose programs are compiled already."""
    names = np.array([f"w{v:02d}" for v in range(40)])
    texts = [" ".join(np.repeat(names, row)) for row in X.toarray()]
    pipeline = make_pipeline(CountVectorizer(), DeepExponentialFamily(**TINY, random_state=0))
    alone = DeepExponentialFamily(**TINY, random_state=0).fit_transform(X)
    np.testing.assert_array_equal(pipeline.fit_transform(texts), alone)
    assert list(pipeline.get_feature_names_out()) == [f"deepexponentialfamily{k}" for k in range(5)]
    words, last = pipeline[:-1].get_feature_names_out(), pipeline[-1]
    assert words.tolist() == names.tolist()
    assert last.vocabulary_ is None
    last.save(tmp_path, vocabulary=words)
    again = DeepExponentialFamily.load(tmp_path)
    assert again.vocabulary_ == tuple(words)
    with pytest.raises(hivi.CorpusError, match="knows its 40 words"):
        again.save(tmp_path, vocabulary=words)
    with pytest.raises(hivi.CorpusError, match="39 words; expected 40"):
        last.save(tmp_path, vocabulary=words[1:])


def test_names_of_words():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X.toarray(), columns=[f"w{v}" for v in range(40)])
    named = DeepExponentialFamily(**TINY, random_state=0).fit(frame)
    assert named.feature_names_in_[3] == "w3"
    assert named.vocabulary_[3] == "w3"
    with pytest.raises(ValueError, match="feature names"):
        named.transform(frame[frame.columns[::-1]])


def test_a_corpus_is_documents_too(model, tmp_path):
    corpus = Corpus.from_matrix(X, vocabulary=[f"w{v}" for v in range(40)])
    corpus.save(tmp_path)
    fitted = DeepExponentialFamily(**SMALL, random_state=0).fit(Corpus.open(tmp_path))
    np.testing.assert_array_equal(fitted.components_, model.components_)
    assert fitted.vocabulary_[39] == "w39"
    np.testing.assert_allclose(fitted.perplexity(corpus), model.perplexity(X))
    with pytest.raises(hivi.HiviError, match="39 words"):
        fitted.transform(Corpus.from_matrix(X[:, :39]))


def test_counts_are_left_alone(model, latents):
    some, (rows, columns) = X.tocoo(), np.nonzero(X.toarray() == 0)
    places = np.append(some.row, rows[:2]), np.append(some.col, columns[:2])
    given = sp.csr_matrix((np.append(some.data, [0, 0]), places), shape=X.shape)  # two stored zeros
    np.testing.assert_array_equal(model.transform(given), latents)
    assert given.nnz == X.nnz + 2


# Files --------------------------------------------------------------------------------------------------------------------


def test_pickle(model, latents):
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(X), latents)


def test_save_and_load(model, latents, tmp_path):
    model.save(tmp_path)
    again = DeepExponentialFamily.load(tmp_path)
    np.testing.assert_array_equal(again.transform(X), latents)
    np.testing.assert_array_equal(again.bound_history_, model.bound_history_)
    np.testing.assert_array_equal(again.topic_shares_, model.topic_shares_)
    assert again.get_params() == model.get_params()
    one, two = again.partial_fit(X[:150]), pickle.loads(pickle.dumps(model)).partial_fit(X[:150])
    np.testing.assert_array_equal(one.components_, two.components_)


@pytest.mark.parametrize("harm", ["cut", "missing", "other"])
def test_damaged_files(model, tmp_path, harm):
    model.save(tmp_path)
    (file,) = tmp_path.iterdir()
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes().replace(b"state/", b"skate/", 1))
    with pytest.raises(hivi.LoadError, match=file.name):
        DeepExponentialFamily.load(tmp_path)


@pytest.mark.slow
def test_the_default_family_learns_from_a_stream(tmp_path):
    stream = DeepExponentialFamily(**{**SMALL, "family": None, "transform_passes": None}, random_state=0)
    rng = np.random.default_rng(0)
    scores = [stream.partial_fit(X[:150][rng.permutation(150)]).score(X) for _ in range(8)]
    assert np.sum(np.diff(scores) > 0) >= 6  # of 7
    assert similarities(stream.components_).min() > 0.9
    assert stream.converged_ is None
    stream.save(tmp_path)
    np.testing.assert_array_equal(DeepExponentialFamily.load(tmp_path).transform(X), stream.transform(X))


@pytest.mark.slow  # two families, each of which compiles for long
def test_a_hierarchical_family(tmp_path):
    family = hivi.Hierarchical(prior=hivi.Flow(layers=2), auxiliary=hivi.InverseFlow(layers=2), shared=True, spread=0.1)
    given = {**TINY, "passes": 6, "warm_up": 2, "priors": Priors(level=0.2), "family": family}
    grown = DeepExponentialFamily(**given, random_state=0).fit(X)
    assert len(grown.bound_history_) == 6
    z = grown.transform(X)
    assert np.all(np.isfinite(z))
    grown.save(tmp_path)
    again = DeepExponentialFamily.load(tmp_path)
    np.testing.assert_array_equal(again.transform(X), z)
    assert again.priors == Priors(level=0.2)


# What it refuses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"layers": (3, 0)}, "layers"),
        ({"layers": 5}, "layers"),
        ({"family": "full-rank"}, "mean-field"),
        ({"passes": 0}, "passes"),
        ({"warm_up": -1}, "warm_up"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 0.5}, "batch_size"),
        ({"passes": "10"}, "passes"),
        ({"warm_up": None}, "warm_up"),
        ({"family": "hierarchy"}, "did you mean 'hierarchical'"),
        ({"transform_passes": 1.5}, "transform_passes"),
        ({"total_documents": None}, "total_documents"),
        ({"priors": {"level": 0.3}}, "priors"),
    ],
)
def test_refuses(parameters, says):
    with pytest.raises(hivi.HiviError, match=says):
        DeepExponentialFamily(**parameters).fit(X)


def test_refuses_negative_counts(model):
    with pytest.raises(ValueError, match="Negative values"):
        DeepExponentialFamily(**SMALL).fit(-X)
    with pytest.raises(ValueError, match="40 features"):
        model.transform(X[:, :39])


@pytest.mark.parametrize(
    "texts", [["a cat", "a dog"], np.array(["a cat", "a dog"]), [b"a cat"], [["a", "cat"], ["dog"]]]
)
def test_refuses_texts(texts):
    with pytest.raises(TypeError, match=r"found texts; .*CountVectorizer"):
        DeepExponentialFamily(**SMALL).fit(texts)


def test_refuses_a_corpus_of_other_words():
    words = [f"w{v}" for v in range(X.shape[1])]
    model = DeepExponentialFamily(**TINY).fit(Corpus.from_matrix(X, words))
    with pytest.raises(hivi.CorpusError, match="found 'v0' as word 1 of its vocabulary; expected 'w0'"):
        model.transform(Corpus.from_matrix(X, ["v0", *words[1:]]))
