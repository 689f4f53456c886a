"""`alloy`: every command under one name."""

from typing import Annotated

import typer

import alloy
from alloy.cli import distances, merging, symmetry

app = typer.Typer(
    name="alloy",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Merge transformers that were trained apart, and look at what makes them mergeable.",
    epilog="Each command shows an example: `alloy merge --help`. More: docs/ in the sources.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alloy {alloy.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    pass


app.command("merge", epilog=merging.MERGE_EXAMPLE, no_args_is_help=True)(merging.merge)
app.command("plan", epilog=merging.PLAN_EXAMPLE, no_args_is_help=True)(merging.plan)
app.command("symmetry", epilog=symmetry.EXAMPLE, no_args_is_help=True)(symmetry.symmetry)
app.command("distance", epilog=distances.EXAMPLE, no_args_is_help=True)(distances.distance)
