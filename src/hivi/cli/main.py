"""`hivi`: the command line. It parses, calls and prints; everything else is the library's."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from hivi.cli import compare, fit, reproduce, topics
from hivi.cli.common import CODES

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=CODES,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"hivi {version('hivi')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hierarchical variational inference: approximate posteriors that keep dependence, discrete latents included.

    Every command takes `--seed`, and `--json` for a machine-readable result. Examples:

    `hivi reproduce bernoulli` runs Figure 1 of the paper.

    `hivi fit model.py:model --data data.csv --out runs/first` fits a NumPyro model.

    `hivi compare model.py:model --data data.csv` says which family suits it.

    `hivi topics fit --layers 50,10 --out runs/topics` finds topics, here of a corpus that every machine has.
    """


app.command("fit", epilog=CODES)(fit.fit)
app.command("compare", epilog=CODES)(compare.compare)
app.command("explain", epilog=CODES)(fit.explain)
app.add_typer(topics.app, name="topics")
app.add_typer(reproduce.app, name="reproduce")

if __name__ == "__main__":
    app()
