"""Table 1 of the paper: deep exponential families under hierarchical and mean-field q, on a corpus that can be had.

The paper's New York Times corpus is not public: what can be replicated is the comparison, not the figures. It is printed
twice: as in the paper (both from scratch, equal passes), and converged (both from one mean-field fit, equal further passes),
since a family that is trained in fewer or luckier steps looks better than it is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hivi import plots
from hivi.reproduce.report import Column, Report, Table, save_figure
from hivi.reproduce.topic_rows import Clock, Pair, Plan, Row, cut_documents, fit_row, row_name
from hivi.topics.base import Corpus
from hivi.topics.fitting import hierarchical
from hivi.topics.heldout import Split, log_scores, make_split, unigram
from hivi.topics.peers import evaluate_peer, fit_lda, fit_nmf
from hivi.topics.scoring import HeldOut

QUICK = Plan(
    layers=((8,), (8, 4)), passes=4, warm_up=0, extra=2, seeds=(0,), family=hierarchical(1, 1), local_passes=4, settled_passes=8,
    tested=8, draws=64, curvature_passes=4,
)  # fmt: skip
QUICK_DOCUMENTS = 300
ENOUGH = 60
"""With fewer passes from scratch, or half as many further ones, nothing has converged."""
CLEAR = 2.0
"""A difference counts beyond so many standard errors."""
FIGURES = (
    Column("layers", "layers"),
    Column("hvm", "HVM perplexity"),
    Column("flat", "mean-field"),
    Column("hvm_nll", "HVM NLL"),
    Column("flat_nll", "mean-field"),
    Column("difference", "HVM's gain (nats/document)", ".3f"),
)
PEERS = (Column("unigram", "unigram", ".0f"), Column("lda", "LDA", ".0f"), Column("nmf", "NMF", ".0f"))
CURVED = (Column("directions", "worth mixing", ".0%"), Column("worth", "worth (nats)", ".2g"))


def run(
    corpora: Sequence[Corpus],
    out: str | Path | None = None,
    *,
    plan: Plan | None = None,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Fit every row of the table on every corpus, with all seeds.

    Args:
        corpora: the corpora; a tenth of the documents of each is for testing.
        out: folder of `def.json`, with all figures, and of the plot `def`; None writes nothing.
        plan: what is fitted, and how long.
        say: prints a line of progress.

    Returns:
        Two tables per corpus, and a verdict per row.
    """
    plan = Plan() if plan is None else plan
    began, clock = time.monotonic(), Clock(len(corpora) * sum(map(plan.cost, plan.layers)), say)
    tables: list[Table] = []
    notes: list[str] = list(_reading(plan))
    figures: list[Path] = []
    for whole in corpora:
        corpus = whole if plan.words is None else cut_documents(whole, plan.words)
        split = make_split(corpus, documents=0.1, tokens=0.9 if plan.reverse else 0.1)
        train = corpus.subset(split.train)
        clock.line(f"{corpus.name}: {len(split.train)} documents to train on, {len(split.test)} to test")
        others = _peers(corpus, train, split, plan)
        rows = [fit_row(train, split, layers, plan, clock) for layers in plan.layers]
        kind = f"{corpus.name}, {plan.latent}, {len(plan.seeds)} seeds"
        known = PEERS if plan.peers else PEERS[:1]
        scratch = tuple(_scratch_row(r, others) for r in rows)
        converged = tuple(_converged_row(r, others) for r in rows)
        tables.append(
            Table(f"paper-like: from scratch, {plan.passes} passes each ({kind})", (*FIGURES, *known), scratch)
        )
        title = f"converged: from one mean-field fit, {plan.extra} further passes each ({kind})"
        tables.append(Table(title, (*FIGURES, *CURVED, *known), converged))
        notes += [f"{corpus.name}, {verdict(r)}" for r in rows]
        if out is not None:
            figures += _figure(rows, Path(out), corpus.name, len(corpora))
    report = Report("def", tuple(tables), tuple(notes), tuple(figures), time.monotonic() - began)
    return report if out is None else _saved(report, Path(out))


def quick(plan: Plan, corpora: Sequence[Corpus]) -> tuple[Plan, list[Corpus]]:
    """The same in a small way: few passes of small layers on the first documents; figures of no use but to try it."""
    kept = {name: getattr(plan, name) for name in ("latent", "words", "reverse", "peers")}
    layers = plan.layers if plan.layers != Plan().layers else QUICK.layers
    small = [c.subset(np.arange(min(QUICK_DOCUMENTS, c.n_documents))) for c in corpora]
    return dataclasses.replace(QUICK, **kept, layers=layers), small


def verdict(row: Row) -> str:
    """One sentence on a row: what the bounds say, and what the second-order test says."""
    first = _said(row.scratch, "from scratch HVM")
    second = _said(row.converged, "grown from mean-field's optimum it")
    c = row.curvature
    if c is None:
        return f"{row_name(row.layers)}: {first}; {second}; no second-order test (latents are not discrete)."
    worth = c.gain_to_expect
    test = (
        f"{c.share:.0%} of the documents tested have a direction worth mixing (by chance 2%), {worth.mean:.2g} nats on average"
        if c.share > 0
        else "no document tested has a direction worth mixing: mean-field is locally best"
    )
    doubt = f" (mean-field had up to {c.slack.mean:.2g} nats left there)" if c.warning else ""
    return f"{row_name(row.layers)}: {first}; {second}; second-order test: {test}{doubt}."


def _said(pair: Pair, who: str) -> str:
    mean, error = pair.difference().mean, pair.uncertainty()
    if abs(mean) <= CLEAR * error:
        return f"{who} is no different from mean-field ({mean:+.2f} ± {error:.2f} nats a document)"
    return f"{who} is {'better' if mean > 0 else 'worse'} by {abs(mean):.2f} ± {error:.2f} nats a document"


def _reading(plan: Plan) -> tuple[str, ...]:
    part = "a tenth" if plan.reverse else "nine tenths"
    short = f"{plan.passes} and {plan.extra} passes: far from any optimum, so that the verdicts say nothing of the families."
    return (
        *((short,) if plan.passes < ENOUGH or plan.extra < ENOUGH // 2 else ()),
        f"Test documents are seen by {part} of their tokens; perplexity is of the others, NLL the negative bound of what was "
        "seen, in nats per token. ± is the standard deviation over seeds; for HVM's gain, the paired difference of the bound "
        "of each document's observed part, it is the standard error over documents.",
    )


def _peers(corpus: Corpus, train: Corpus, split: Split, plan: Plan) -> dict[str, float]:
    """Perplexities of other models, once per corpus."""
    frequencies = unigram(train)[None]
    found = {"unigram": log_scores(np.ones((len(split.test), 1)), frequencies, split.heldout).perplexity}
    if plan.peers:
        topics = max(layers[0] for layers in plan.layers)
        for name, peer in (("lda", fit_lda), ("nmf", fit_nmf)):
            found[name] = evaluate_peer(functools.partial(peer, n_topics=topics), corpus, split).perplexity
    return found


def _spread(values: Sequence[float], form: str) -> str:
    mean = format(np.mean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(np.std(values, ddof=1), form)}"


def _columns(pair: Pair) -> dict[str, object]:
    out: dict[str, object] = {}
    sides: dict[str, tuple[HeldOut, ...]] = {"hvm": pair.hvm, "flat": pair.flat}
    for name, side in sides.items():
        perplexities, nll = [h.perplexity for h in side], [h.nll for h in side]
        out |= {name: _spread(perplexities, ".1f"), f"{name}_nll": _spread(nll, ".4f")}
        out |= {f"{name}_perplexities": perplexities, f"{name}_nlls": nll}
    per_seed = pair.bounds().mean(axis=1).tolist()
    return out | {"difference": pair.difference(), "difference_per_seed": per_seed, "tokens_difference": pair.tokens()}


def _scratch_row(row: Row, others: dict[str, float]) -> dict[str, object]:
    return {"layers": row_name(row.layers), **_columns(row.scratch), **others}


def _converged_row(row: Row, others: dict[str, float]) -> dict[str, object]:
    out = {"layers": row_name(row.layers), **_columns(row.converged), **others}
    if row.curvature is None:
        return out
    c = row.curvature
    return out | {"directions": c.share, "worth": c.gain_to_expect, "slack": c.slack, "largest": c.eigenvalues[..., 0]}


def _figure(rows: Sequence[Row], folder: Path, corpus: str, corpora: int) -> list[Path]:
    """HVM's gain of every seed, from scratch and converged."""
    figure, axes = plots.panels(2, width=3.2, height=2.7)
    for a, title, pairs in zip(
        axes, ("from scratch", "converged"), ([r.scratch for r in rows], [r.converged for r in rows]), strict=True
    ):
        for x, pair in enumerate(pairs):
            gains = pair.bounds().mean(axis=1)
            a.plot(np.full(len(gains), x), gains, "o", alpha=0.5)
            a.errorbar(x + 0.15, pair.difference().mean, yerr=2 * pair.uncertainty(), fmt="_", color="black", capsize=3)
        a.axhline(0, color="grey", linewidth=0.8)
        a.set_xticks(range(len(rows)), [row_name(r.layers) for r in rows])
        a.set_title(title)
        a.set_ylabel("HVM's gain (nats per document)")
    return save_figure(figure, folder, "def" if corpora == 1 else f"def-{corpus}")


def _saved(report: Report, folder: Path) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "def.json"
    report = dataclasses.replace(report, figures=(*report.figures, path))
    path.write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    return report
