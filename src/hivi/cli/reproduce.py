"""`hivi reproduce`: the paper's experiments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hivi._fit.progress import plain_lines
from hivi.cli.common import CODES, Json, Seed, console, failures, print_json, show_table
from hivi.cli.runs import EMBEDDED, load_corpus, parse_layers
from hivi.cli.topics import Latent, choice
from hivi.reproduce import ard as ard_experiment
from hivi.reproduce import bernoulli as bernoulli_experiment
from hivi.reproduce import deep_exponential as deep_exponential_experiment
from hivi.reproduce import mixture_poisson as mixture_poisson_experiment
from hivi.reproduce.report import Report
from hivi.reproduce.topic_rows import Plan

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog=CODES,
    help="Run an experiment: print its table, and draw its figures.",
)

Steps = Annotated[int, typer.Option("--steps", min=1, help="Gradient steps of every fit; all are taken.")]
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder of the figures (PNG and SVG).")]


@app.command(epilog=CODES)
def bernoulli(out: Out = Path("runs/bernoulli"), steps: Steps = 10_000, seed: Seed = 0, json: Json = False) -> None:
    """Figure 1 of the paper: tables of two and of three dependent Bernoullis (one to two minutes on two cores).

    Mean-field against hierarchical families with flow and mixture priors: the bound with its standard error, the exact
    KL(q||p) in nats by quadrature, and q itself. Writes `figure1` (the tables) and `lambda` (the fitted priors).

    Example: `hivi reproduce bernoulli --out runs/bernoulli`
    """
    with failures(), plain_lines():
        _show(bernoulli_experiment.run(out, seed=seed, steps=steps, progress=True), json)


@app.command(epilog=CODES)
def mixture_poisson(
    out: Out = Path("runs/mixture-poisson"), steps: Steps = 10_000, seed: Seed = 0, json: Json = False
) -> None:
    """A posterior over two counts with four modes (two to three minutes on two cores).

    Which family finds the modes: the bound, the total variation distance to the exact table, and the mass that q gives
    to each mode beside its true mass. Writes `mixture_poisson`, heat maps of p and of every q.

    Example: `hivi reproduce mixture-poisson --json`
    """
    with failures(), plain_lines():
        _show(mixture_poisson_experiment.run(out, seed=seed, steps=steps, progress=True), json)


@app.command(epilog=CODES)
def ard(
    out: Out = Path("runs/ard"),
    steps: Steps = 10_000,
    draws: Annotated[int, typer.Option("--draws", min=10, help="NUTS draws in each of four chains.")] = 2_500,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Linear regression with automatic relevance determination, against NUTS (one to four minutes on two cores).

    Weights depend on their variances, which mean-field cannot represent: bounds, errors of posterior means and standard
    deviations against NumPyro's NUTS, and the dependence that each family keeps. Writes `ard`, the draws of each.

    Example: `hivi reproduce ard --draws 1000`
    """
    with failures(), plain_lines():
        _show(ard_experiment.run(out, seed=seed, steps=steps, draws=draws, progress=True), json)


@app.command("def", epilog=CODES)
def deep_exponential(
    corpora: Annotated[
        list[str] | None, typer.Argument(metavar="CORPUS...", help=f"As for `hivi topics fit`; {EMBEDDED} without any.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers", metavar="K1,K2,...", help="A row of the table. Repeatable; the paper's three without."
        ),
    ] = None,
    latent: Annotated[Latent, choice(Latent, "--latent", "Kind of the latent layers.")] = Latent.poisson,
    passes: Annotated[int, typer.Option("--passes", min=2, help="Passes of each fit, half of them a warm-up.")] = 120,
    extra: Annotated[int, typer.Option("--extra", min=1, help="Further passes of the converged comparison.")] = 60,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="How many seeds: --seed and those after it.")] = 3,
    words: Annotated[int | None, typer.Option("--words", min=2, help="Cut documents to so many tokens.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Show a tenth of a document, hold out the rest.")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Fit LDA and NMF, too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Small layers, few passes, 300 documents: to try it.")] = False,
    out: Out = Path("runs/def"),
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Table 1 of the paper: deep exponential families, hierarchical against mean-field (half an hour to an hour on two cores).

    Rows of one, two and three layers; perplexity and negative log-likelihood of unseen documents, beside the unigram, LDA
    and NMF. Printed twice: from scratch with equal passes, as in the paper, and converged, where both go on from one
    mean-field fit; with paired differences of the bounds, and the second-order test. The paper's corpus is not public:
    compare the order, not the figures. Writes `def.json` and the plot `def`.

    Example: `hivi reproduce def --layers 50 --layers 50,15 --seeds 2 --passes 60`
    """
    rows = tuple(map(parse_layers, layers)) if layers else Plan().layers
    plan = Plan(
        layers=rows, latent=latent.value, passes=passes, warm_up=passes // 2, extra=extra,
        seeds=tuple(range(seed, seed + seeds)), words=words, reverse=reverse, peers=peers,
    )  # fmt: skip
    with failures():
        found = [load_corpus(name, None) for name in corpora or [EMBEDDED]]
        if quick:
            plan, found = deep_exponential_experiment.quick(plan, found)
        _show(deep_exponential_experiment.run(found, out, plan=plan, say=_remark), json)


def _remark(text: str) -> None:
    print(f"def: {text}", file=sys.stderr, flush=True)


def _show(report: Report, as_json: bool) -> None:
    out = console(to_stderr=as_json)
    for table in report.tables:
        cells = [[c.text(row) for c in table.columns] for row in table.rows]
        show_table(out, table.title, [c.heading for c in table.columns], cells)
    for note in report.notes:
        out.print(note, markup=False, soft_wrap=True)
    out.print(f"{report.seconds:.0f} s; figures: {', '.join(map(str, report.figures))}", markup=False, soft_wrap=True)
    if as_json:
        print_json(report.to_json())
