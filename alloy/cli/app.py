"""`alloy`: every command under one name.

In a checkout of the project the package `tasks` lies beside this library, with a graph of stages,
`dvc.yaml`; its module `tasks.recipe.cli` adds the commands that need recipes (`alloy new`). The
library knows that name and no more: an installed wheel has none of it, and nothing is ever
imported from the current folder.
"""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

import alloy
from alloy.cli import adapters, averaging, distances, mergekit, merging, symmetry

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
app.command("mergekit", epilog=mergekit.EXAMPLE, no_args_is_help=True)(mergekit.mergekit)
app.command("average", epilog=averaging.EXAMPLE, no_args_is_help=True)(averaging.average)
app.command("adapters", epilog=adapters.ADAPTERS_EXAMPLE, no_args_is_help=True)(adapters.adapters)
app.command("extract", epilog=adapters.EXTRACT_EXAMPLE, no_args_is_help=True)(adapters.extract)
app.command("symmetry", epilog=symmetry.EXAMPLE, no_args_is_help=True)(symmetry.symmetry)
app.command("distance", epilog=distances.EXAMPLE, no_args_is_help=True)(distances.distance)


PIPELINE = "tasks/recipe/cli.py"  # of a checkout: what adds the commands that need recipes


def add_pipeline(root: Path) -> None:
    """Add the commands of a checkout, if `root`, the folder of this library, is one."""
    if (root / "dvc.yaml").is_file() and (root / PIPELINE).is_file():
        import_module(PIPELINE.removesuffix(".py").replace("/", ".")).add_to(app)


add_pipeline(Path(alloy.__file__).parents[1])
