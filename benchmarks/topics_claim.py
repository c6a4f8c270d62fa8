"""The paper's claim by kind of latent, depth, and length of the documents: HVM against mean-field from a common start.

    HIVI_DATA=... python benchmarks/topics_claim.py

2,000 documents of bbc (about 107 words each), and of reuters21578 cut to 20 words; layers 50, 50-20, 50-20-10. Beside the
gain stands the second-order test (`hivi.curvature`) at the mean-field optimum of 32 test documents.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import RESULTS, write

from hivi.reproduce.topic_rows import cut_documents
from hivi.topics import Architecture, Corpus, grow, hierarchical, make_split, read_corpus, start, train
from hivi.topics.document_curvature import document_curvature
from hivi.topics.fitting import GROWN_DRAWS
from hivi.topics.inference import inferred, read
from hivi.topics.trained import without_documents

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("HIVI_DATA", ROOT.parent / "shared" / "data")) / "corpora"
DEPTHS = ((50,), (50, 20), (50, 20, 10))
LATENTS = "poisson", "bernoulli", "gamma"
WARM_UP, PASSES, EXTRA = 20, 50, 15
STEPS, READS = 150, 16
"""Steps for a test document, and how often its bound is read, by 64 draws: one alone has a noise of two nats per document."""


def corpora() -> dict[str, Corpus]:
    """Long documents, and short ones."""
    bbc = read_corpus(DATA / "bbc" / "docword.bbc.txt.gz")
    reuters = read_corpus(DATA / "reuters21578" / "docword.reuters21578.txt.gz")
    pick = np.sort(np.random.default_rng(0).permutation(reuters.n_documents)[:2000])
    return {"bbc": bbc, "reuters21578, 20 words": cut_documents(reuters.subset(pick), 20)}


def row(corpus: Corpus, latent: Any, layers: tuple[int, ...]) -> dict[str, float]:
    """One fit, two continuations, and the test between them."""
    split = make_split(corpus)
    documents = corpus.subset(split.train)
    fit = start(documents, Architecture(layers=layers, latent=latent), key=jax.random.key(0), batch=250)
    train(fit, PASSES, warm_up=WARM_UP, rng=np.random.default_rng(0))
    out: dict[str, float] = {"share": float("nan"), "worth": float("nan"), "slack": float("nan")}
    if latent != "gamma":
        found = document_curvature(
            without_documents(fit, documents.n_documents, 0),
            split.observed[:32],
            key=jax.random.key(5),
            samples=512,
            top=1,
            passes=60,
        )
        out = {"share": float(found.share), "worth": found.gain_to_expect.mean, "slack": found.slack.mean}
    hvm = grow(fit, hierarchical(), key=jax.random.key(1))
    bounds = []
    for each in (fit, hvm):
        train(each, EXTRA, rng=np.random.default_rng(7), samples=GROWN_DRAWS)
        stream, chosen = inferred(each, Corpus.from_matrix(split.observed), key=jax.random.key(9), passes=STEPS)
        parts = [read(stream, each.architecture, chosen, key=jax.random.key(k), samples=64) for k in range(READS)]
        bounds.append(np.mean([p.bound for p in parts], 0))
    gain = bounds[1] - bounds[0]
    return out | {
        "gain": float(gain.mean()), "stderr": float(gain.std(ddof=1) / np.sqrt(len(gain))), "bound": float(bounds[0].mean()),
        "small": STEPS, "draws": 64 * READS,
    }  # fmt: skip


def main() -> None:
    """Every row that is not there yet, or was measured otherwise; the table is written anew after each."""
    path = RESULTS / "topics_claim.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for latent in LATENTS:
        for name, corpus in reversed(corpora().items()):
            for layers in DEPTHS:
                key = f"{name}|{latent}|{'-'.join(map(str, layers))}"
                if found.get(key, {}).get("small") == STEPS:
                    continue
                found[key] = row(corpus, latent, layers)
                jax.clear_caches()  # each program keeps mappings of memory, of which a process has 65,530
                print(key, found[key], flush=True)
                path.write_text(json.dumps(found, indent=1) + "\n")
                table(found)


def table(found: dict[str, dict[str, float]]) -> None:
    """`results/topics_claim.md`."""
    rows = []

    def place(item: tuple[str, Any]) -> tuple[str, int, int]:
        corpus, latent, layers = item[0].split("|")
        return corpus, LATENTS.index(latent), layers.count("-")

    for key, f in sorted(found.items(), key=place):
        test = "-" if np.isnan(f["share"]) else f"{f['share']:.0%}, {f['worth']:.3f}"
        rows.append((*key.split("|"), f"{f['bound']:.1f}", f"{f['gain']:+.3f} ± {f['stderr']:.3f}", test,
                     f"{f.get('small', 0):.0f}, {f.get('draws', 32):.0f}"))  # fmt: skip
    write(
        "topics_claim", "HVM against mean-field by latent, depth and length", "python benchmarks/topics_claim.py",
        ("corpus", "latent", "layers", "mean-field's bound", "HVM - mean-field", "documents with a direction, its worth",
         "small steps, draws"),
        rows,
        [
            "Nats per test document, ± the standard error over documents; both from one mean-field fit, with the same further",
            "passes. The test's worth is in nats per document at the spread that it trusts. One seed. Small steps: after 150",
            "large ones for a test document's parameters; draws: for its bound. Rows without small steps are older: HVM's test",
            "documents started afresh, those that it was trained on without the optimiser's memory, by steps of one draw (now",
            "three, of both families).",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
