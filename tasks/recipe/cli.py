"""The pipeline's commands of `alloy`, there in a checkout: `alloy.cli.app` adds them by name.

Nothing heavy is imported before a command runs.
"""

from typing import Annotated

import typer

NEW_EXAMPLE = "Example: `alloy new mine --members hf://org/a s3://bucket/b`"


def add_to(app: typer.Typer) -> None:
    """Add the commands that need recipes."""
    app.command("new", epilog=NEW_EXAMPLE, no_args_is_help=True)(new)


def new(
    name: Annotated[str, typer.Argument(help="The recipe's name: letters, digits, _ and -.")],
    others: Annotated[list[str] | None, typer.Argument(metavar="[MEMBER]...", hidden=True)] = None,
    members: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MEMBER...",
            help="What is merged, the reference first: `hf://org/name@revision`, "
            "`s3://bucket/prefix`, `mlflow:models/NAME@alias` or a folder; "
            "`NAME=SOURCE` names one.",
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="`models`, whole checkpoints; `experts`, of one transformer.")
    ] = "models",
) -> None:
    """Write a recipe, `params/NAME.yaml`, and add it to the recipes of this checkout."""
    from tasks.recipe.new import new as write_new

    try:
        file = write_new(name, [*(members or []), *(others or [])], kind)
    except (ValueError, OSError) as error:
        typer.echo(f"alloy new: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {file}; run it: make merge RECIPE={name}")
