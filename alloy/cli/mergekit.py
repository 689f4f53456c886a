"""`alloy mergekit`: run a configuration of mergekit."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from alloy.checkpoint import plan_merge
from alloy.cli.merging import carry_out
from alloy.cli.places import local, on_hub
from alloy.cli.wording import refusals
from alloy.errors import MergeError
from alloy.mergekit import merge_request

EXAMPLE = """**Example**: the file that `mergekit-yaml config.yml merged` takes

    alloy mergekit config.yml merged"""


def mergekit(
    config: Annotated[
        Path, typer.Argument(help="A configuration of mergekit-yaml.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(help="A folder that does not exist or is empty.", show_default=False)
    ],
    threads: Annotated[int | None, typer.Option(help="Workers; by default all cores.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what the merge would do, and write nothing.")
    ] = False,
) -> None:
    """Merge as a configuration of mergekit says: its methods, slices, filters and gradients.

    What has no counterpart here is refused by name, with what comes nearest.
    """
    with refusals("mergekit"):
        translation = merge_request(_read(config), output, locate=lambda name: local(on_hub(name)))
        planned = plan_merge(translation.request)
        for note in translation.notes:
            typer.echo(f"note: {note}")
        if plan:
            typer.echo(planned)
            return
        carry_out(planned, threads=threads, command=shlex.join(["alloy", *sys.argv[1:]]))


def _read(path: Path) -> Any:
    """The one configuration in a file."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if d is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MergeError(f"{path}: {' '.join(str(error).split())}") from error
    if len(documents) != 1:
        raise MergeError(
            f"{path}: {len(documents)} configurations in one file; write one file each, and name "
            "the output of one as a model of the next"
        )
    return documents[0]
