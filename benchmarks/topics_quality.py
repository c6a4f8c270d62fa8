"""Deep exponential families on real corpora: held-out perplexity beside LDA and NMF, and HVM against mean-field.

    HIVI_DATA=... python benchmarks/topics_quality.py perplexity [CORPUS ...]
    HIVI_DATA=... python benchmarks/topics_quality.py hierarchy [CORPUS ...]
    HIVI_DATA=... python benchmarks/topics_quality.py curvature [CORPUS ...]

`perplexity`: every setting on every corpus, with live topics and coherence. `hierarchy`: HVM grown from a mean-field fit
and mean-field given the same further passes, paired by document. `curvature`: the second-order test of test documents at
these mean-field fits, beside what HVM gained. All add to `results/topics_*.json` as they go, and
write the table of all that is there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import RESULTS, write

from hivi.topics import (
    Architecture,
    Corpus,
    TopicFit,
    amortised,
    evaluate_peer,
    fit_lda,
    fit_nmf,
    fit_unigram,
    grow,
    hierarchical,
    infer,
    liveness,
    log_scores,
    make_split,
    npmi,
    read_corpus,
    start,
    train,
)  # fmt: skip
from hivi.topics.document_curvature import document_curvature
from hivi.topics.fitting import GROWN_DRAWS
from hivi.topics.inference import posterior_means
from hivi.topics.trained import without_documents

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HIVI_DATA", ROOT.parent / "shared" / "data")) / "corpora"
CORPORA = ("wikipedia", "bbc", "reuters21578")
PASSES = 60, 120
"""Warm-up, and all passes: one setting for all corpora, the estimator's own."""
FIRST = {"wikipedia": (40, 80), "bbc": (40, 80), "reuters21578": (30, 60)}
"""The same before a hierarchy is grown: fewer on the corpus that has twenty times the documents."""
EXTRA = {"wikipedia": 20, "bbc": 20, "reuters21578": 15}
SHORTER = {"reuters21578": ((12, 24), 6)}
"""The same before mean-field has come to its end: FIRST and EXTRA."""
LOCAL_STEPS = 120
"""Steps for the parameters of a test document in `hierarchies`, twice the default: the comparison is of families at their end."""
SEEDS = (0, 1, 2)
TESTED = 48
"""Documents of the second-order test."""
PEERS = {"unigram": fit_unigram, "NMF + 10 % unigram": fit_nmf, "LDA (scikit-learn)": fit_lda}
WITHOUT_CHANCE = ("unigram",)


def evaluate(fit: TopicFit, split: Any, passes: int | None = None) -> dict[str, Any]:
    """Held-out perplexity, and the bound on the observed part of the test documents, document by document."""
    found = infer(fit, Corpus.from_matrix(split.observed), key=jax.random.key(9), passes=passes, samples=32)
    mixture = np.concatenate([found.layers[0], np.ones((len(found.layers[0]), 1))], 1)
    scores = log_scores(mixture, np.vstack([fit.weights().T, fit.floor()]), split.heldout)
    nll = -found.bound.sum() / split.observed.sum()
    return {"perplexity": scores.perplexity, "nll": float(nll), "bounds": found.bound, "first": found.layers[0]}


def record(name: str, key: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Add figures to `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[key] = figures
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(key, figures, flush=True)
    return known


def settings() -> dict[str, tuple[tuple[int, ...], bool]]:
    """Label -> layers, inference network."""
    return {
        "mean-field 100": ((100,), False),
        "mean-field 100-30-15": ((100, 30, 15), False),
        "amortised 100": ((100,), True),
        "amortised 100-30-15": ((100, 30, 15), True),
    }


def perplexities(names: list[str]) -> None:
    """Parts b and f, three seeds a fit; the split is the corpora's own."""
    path = RESULTS / "topics_perplexity.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in SEEDS:
        for name in names:
            corpus = read_corpus(DATA / name / f"docword.{name}.txt.gz")
            split = make_split(corpus)
            for label, (layers, network) in settings().items():
                if (key := f"{name}|{label}|{seed}") not in known:
                    known = record("topics_perplexity", key, _own(corpus, split, layers, network, seed))
            for label, peer in PEERS.items():
                if (key := f"{name}|{label}|{seed}") not in known and not (seed and label in WITHOUT_CHANCE):
                    known = record("topics_perplexity", key, _peer(corpus, split, peer, label, seed))
    rows = []
    for corpus_name, label in sorted({tuple(key.split("|")[:2]) for key in known}):
        found = [f for seed in SEEDS if (f := known.get(f"{corpus_name}|{label}|{seed}"))]
        alive = sorted({f"{f['alive']}/{f['topics']}" for f in found})
        rows.append((
            corpus_name, label, _spread(found, "perplexity", 0), _spread(found, "answer", 0), _spread(found, "nll", 3),
            ", ".join(alive), _spread(found, "npmi", 3), f"{np.mean([f['cpu'] for f in found]):.0f}", str(len(found)),
        ))  # fmt: skip
    write(
        "topics_perplexity", "Held-out perplexity", "python benchmarks/topics_quality.py perplexity",
        ("corpus", "model", "perplexity", "network's own answer", "NLL (nats per token)", "live topics", "NPMI", "seconds",
         "seeds"), rows,
        [
            "Document completion: 10 % of documents, 10 % of their tokens; one split, mean ± standard deviation over seeds of",
            "the fit (those without chance: one). The best topic models measured elsewhere on these tokens: wikipedia 1692",
            "(tomotopy LDA), bbc 753 (NMF + unigram), reuters21578 615 (tomotopy LDA). NPMI is of the ten top words in the",
            "training documents. Settings were chosen on training documents. Network's own answer: without refinement of the",
            "test documents' parameters. Live topics: with more than a hundredth of an equal share of the training documents'",
            "tokens; of the test documents' for the peers and, on bbc and reuters21578, for all but the three-layer network.",
            "Mean-field's test documents had 60 steps; since then as many small ones follow.",
        ],
    )  # fmt: skip


def _spread(found: list[dict[str, Any]], key: str, places: int) -> str:
    values = [v for f in found if (v := f.get(key)) is not None and np.isfinite(v)]
    if not values:
        return "-"
    mean = f"{np.mean(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{places}f}"


def _own(corpus: Corpus, split: Any, layers: tuple[int, ...], network: bool, seed: int) -> dict[str, Any]:
    documents, architecture = corpus.subset(split.train), Architecture(layers=layers)
    began = time.process_time()
    fit = start(documents, architecture, amortised(architecture) if network else None, key=jax.random.key(seed))
    warm, total = PASSES
    train(fit, total, warm_up=warm, rng=np.random.default_rng(seed))
    seconds = time.process_time() - began
    found, topics = evaluate(fit, split), fit.weights().T
    used = posterior_means(fit.stream, architecture, key=jax.random.key(9))[0]
    alive = liveness(used, topics).alive
    answer = evaluate(fit, split, passes=0)["perplexity"] if network else None
    return {
        "perplexity": found["perplexity"], "nll": found["nll"], "cpu": seconds, "alive": int(alive.sum()),
        "topics": len(alive), "answer": answer, "npmi": float(np.mean(npmi(topics, documents))),
    }  # fmt: skip


def _peer(corpus: Corpus, split: Any, peer: Any, label: str, seed: int) -> dict[str, Any]:
    options = {} if label == "unigram" else {"n_topics": 100, "seed": seed}
    found = evaluate_peer(lambda a, b: peer(a, b, **options), corpus, split)
    return {
        "perplexity": found.perplexity, "cpu": found.seconds, "npmi": float(np.mean(found.npmi)),
        "alive": int(found.liveness.alive.sum()), "topics": len(found.liveness.alive),
    }  # fmt: skip


def hierarchies(names: list[str]) -> None:
    """Part a: three seeds, three depths, a common start."""
    path = RESULTS / "topics_hierarchy.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in SEEDS:
        for name in names:
            corpus = read_corpus(DATA / name / f"docword.{name}.txt.gz")
            split = make_split(corpus)
            documents = corpus.subset(split.train)
            for layers in ((100,), (100, 30), (100, 30, 15)):
                plans = {name: (FIRST[name], EXTRA[name])}
                if name in SHORTER:
                    plans[f"{name}, shorter"] = SHORTER[name]
                for label, plan in plans.items():
                    if known.get(key := _key(label, layers, seed), {}).get("steps") != LOCAL_STEPS:
                        known = record("topics_hierarchy", key, _pair(documents, split, layers, seed, *plan))
    rows = []
    for name in (*CORPORA, *(f"{n}, shorter" for n in SHORTER)):
        for layers in ((100,), (100, 30), (100, 30, 15)):
            found = [known[k] for s in SEEDS if (k := _key(name, layers, s)) in known]
            if found:
                gains = ", ".join(f"{f['gain']:+.3f} ± {f['stderr']:.3f}" for f in found)
                ratios = ", ".join(f"{f['ratio']:.4f}" for f in found)
                how = f"{found[0].get('steps', 60)}, {found[0].get('draws', 1)}"
                rows.append((name, "-".join(map(str, layers)), gains, ratios, f"{found[0]['perplexity']:.0f}", how))
    write(
        "topics_hierarchy", "HVM against mean-field, from a common start", "python benchmarks/topics_quality.py hierarchy",
        ("corpus", "layers", "HVM's bound - mean-field's, nats per test document, by seed", "perplexity ratio", "mean-field's",
         "steps, draws"),
        rows,
        [
            "Both start at one mean-field fit and get the same further passes; the bound is of the observed part of each test",
            "document, paired, ± the standard error over documents. HVM: planar flow of length 2 over all layers' log rates,",
            "inverse flow of length 10, shared by documents, each document with its own location and scale. reuters21578:",
            "60 passes and 15 more; shorter: 24 and 6 more, before mean-field has come to its end. The others: 80 and 20 more.",
            "Steps: for the parameters of a test document; draws: per step of the further passes, of both families. Rows of 60",
            "steps are older: no small steps followed (now as many), HVM's test documents started afresh, and those that it was",
            "trained on without the optimiser's memory.",
        ],
    )  # fmt: skip


def curvatures(names: list[str]) -> None:
    """Part a, its second clause: what the second-order test promises at the mean-field fits of `hierarchies`, seed 0."""
    path, gains = RESULTS / "topics_curvature.json", json.loads((RESULTS / "topics_hierarchy.json").read_text())
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        corpus = read_corpus(DATA / name / f"docword.{name}.txt.gz")
        split = make_split(corpus)
        documents = corpus.subset(split.train)
        for layers in ((100,), (100, 30), (100, 30, 15)):
            if _key(name, layers, 0) not in known:
                known = record("topics_curvature", _key(name, layers, 0), _tested(documents, split, layers, name))
    rows = []
    for name in CORPORA:
        for layers in ((100,), (100, 30), (100, 30, 15)):
            if (f := known.get(_key(name, layers, 0))) is None:
                continue
            if (hvm := gains.get(_key(name, layers, 0))) is None:
                continue
            rows.append((
                name, "-".join(map(str, layers)), f"{f['with a direction']} of {f['documents']}",
                f"{f['median']:+.3f}", f"{f['largest']:+.3f} ± {f['stderr']:.3f}", f"{f['to expect']:.4f}",
                f"{hvm['gain']:+.3f} ± {hvm['stderr']:.3f}",
            ))  # fmt: skip
    write(
        "topics_curvature", "Would a hierarchy help? The second-order test at mean-field fits of topic models",
        "python benchmarks/topics_quality.py curvature",
        ("corpus", "layers", "documents with a direction", "top eigenvalue, median", "largest", "gain to expect",
         "HVM gained"), rows,
        [
            "Eigenvalues in nats per unit variance of the natural parameters, gains in nats per document, at the mean-field fits",
            f"of topics_hierarchy.md after their further passes, seed 0; {TESTED} test documents, 2048 draws, after 400 steps",
            "for their parameters. A direction counts where its eigenvalue is above its noise. HVM gained: over these fits, all",
            "test documents.",
        ],
    )  # fmt: skip


def _tested(documents: Corpus, split: Any, layers: tuple[int, ...], name: str) -> dict[str, float]:
    warm, total = FIRST[name]
    fit = start(documents, Architecture(layers=layers), key=jax.random.key(0))
    train(fit, total, warm_up=warm, rng=np.random.default_rng(0))
    train(fit, EXTRA[name], rng=np.random.default_rng(7))
    trained = without_documents(fit, documents.n_documents, 0)
    found = document_curvature(trained, split.observed[:TESTED], key=jax.random.key(5))
    best = found.eigenvalues.max(1)
    largest = int(best.argmax())
    return {
        "documents": TESTED, "with a direction": int((found.spread > 0).any(1).sum()), "median": float(np.median(best)),
        "largest": float(best[largest]), "stderr": float(found.stderr[largest][found.eigenvalues[largest].argmax()]),
        "to expect": found.gain_to_expect.mean,
    }  # fmt: skip


def _key(name: str, layers: tuple[int, ...], seed: int) -> str:
    return f"{name}|{'-'.join(map(str, layers))}|{seed}"


def _pair(
    documents: Corpus, split: Any, layers: tuple[int, ...], seed: int, first: tuple[int, int], extra: int
) -> dict[str, float]:
    warm, total = first
    fit = start(documents, Architecture(layers=layers), key=jax.random.key(seed))
    train(fit, total, warm_up=warm, rng=np.random.default_rng(seed))
    hvm = grow(fit, hierarchical(), key=jax.random.key(seed + 100))
    found = []
    for each in (fit, hvm):
        train(each, extra, rng=np.random.default_rng(seed + 7), samples=GROWN_DRAWS)
        found.append(evaluate(each, split, LOCAL_STEPS))
    gain = found[1]["bounds"] - found[0]["bounds"]
    return {
        "gain": float(gain.mean()), "stderr": float(gain.std(ddof=1) / np.sqrt(len(gain))),
        "perplexity": found[0]["perplexity"], "ratio": found[1]["perplexity"] / found[0]["perplexity"],
        "steps": LOCAL_STEPS, "draws": GROWN_DRAWS,
    }  # fmt: skip


if __name__ == "__main__":
    chosen = sys.argv[2:] or list(CORPORA)
    if chosen == ["table"]:  # of what is there, without a fit
        chosen = []
    {"perplexity": perplexities, "hierarchy": hierarchies, "curvature": curvatures}[sys.argv[1]](chosen)
