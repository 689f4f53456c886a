"""The pipeline's commands of `alloy`, there in a checkout: `alloy.cli.app` adds them by name.

Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from alloy.cli import places

NEW_EXAMPLE = "Example: `alloy new mine --members hf://org/a s3://bucket/b`"

PUSH_EXAMPLE = "Example: `alloy push models/mine/merged hf://org/name`, then the same with `--yes`"


def add_to(app: typer.Typer) -> None:
    """Add the commands that need recipes, and bring the sources of all others by fetch's code."""
    places.bring_by(_bring, _stream)
    app.command("new", epilog=NEW_EXAMPLE, no_args_is_help=True)(new)
    app.command("push", epilog=PUSH_EXAMPLE, no_args_is_help=True)(push)


def _bring(source: str, on: str | None) -> Path:
    from tasks.sources.cache import cached

    return cached(source, on)


def _stream(source: str) -> Path:
    from tasks.sources.streamed import streamed

    return streamed(source)


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


def push(
    folder: Annotated[Path, typer.Argument(help="A model or an adapter with its card.")],
    target: Annotated[str, typer.Argument(help="`hf://ORG/NAME`.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Send it; without: say what would be.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Anybody may read it.")] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="Its licence, where the card states none.")
    ] = None,
) -> None:
    """Say what a push to a Hugging Face hub would send and, with --yes, send it."""
    from tasks.sources.push import plan, send

    try:
        planned = plan(folder, target, licence=licence, private=not public)
        typer.echo(planned)
        if not yes:
            typer.echo("nothing was sent: --yes sends it")
            return
        typer.echo(f"pushed: {send(planned)}")
    except (ValueError, OSError) as error:
        typer.echo(f"alloy push: {error}", err=True)
        raise typer.Exit(1) from error
