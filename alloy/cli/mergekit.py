"""`alloy mergekit`: run a configuration of mergekit."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from alloy.cli.merging import Allow, Copy, Drop, Kept, carry_out, key_values
from alloy.cli.places import local, on_hub
from alloy.cli.wording import refusals
from alloy.errors import MergeError

EXAMPLE = """**Example**: the file that `mergekit-yaml config.yml merged` takes

    alloy mergekit config.yml merged"""
FILE = {
    "base": "base_model",
    "chat_template": "chat_template",
    "dtype": "dtype",
    "tokenizer": "tokenizer_source",
}
"""Arguments that are keys of the file."""


def mergekit(
    config: Annotated[
        Path, typer.Argument(help="A configuration of mergekit-yaml.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Argument(help="A folder that does not exist or is empty.", show_default=False)
    ],
    kept: Kept = None,
    copy: Copy = None,
    drop: Drop = None,
    allow: Allow = None,
    threads: Annotated[int | None, typer.Option(help="Workers; by default all cores.")] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what the merge would do, and write nothing.")
    ] = False,
) -> None:
    """Merge as a configuration of mergekit says: its methods, slices, filters and gradients.

    What has no counterpart here is refused by name, with what comes nearest. What its files cannot
    say, and `alloy merge` asks, is said by --kept, --copy, --drop and --allow.
    """
    from alloy.checkpoint import plan_merge
    from alloy.mergekit import merge_request

    with refusals("mergekit", FILE):
        translation = merge_request(_read(config), output, locate=lambda name: local(on_hub(name)))
        request = replace(
            translation.request,
            kept=kept or (),
            copy=key_values(copy or (), "--copy", "PATTERN=NAME", str),
            drop=drop or (),
            allow=(*translation.request.allow, *(allow or ())),
        )
        planned = plan_merge(request)
        for note in translation.notes:
            typer.echo(f"note: {note}")
        if plan:
            typer.echo(planned)
            return
        carry_out(planned, threads=threads, command=shlex.join(["alloy", *sys.argv[1:]]))


def _read(path: Path) -> Any:
    """The one configuration in a file."""
    import yaml

    from alloy.yaml_keys import UniqueKeysLoader

    try:
        text = path.read_text()
        _refuse_bombs(path, text)
        documents = [d for d in yaml.load_all(text, UniqueKeysLoader) if d is not None]
    except OSError as error:
        raise MergeError(f"{path}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise MergeError(f"{path}: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise MergeError(f"{path}: nested too deeply to be a configuration") from None
    if not documents:
        raise MergeError(f"{path}: it is empty; write models or slices, and merge_method")
    if len(documents) != 1:
        raise MergeError(
            f"{path}: {len(documents)} configurations in one file; write one file each, and name "
            "the output of one as a model of the next"
        )
    return documents[0]


def _refuse_bombs(path: Path, text: str) -> None:
    """Aliases within what an alias may repeat grow without end; a configuration needs none."""
    import yaml

    from alloy.yaml_keys import UniqueKeysLoader

    inside = 0  # the depth of collections since the outermost one with an anchor
    for event in yaml.parse(text, UniqueKeysLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            inside += 1 if inside or event.anchor else 0
        elif isinstance(event, yaml.CollectionEndEvent):
            inside -= 1 if inside else 0
        elif isinstance(event, yaml.AliasEvent) and inside:
            raise MergeError(
                f"{path}: line {event.start_mark.line + 1}: an alias (*{event.anchor}) within what "
                "has an anchor itself: write it out"
            )
