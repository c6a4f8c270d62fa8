"""`hivi topics` and `hivi reproduce def`: what they write and print, what they refuse, and the parts that they are made of."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from typer.testing import CliRunner, Result

from cases import quick as quickly
from hivi._errors import CorpusError, FitError, LoadError
from hivi._estimators.surrogate import terms_by_view, viewed_terms
from hivi._families.mean_field import MeanField
from hivi._fit.progress import plain_lines
from hivi.cli.common import NOT_CONVERGED
from hivi.cli.main import app
from hivi.reproduce.deep_exponential import QUICK, quick, verdict
from hivi.reproduce.topic_rows import Clock, Pair, Plan, Row, cut_documents
from hivi.topics import document_curvature as document_curvature_module
from hivi.topics.base import Corpus
from hivi.topics.batches import CorpusSource, Counts
from hivi.topics.document_curvature import at_views, document_curvature
from hivi.topics.estimator import DeepExponentialFamily
from hivi.topics.fitting import hierarchical, proposal_for
from hivi.topics.heldout import Scores, make_split
from hivi.topics.inference import Inference
from hivi.topics.model import Architecture, build_target, corpus_statistics
from hivi.topics.passes import watching
from hivi.topics.provenance import Provenance, provenance, signatures
from hivi.topics.scoring import HeldOut, hold_out
from hivi.topics.show import alive, as_text, composition, hierarchy, rank_words, unit_shares

DOCUMENTS, WORDS = 60, 40
VOCABULARY = tuple(f"word{v:02d}" for v in range(WORDS))


def hivi_command(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


def last_json(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def counts(seed: int = 0, documents: int = DOCUMENTS) -> np.ndarray:
    """Documents of four kinds."""
    rng = np.random.default_rng(seed)
    topics = np.random.default_rng(0).gamma(0.1, 10, (4, WORDS))
    return rng.poisson(0.5 * rng.gamma(0.3, 1 / 0.3, (documents, 4)) @ topics + 0.05)


def write_uci(path: Path, table: np.ndarray) -> Path:
    d, w = np.nonzero(table)
    lines = [f"{i + 1} {v + 1} {table[i, v]}" for i, v in zip(d, w, strict=True)]
    path.write_text("\n".join([*map(str, table.shape), str(len(d)), *lines]) + "\n")
    return path


class Trained(NamedTuple):
    result: Result
    run: Path
    corpus: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model of one layer after two passes; mean-field compiles in half of the time."""
    folder = tmp_path_factory.mktemp("topics")
    corpus = write_uci(folder / "docword.tiny.txt", counts())
    (folder / "vocab.tiny.txt").write_text("\n".join(VOCABULARY))
    options = (
        "--layers",
        "4",
        "--family",
        "mean-field",
        "--passes",
        2,
        "--warm-up",
        0,
        "--out",
        folder / "run",
        "--json",
    )
    return Trained(hivi_command("topics", "fit", corpus, *options), folder / "run", corpus)


# Commands


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = hivi_command(
        "topics", "fit", trained.corpus, "--layers", 4, "--passes", 10_000, "--out", tmp_path / "file" / "run"
    )
    assert result.exit_code == 1
    assert "NotADirectoryError" in result.stderr
    assert "name another" in result.stderr


def test_fit_says_what_it_did(trained: Trained) -> None:
    assert trained.result.exit_code == NOT_CONVERGED, trained.result.output  # two passes say nothing about how they end
    assert "not converged" in trained.result.stderr
    found = last_json(trained.result)
    assert found["converged"] is False
    assert found["documents"] == 54
    assert found["held_out"] == 6
    assert found["layers"] == [4]
    assert 1 <= found["alive"][0] <= 4
    assert found["passes"] == 2
    assert found["bound"] < 0
    assert found["tokens_per_second"] > 0
    for text in ("6 kept out", "units in use", "tokens/s", f"hivi topics show {trained.run}"):
        assert text in trained.result.stderr
    assert f"hivi topics evaluate {trained.run} {trained.corpus}" in trained.result.stderr


def test_a_fit_that_has_levelled_off_ends_with_0(trained: Trained, tmp_path: Path) -> None:
    options = ("--layers", "4", "--passes", 60, "--warm-up", 10, "--out", tmp_path, "--json")
    result = hivi_command("topics", "fit", trained.corpus, *options)  # of the default family
    assert result.exit_code == 0, result.output
    assert last_json(result)["converged"] is True
    assert "not converged" not in result.stderr
    assert DeepExponentialFamily.load(tmp_path).converged_ is True


def test_evaluate_on_its_own_corpus_uses_the_documents_kept_out(trained: Trained) -> None:
    result = hivi_command("topics", "evaluate", trained.run, trained.corpus, "--passes", 2, "--peers", "--json")
    assert result.exit_code == 0, result.output
    found = last_json(result)
    split = make_split(Corpus.from_matrix(counts()))
    assert found["documents"] == 6
    assert "kept out of training (share 0.1, seed 0)" in found["test"]
    assert found["observed_tokens"] == split.observed.sum()
    assert found["held_out_tokens"] == split.heldout.sum()
    assert [m["model"] for m in found["models"][1:]] == ["unigram", "LDA, 4 topics", "NMF, 4 topics"]
    assert np.isfinite(found["perplexity"])
    assert found["nll"] > 0
    assert found["unigram_perplexity"] > 1
    assert found["models"][1]["nll"] is None
    assert found["models"][2]["better"]["stderr"] > 0
    assert "document completion, tiny" in result.stderr


def test_evaluate_on_another_corpus_leaves_training_documents_out(trained: Trained, tmp_path: Path) -> None:
    train = provenance(Corpus.from_matrix(counts()), 0.1, 0).split()[0]
    mixed = np.concatenate([counts()[train[:3]], counts(seed=1, documents=6)])
    other = write_uci(tmp_path / "docword.other.txt", mixed)
    result = hivi_command("topics", "evaluate", trained.run, other, "--passes", 2, "--reverse", "--json")
    assert result.exit_code == 0, result.output
    found = last_json(result)
    assert found["documents"] == 6
    assert "3 equal to training documents are left out" in found["test"]
    assert found["held_out_tokens"] > found["observed_tokens"]
    assert found["reverse"]
    refused = hivi_command("topics", "evaluate", trained.run, other, "--peers")
    assert refused.exit_code == 2
    assert "training documents" in refused.stderr


def test_evaluate_refuses_what_is_not_held_out(trained: Trained, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(trained.run, whole)
    dataclasses.replace(Provenance.load(whole), hold_out=0.0).save(whole)
    result = hivi_command("topics", "evaluate", whole, trained.corpus)
    assert result.exit_code == 1
    assert "none kept out" in result.stderr
    assert "--hold-out" in result.stderr
    wider = write_uci(tmp_path / "docword.wider.txt", np.ones((4, WORDS + 1), int))
    result = hivi_command("topics", "evaluate", trained.run, wider)
    assert result.exit_code == 1
    assert "found 41 words; expected the 40 words of 'tiny'" in result.stderr
    renamed = write_uci(tmp_path / "docword.renamed.txt", counts())
    (tmp_path / "vocab.renamed.txt").write_text("\n".join(["other", *VOCABULARY[1:]]))
    result = hivi_command("topics", "evaluate", trained.run, renamed)
    assert result.exit_code == 1
    assert "'other' as word 1" in result.stderr
    assert "expected 'word00'" in result.stderr


def test_show(trained: Trained) -> None:
    result = hivi_command("topics", "show", trained.run, "--words", 3, "--top", 2, "--json")
    assert result.exit_code == 0, result.output
    found = last_json(result)
    (topics,) = found["layers"]
    assert len(topics) == 2
    assert topics[0]["share"] >= topics[1]["share"]
    assert found["words_by"] == "relevance"
    assert all(len(t["words"]) == 3 and set(t["words"]) <= set(VOCABULARY) for t in topics)
    assert "words by relevance" in result.stderr
    assert "... and 2 more" in result.stderr
    plain = hivi_command("topics", "show", trained.run, "--by", "probability")
    assert plain.exit_code == 0
    assert "words by probability" in plain.stdout
    assert "more" not in plain.stdout


def test_show_what_python_saved(trained: Trained, tmp_path: Path) -> None:
    """The same topics; what only the training documents tell is left out, and a line says so."""
    model = DeepExponentialFamily.load(trained.run)
    model.save(tmp_path / "bare")
    right = hivi_command("topics", "show", trained.run, "--json")
    found = hivi_command("topics", "show", tmp_path / "bare", "--json")
    assert found.exit_code == 0, found.output
    assert last_json(found)["layers"] == last_json(right)["layers"]
    assert "saved from Python" in found.stderr
    assert "saved from Python" not in right.stderr
    Provenance.load(trained.run).save(tmp_path / "bare")
    model.save(tmp_path / "bare")  # which says nothing of the documents of the one that was there
    refused = hivi_command("topics", "evaluate", tmp_path / "bare", trained.corpus)
    assert refused.exit_code == 1
    assert "without its training documents" in refused.stderr
    assert "completion_perplexity" in refused.stderr
    model.vocabulary_ = None
    model.save(tmp_path / "numbers")
    numbers = hivi_command("topics", "show", tmp_path / "numbers", "--json")
    assert numbers.exit_code == 0, numbers.output
    assert "no vocabulary was saved" in numbers.stderr
    assert "no vocabulary" not in found.stderr
    for topic, named in zip(last_json(numbers)["layers"][0], last_json(right)["layers"][0], strict=True):
        assert [VOCABULARY[int(v)] for v in topic["words"]] == named["words"]
    shutil.copy(trained.run / "training.json", tmp_path / "bare")
    broken = hivi_command("topics", "show", tmp_path / "bare")
    assert broken.exit_code == 1
    assert "training.npz" in broken.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("fit", "no-such-file"), "no file or folder"),
        (("fit", "CORPUS", "--layers", "3,x"), "is not sizes of layers"),
        (("fit", "CORPUS", "--layers", "0"), "is not sizes of layers"),
        (("fit", "CORPUS", "--latent", "cauchy"), "'cauchy' is not one of poisson, bernoulli, gamma"),
        (("fit", "CORPUS", "--hold-out", "1.5"), "--hold-out"),
        (("fit", "python-docstrings", "--vocab", "CORPUS"), "has its own words"),
        (("evaluate", "RUN", "CORPUS", "--documents", "some"), "neither all nor a share"),
        (("evaluate", "RUN"), "was trained on 'tiny'"),
        (("evaluate", "no-such-run", "CORPUS"), "no-such-run"),
        (("show", "RUN", "--by", "luck"), "'luck' is not one of"),
    ],
)
def test_wrong_usage_ends_with_2(trained: Trained, words: tuple[str, ...], text: str) -> None:
    places = {"RUN": trained.run, "CORPUS": trained.corpus}
    result = hivi_command("topics", *(places.get(w, w) for w in words))
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


def test_failures_end_with_1(trained: Trained, tmp_path: Path) -> None:
    result = hivi_command("topics", "show", tmp_path)
    assert result.exit_code == 1
    assert "hivi: " in result.stderr
    assert "Cure" in result.stderr
    broken = tmp_path / "docword.broken.txt"
    broken.write_text("2\n3\n1\n1 9 1\n")
    result = hivi_command("topics", "fit", broken)
    assert result.exit_code == 1
    assert "line 4" in result.stderr
    result = hivi_command("topics", "fit", write_uci(tmp_path / "docword.two.txt", np.ones((2, 3), int)))
    assert result.exit_code == 1
    assert "documents for testing" in result.stderr


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_lines(0.0), watching("fit", 10, 1000) as watch:
        watch(1.0, -5.0)
        watch(2.0, -4.0)
    begun, first, second = capsys.readouterr().err.splitlines()
    assert begun == "fit: compiling"
    assert first == "fit: pass 1 of 10 (10%), bound -5"
    assert second.startswith("fit: pass 2 of 10 (20%), bound -4, ")
    assert "tokens/s" in second
    assert second.endswith("left")


# Reproduction


def test_reproduce_def_refuses() -> None:
    for words, text in ((("--layers", "a"), "is not sizes"), (("nowhere",), "no file or folder")):
        result = hivi_command("reproduce", "def", *words)
        assert result.exit_code == 2
        assert text in result.stderr


@pytest.mark.slow
def test_reproduce_def_in_a_small_way(tmp_path: Path) -> None:
    corpus = write_uci(tmp_path / "docword.tiny.txt", counts())
    options = ("--quick", "--layers", "4,2", "--words", 30, "--out", tmp_path / "out", "--json")
    result = hivi_command("reproduce", "def", corpus, *options)
    assert result.exit_code == 0, result.output
    found = last_json(result)
    scratch, converged = (t["rows"] for t in found["tables"])
    assert scratch[0]["layers"] == converged[0]["layers"] == "4-2"
    for row in (*scratch, *converged):
        assert {"unigram", "lda", "nmf", "difference", "hvm_perplexities", "flat_nlls"} <= set(row)
        assert np.isfinite(row["difference"]["mean"])
    assert 0 <= converged[0]["directions"] <= 1
    assert json.loads((tmp_path / "out" / "def.json").read_text())["tables"] == found["tables"]
    assert (tmp_path / "out" / "def.png").is_file()
    assert "second-order test" in found["notes"][-1]
    assert "the verdicts say nothing" in found["notes"][0]


def held(bounds: list[float], log_likelihood: list[float] | None = None) -> HeldOut:
    n = len(bounds)
    scores = Scores(np.array(log_likelihood or [-2.0] * n), np.full(n, 2))
    return HeldOut(Inference([], np.array(bounds)), scores, np.full(n, 10))


def test_pairs_and_verdicts() -> None:
    flat = held([-10.0, -20.0, -30.0])
    near = Pair((held([-9.0, -21.0, -30.0]),), (flat,))
    better = Pair((held([-9.0, -18.9, -28.9]), held([-9.1, -19.0, -29.0])), (flat, flat))
    assert near.difference().mean == pytest.approx(0.0)
    assert better.difference().mean == pytest.approx((3.2 + 2.9) / 6)
    assert better.uncertainty() > better.difference().stderr  # seeds differ, too
    assert flat.nll == pytest.approx(2.0)
    assert flat.perplexity == pytest.approx(np.e)
    text = verdict(Row((4, 2), near, better, None))
    assert text.startswith("4-2: from scratch HVM is no different from mean-field (+0.00 ± ")
    assert "grown from mean-field's optimum it is better by 1.02" in text
    assert "no second-order test" in text


def test_cut_documents_and_quick() -> None:
    corpus = Corpus.from_matrix(counts())
    cut = cut_documents(corpus, 20)
    assert cut.lengths().max() == 20
    assert np.all(cut.to_csr().toarray() <= corpus.to_csr().toarray())
    np.testing.assert_array_equal(cut.to_csr().toarray(), cut_documents(corpus, 20).to_csr().toarray())
    plan, small = quick(Plan(words=7, peers=False), [Corpus.from_matrix(np.ones((400, 2), int))])
    assert plan.layers == QUICK.layers
    assert plan.words == 7
    assert not plan.peers
    assert small[0].n_documents == 300
    assert quick(Plan(layers=((4, 2),)), [])[0].layers == ((4, 2),)


def test_the_clock_counts_all_fits() -> None:
    lines: list[str] = []
    clock = Clock(30.0, lines.append)
    clock.watch("a", 2, 5.0, 0.0)(2.0, -1.0)
    clock.watch("b", 4, 5.0, 2.0)(6.0, -1.0)
    assert "a: pass 2 of 2" in lines[0]
    assert "33% of all fits" in lines[0]
    assert "b: pass 4 of 4" in lines[1]
    assert "100% of all fits" in lines[1]


# Parts


def test_provenance(tmp_path: Path) -> None:
    corpus = Corpus.from_matrix(counts(), VOCABULARY, "tiny")
    found = provenance(corpus, 0.1, seed=3)
    train, test = found.split()
    np.testing.assert_array_equal(found.totals, corpus.subset(train).totals())
    found.save(tmp_path / "run")
    again = Provenance.load(tmp_path / "run")
    corpus.save(tmp_path / "corpus")
    unseen = again.test_documents(Corpus.open(tmp_path / "corpus"))
    np.testing.assert_array_equal(unseen.documents, test)
    assert unseen.train is not None
    assert again.vocabulary == VOCABULARY
    shuffled = corpus.subset(np.arange(DOCUMENTS)[::-1])
    assert again.test_documents(shuffled).train is None
    np.testing.assert_array_equal(np.sort(DOCUMENTS - 1 - again.test_documents(shuffled).documents), test)
    with pytest.raises(CorpusError, match="no document that the model was not trained on"):
        again.test_documents(corpus.subset(train[:3]))
    (tmp_path / "run" / "training.json").write_text("{}")
    with pytest.raises(LoadError, match="finished"):
        Provenance.load(tmp_path / "run")


def test_signatures_tell_documents_apart() -> None:
    rows = np.array([[1, 2, 0], [2, 1, 0], [0, 1, 2], [1, 2, 0], [0, 0, 0], [3, 0, 0], [0, 0, 0]])
    found = signatures(Corpus.from_matrix(rows))
    assert found[0] == found[3]
    assert found[4] == found[6]
    assert len(set(found.tolist())) == 5


def test_hierarchy_of_three_layers() -> None:
    w0 = np.array([[5.0, 0.1, 0.1], [0.1, 5.0, 0.1], [0.1, 0.1, 5.0], [1.0, 1.0, 1.0]])
    w1, w2 = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), np.array([[1.0], [3.0]])
    means = [np.array([1.0, 2.0, 3.0]), np.array([1.0, 0.0]), np.array([0.5])]
    shares = unit_shares([w0, w1, w2], means)
    np.testing.assert_allclose(shares[0], [1 / 6, 2 / 6, 3 / 6], rtol=1e-6)
    np.testing.assert_allclose(shares[1], [1.0, 0.0])
    assert alive(shares[1]) == 1
    topics, middle, top = hierarchy([w0, w1, w2], ["a", "b", "c", "d"], shares, words=1, children=2)
    assert [t.number for t in topics] == [2, 1, 0]
    assert topics[0].words == ("c",)
    assert not middle[1].alive
    assert middle[0].words == ("a",)
    (root,) = top
    assert [(c.number, c.part) for c in root.children] == [(1, 0.75), (0, 0.25)]
    assert [c.number for c in root.children[0].children] == [2]
    assert root.words == ("c",)
    lines = as_text(top).splitlines()
    assert len(lines) == 6
    assert "75%" in lines[1]
    assert "unused" in lines[1]
    assert lines[2].endswith("1.2   c")
    assert len(hierarchy([w0, w1, w2], ["a", "b", "c", "d"], shares, top=1)[0]) == 1
    with pytest.raises(CorpusError, match="sizes that belong together"):
        hierarchy([w0, w2], ["a", "b", "c", "d"], [shares[0], shares[2]])


def test_words_and_parts_of_signed_weights() -> None:
    signed = np.array([[1.0, -1.0], [3.0, -2.0]])
    np.testing.assert_allclose(composition(signed), [[0.25, 0.0], [0.75, 0.0]])
    shares = unit_shares([np.ones((2, 2)), signed], [np.array([1.0, 1.0]), np.array([0.2, 0.6])])
    np.testing.assert_allclose(shares[1], [0.25, 0.75])
    assert rank_words(np.array([[0.2, 0.5, 0.3]]), top=9).tolist() == [[1, 2, 0]]


def test_differences_are_taken_at_each_terms_own_view() -> None:
    """Against brute force: the change of all terms, each at its view, when one count moves."""
    table = sp.csr_array(counts(documents=5))
    a = Architecture(layers=(3, 2))
    source = CorpusSource(Counts(table), 5, local=True)
    target = build_target(a, source, corpus_statistics(Counts(table), "poisson"))
    proposal = proposal_for(target, a, MeanField(), jax.random.key(0)).expecting(target.closed)
    z = quickly(lambda k: proposal.propose(k)[0])(jax.random.key(1))
    pinned = at_views(target, proposal.views())
    rows = target.all_rows()

    terms_at = quickly(lambda v: viewed_terms(target, terms_by_view(target, v, proposal.views()), rows))

    def total(values: dict[str, Any]) -> float:
        terms = terms_at(values)
        weights = [f.weight for f in target.factored.factors]
        return float(sum(w * np.sum(np.asarray(t, np.float64)) for w, t in zip(weights, terms, strict=True)))

    for site, where in (("z1", (2, 1)), ("z2", (4, 0))):
        moved = z[site] + 1
        change = quickly(lambda m, site=site: pinned.factored.differences(site, m[None], z, pinned.data, rows)[0])
        found = change(moved)
        assert found.shape == z[site].shape
        brute = total({**z, site: z[site].at[where].add(1)}) - total(z)
        assert float(found[where]) == pytest.approx(brute, abs=2e-3)
    assert jnp.all(jnp.isfinite(found))


class Given(Exception):
    """The documents that a function was called with."""


def test_stored_zeros_are_no_words(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bernoulli observations take every stored entry for a word; the user's matrix stays as it was."""
    model = DeepExponentialFamily.load(trained.run)._trained
    model = dataclasses.replace(model, architecture=Architecture(layers=(4,), observations="bernoulli"))
    clean = sp.csr_array(counts(documents=4))
    given = clean.copy()
    given.data[::2] = 0
    clean = sp.csr_array(given.toarray())
    assert clean.nnz < given.nnz
    right, found = (hold_out(model, x, x, passes=0, samples=1) for x in (clean, given))
    np.testing.assert_array_equal(found.observed, right.observed)
    np.testing.assert_array_equal(found.bounds, right.bounds)
    np.testing.assert_array_equal(found.scores.log_likelihood, right.scores.log_likelihood)

    def seen(fit: Any, documents: Counts, *args: Any, **options: Any) -> None:
        raise Given(documents)

    monkeypatch.setattr(document_curvature_module, "opened", seen)
    flat = dataclasses.replace(model, family=MeanField())
    with pytest.raises(Given) as raised:
        document_curvature(flat, given, key=jax.random.key(0))
    assert raised.value.args[0].indptr[-1] == clean.nnz
    assert given.nnz > clean.nnz


def test_the_curvature_of_documents_refuses(trained: Trained) -> None:
    model = DeepExponentialFamily.load(trained.run)._trained
    for change, text in (
        ({"architecture": Architecture(layers=(4,), latent="gamma")}, "discrete latents"),
        ({"family": hierarchical()}, "mean-field"),
    ):
        broken = dataclasses.replace(model, **change)
        with pytest.raises(FitError, match=text):
            document_curvature(broken, sp.csr_array(counts(documents=3)), key=jax.random.key(0))


def test_the_curvature_of_an_estimators_documents(trained: Trained) -> None:
    """One layer of Poissons has no direction; of X, or of a corpus."""
    model, some = DeepExponentialFamily.load(trained.run), counts(documents=3)
    options = {"key": jax.random.key(0), "samples": 256, "top": 1}
    found = model.curvature(some, **options)
    assert found.eigenvalues.shape == (3, 1)
    assert found.share == 0
    again = model.curvature(Corpus.from_matrix(some), **options)
    np.testing.assert_array_equal(again.eigenvalues, found.eigenvalues)
