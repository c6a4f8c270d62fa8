"""`hivi topics`: train a deep exponential family, test it on documents that it has not seen, and show its topics."""

from __future__ import annotations

import dataclasses
import enum
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from hivi._fit.progress import plain_lines
from hivi._fit.result import Estimate
from hivi.cli.common import CODES, NOT_CONVERGED, Json, Seed, console, failures, make_folder, print_json, show_table
from hivi.cli.runs import EMBEDDED, Run, load_corpus, load_run, parse_layers, take_share
from hivi.topics.base import Corpus
from hivi.topics.document_scores import Scored, score_run
from hivi.topics.estimator import FAMILY, DeepExponentialFamily
from hivi.topics.passes import watching
from hivi.topics.provenance import provenance
from hivi.topics.show import Rank, alive, as_text, hierarchy, unit_shares

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog=CODES,
    help="Topics, super-topics and so on of a corpus: deep exponential families.",
)


class Latent(enum.StrEnum):
    """What a document's counts of topics are."""

    poisson = "poisson"
    bernoulli = "bernoulli"
    gamma = "gamma"


class Observations(enum.StrEnum):
    """Counts of words, or whether they occur."""

    poisson = "poisson"
    bernoulli = "bernoulli"


class Weights(enum.StrEnum):
    """Family of the weights."""

    gamma = "gamma"
    normal = "normal"


class Family(enum.StrEnum):
    """Variational families of a document's latents."""

    mean_field = "mean-field"
    hierarchical = "hierarchical"
    amortised = "amortised"


DEFAULT_FAMILY = Family(FAMILY)
"""The estimator's."""


class By(enum.StrEnum):
    """Order of a topic's words."""

    relevance = "relevance"
    probability = "probability"


def choice(kind: type[enum.StrEnum], name: str, text: str) -> Any:
    """An option with these values; Typer's own message for an enumeration begins with "Value error"."""

    def parse(value: str) -> enum.StrEnum:
        if value not in set(kind):
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(kind)}", param_hint=f"'{name}'")
        return kind(value)

    return typer.Option(name, parser=parse, metavar=f"[{'|'.join(kind)}]", autocompletion=lambda: list(kind), help=text)


CorpusName = Annotated[
    str,
    typer.Argument(
        metavar="CORPUS",
        help="A UCI bag of words (docword.NAME.txt, .gz), LDA-C, Matrix Market file, a folder of texts or of a saved "
        f"corpus; without it {EMBEDDED}, the docstrings of Python's standard library.",
    ),
]
TestCorpus = Annotated[
    str | None,
    typer.Argument(metavar="CORPUS", help=f"As for `fit`; may be left out where RUN was trained on {EMBEDDED}."),
]
Vocab = Annotated[
    Path | None,
    typer.Option("--vocab", exists=True, dir_okay=False, metavar="FILE", help="The words, one per line."),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="Folder of a trained model.")
]
Layers = Annotated[
    str, typer.Option("--layers", metavar="K1,K2,...", help="Number of topics, super-topics, ...: from the words up.")
]


@app.command(epilog=CODES)
def fit(
    corpus: CorpusName = EMBEDDED,
    vocab: Vocab = None,
    layers: Layers = "100,30,15",
    latent: Annotated[Latent, choice(Latent, "--latent", "Kind of the latent layers.")] = Latent.poisson,
    observations: Annotated[
        Observations, choice(Observations, "--observations", "Counts of words, or whether a word occurs.")
    ] = Observations.poisson,
    weights: Annotated[Weights, choice(Weights, "--weights", "Kind of the weights.")] = Weights.gamma,
    family: Annotated[
        Family,
        choice(
            Family, "--family", "Of a document's latents; amortised is a network, hierarchical grows from mean-field."
        ),
    ] = DEFAULT_FAMILY,
    passes: Annotated[int, typer.Option("--passes", min=1, help="Passes over the corpus, warm-up included.")] = 120,
    warm_up: Annotated[
        int,
        typer.Option("--warm-up", min=0, help="First passes, without the weights' uncertainty; at most half."),
    ] = 60,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Documents per minibatch.")] = 180,
    hold_out: Annotated[
        float,
        typer.Option("--hold-out", min=0, max=0.9, help="Share of documents kept out, for `evaluate`; 0 for none."),
    ] = 0.1,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", file_okay=False, metavar="RUN", help="Folder to write to.")] = Path(
        "runs/topics"
    ),
    json: Json = False,
) -> None:
    """Train a topic model, and save it.

    Progress goes to standard error: a bar on a terminal, elsewhere a line every ten seconds. A tenth of the documents is
    kept out of training (`--hold-out`), so that `hivi topics evaluate` has documents that the model has not seen; RUN
    remembers which. All passes are done; where the bound was still rising by more than its noise over the last quarter of
    those after the warm-up, the model is saved and the exit code is 3.

    Example: `hivi topics fit docword.news.txt.gz --layers 50,10 --out runs/news`
    """
    sizes = parse_layers(layers)
    with failures():
        whole = load_corpus(corpus, vocab)
        make_folder(out)
        story = provenance(whole, hold_out, seed)
        train = whole.subset(story.split()[0]) if hold_out else whole
        console(to_stderr=True).print(_intention(whole, train, hold_out), markup=False, soft_wrap=True)
        model = DeepExponentialFamily(
            sizes, latent=latent.value, observations=observations.value, weights=weights.value, family=family.value,
            passes=passes, warm_up=warm_up, batch_size=batch, random_state=seed,
        )  # fmt: skip
        began = time.monotonic()
        with plain_lines(), watching("topics fit", passes, train.n_tokens) as watch:
            model.fit(train, watch=watch)
        seconds = time.monotonic() - began
        run = Run(model, story, out)
        run.save()
        _show_fit(run, train, seconds, corpus, out, json)
    if not model.converged_:
        raise typer.Exit(NOT_CONVERGED)


@app.command(epilog=CODES)
def evaluate(
    run: RunFolder,
    corpus: TestCorpus = None,
    vocab: Vocab = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Show the model a tenth of each document's tokens, and hold out the rest.")
    ] = False,
    documents: Annotated[
        str, typer.Option("--documents", metavar="SHARE|all", help="How many of the test documents.")
    ] = "all",
    peers: Annotated[
        bool, typer.Option("--peers", help="Fit LDA and NMF to the same training documents, too.")
    ] = False,
    passes: Annotated[
        int | None,
        typer.Option(
            "--passes",
            min=0,
            help="Gradient steps per test document; 60 if not given. 0: the inference network's own answer.",
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Perplexity and negative log-likelihood of unseen documents, by document completion.

    Of each test document the model sees nine tenths of the tokens, and is scored by the others. Of the corpus that RUN
    was trained on, the test documents are those that were kept out of training; of another corpus all, but any that
    equal a training document. Words must be those of the training.

    Example: `hivi topics evaluate runs/news docword.news.txt.gz --peers`
    """
    with failures():
        trained = load_run(run)
        name = corpus or trained.training.name
        if corpus is None and name != EMBEDDED:
            text = f"say which; {run} was trained on {name!r}"
            raise typer.BadParameter(text, param_hint="'CORPUS'")
        whole = load_corpus(name, vocab, trained.training.vocabulary)
        unseen = trained.training.test_documents(whole)
        if peers and unseen.train is None:
            text = "LDA and NMF need the training documents: evaluate on the corpus that RUN was trained on"
            raise typer.BadParameter(text, param_hint="'--peers'")
        test = take_share(unseen.documents, documents, seed)
        began = time.monotonic()
        found = score_run(
            trained.model, whole, test, unseen.train if peers else None, trained.training.totals,
            heldout=0.9 if reverse else 0.1, seed=seed, passes=passes,
        )  # fmt: skip
        part = "" if len(test) == len(unseen.documents) else f", of which {len(test)} were drawn"
        _show_scores(found, whole, unseen.words + part, str(run), reverse, time.monotonic() - began, json)


@app.command(epilog=CODES)
def show(
    run: RunFolder,
    words: Annotated[int, typer.Option("--words", min=1, help="Words per topic.")] = 8,
    children: Annotated[int, typer.Option("--children", min=1, help="Topics per super-topic, at most.")] = 4,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help="Topics per layer, the largest first; all without.")
    ] = None,
    by: Annotated[By, choice(By, "--by", "Order of the words.")] = By.relevance,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Topics by their words, and super-topics by the topics that they are made of.

    A layer's units come by their share of the tokens. Words are ranked by relevance (probability in the topic, and how
    much higher that is than in the corpus), or by probability alone. RUN may also be what
    `hivi.DeepExponentialFamily.save` wrote in Python. `--seed` has no effect here.

    Example: `hivi topics show runs/news --top 10`
    """
    del seed
    with failures():
        found = load_run(run)
        rank: Rank = "relevance" if by is By.relevance else "probability"
        frequencies = found.frequencies if rank == "relevance" else None
        weights = [w.T for w in found.model.layer_components_]
        shares = unit_shares(weights, found.model.layer_means_)
        layers = hierarchy(weights, found.vocabulary, shares, frequencies, words=words, children=children, top=top)
    say = console(to_stderr=json)
    for line in found.missing():
        say.print(line, style="yellow", markup=False, soft_wrap=True)
    for number, units in enumerate(layers, 1):
        name = "topics" if number == 1 else f"layer {number}: super-topics, and the parts that each is made of"
        used = f"{alive(shares[number - 1])} of {len(shares[number - 1])} in use"
        say.print(
            f"{name} by share of tokens ({used}): share, layer.number, words by {rank}",
            style="bold",
            markup=False,
            soft_wrap=True,
        )
        say.print(as_text(units), markup=False, soft_wrap=True)
        if len(units) < len(shares[number - 1]):
            say.print(f"... and {len(shares[number - 1]) - len(units)} more", markup=False)
        say.print()
    if json:
        print_json({
            "run": str(run),
            "words_by": rank,
            "alive": [alive(s) for s in shares],
            "layers": [[dataclasses.asdict(t) for t in units] for units in layers],
        })  # fmt: skip


_RISING = "not converged: the bound was still rising, or the passes are too few to tell; take more --passes"


def _intention(whole: Corpus, train: Corpus, hold_out: float) -> str:
    kept = whole.n_documents - train.n_documents
    without = f", {kept} kept out for `hivi topics evaluate`" if hold_out else ", none kept out"
    return f"{whole}; training on {train.n_documents} documents, {train.n_tokens:,} tokens{without}"


def _show_fit(run: Run, train: Corpus, seconds: float, corpus: str, out: Path, as_json: bool) -> None:
    model = run.model
    shares = unit_shares([w.T for w in model.layer_components_], model.layer_means_)
    used, bound = [alive(s) for s in shares], float(model.bound_history_[-1])
    speed = model.n_iter_ * train.n_tokens / seconds
    live = ", ".join(f"{u} of {len(s)}" for u, s in zip(used, shares, strict=True))
    say = console(to_stderr=as_json)
    for line in (
        f"bound {bound:.6g} nats ({bound / max(train.n_tokens, 1):.4f} per token; mean of the last pass)",
        f"units in use, by layer: {live}",
        f"{model.n_iter_} passes in {seconds:.1f} s, compilation included ({speed:,.0f} tokens/s)",
        *(() if model.converged_ else (_RISING,)),
        f"saved in {out}; next:",
        f"  hivi topics show {out}",
        f"  hivi topics evaluate {out}{'' if corpus == EMBEDDED else f' {corpus}'}",
    ):
        say.print(line, markup=False, soft_wrap=True)
    if as_json:
        print_json({
            "run": str(out),
            "converged": model.converged_,
            "bound": bound if np.isfinite(bound) else None,
            "alive": used,
            "layers": [len(s) for s in shares],
            "passes": int(model.n_iter_),
            "seconds": round(seconds, 2),
            "tokens_per_second": round(speed),
            "documents": train.n_documents,
            "held_out": run.training.n_documents - train.n_documents,
        })  # fmt: skip


def _show_scores(
    found: list[Scored], corpus: Corpus, words: str, run: str, reverse: bool, seconds: float, as_json: bool
) -> None:
    own = found[0]
    held, seen = int(own.scores.tokens.sum()), own.observed
    say = console(to_stderr=as_json)
    say.print(f"test documents: {words}", markup=False, soft_wrap=True)
    say.print(f"{seen:,} tokens observed, {held:,} held out", markup=False)
    cells = [[s.name, f"{s.perplexity:.1f}", _number(s.nll), _estimate(s.better)] for s in found]
    headings = ["model", "perplexity", "NLL (nats per observed token)", "better than unigram (nats per token)"]
    show_table(say, f"document completion, {corpus.name}", headings, cells)
    say.print("NLL: the negative bound of the observed part; other models have no such bound", markup=False)
    if as_json:
        models = [
            {"model": s.name, "perplexity": s.perplexity, "nll": s.nll, "better": _plain(s.better)} for s in found
        ]
        print_json({
            "run": run,
            "corpus": corpus.name,
            "test": words,
            "documents": len(own.scores.tokens),
            "observed_tokens": seen,
            "held_out_tokens": held,
            "reverse": reverse,
            "perplexity": own.perplexity,
            "nll": own.nll,
            "unigram_perplexity": found[1].perplexity,
            "models": models,
            "seconds": round(seconds, 2),
        })  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _estimate(value: Estimate | None) -> str:
    return "-" if value is None else str(value)


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else value._asdict()
