"""`alloy average`: the last checkpoints of one run become one."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from alloy.cli.merging import carry_out
from alloy.cli.wording import refusals
from alloy.errors import MergeError
from alloy.merging.decay import DECAYS, decay_coefficients

EXAMPLE = """**Example**: as if the rate of the last 8 checkpoints' training had fallen linearly

    alloy average runs/base --last 8 --decay linear"""

_STEP = re.compile(r"(?P<word>.*?)(?P<step>\d+)")


def average(
    run: Annotated[
        Path,
        typer.Argument(
            help="A folder whose folders are checkpoints, numbered: checkpoint-100, step_200.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="A folder that does not exist; RUN-average without it.")
    ] = None,
    last: Annotated[int, typer.Option(help="How many checkpoints, the last ones.")] = 8,
    decay: Annotated[
        str,
        typer.Option(help=f"The decay of the rate that the mean stands for: {', '.join(DECAYS)}."),
    ] = "linear",
    dtype: Annotated[
        str | None, typer.Option(help="Of the result; by default the checkpoints'.")
    ] = None,
) -> None:
    """Average the last checkpoints of a run, weighted as a decay of its learning rate would.

    A run at a constant rate needs no decay phase: the weighted mean stands for it
    (arXiv:2507.17634).
    """
    from alloy.checkpoint import MergeRequest, plan_merge

    with refusals("average"):
        if last < 1:
            raise MergeError(f"--last {last}: average one or more")
        coefficients = decay_coefficients(last, decay)
        folders, incomplete = checkpoints_of(run, last)
        if incomplete:
            typer.echo(f"note: {left_out(incomplete)}", err=True)
        target = run.with_name(f"{run.resolve().name}-average") if output is None else output
        plan = plan_merge(
            MergeRequest("linear", folders, target, coefficients=coefficients, dtype=dtype)
        )
        carry_out(plan, command=shlex.join(["alloy", *sys.argv[1:]]))
    for name, coefficient in zip(folders, coefficients, strict=True):
        typer.echo(f"{coefficient:8.4f}  {name}")


def checkpoints_of(run: Path, last: int) -> tuple[dict[str, Path], list[str]]:
    """The last numbered checkpoints in a folder, by name, in the order of their numbers.

    Returns:
        Them, and the names of folders that would be among them if they had a config.json: the
        checkpoint at which a run was interrupted is such a one.

    Raises:
        MergeError: there are fewer, or they are numbered under several words.
    """
    if not run.is_dir():
        raise MergeError(f"{run}: no such folder")
    numbered = sorted(
        (int(match["step"]), match["word"], folder)
        for folder in run.iterdir()
        if (match := _STEP.fullmatch(folder.name)) and folder.is_dir()
    )
    found = [entry for entry in numbered if (entry[2] / "config.json").is_file()]
    words = sorted({word for _, word, _ in found})
    if len(words) > 1:
        raise MergeError(
            f"{run}: checkpoints are called {', '.join(f'{word}N' for word in words)}: which are "
            "the run's? Move the others away"
        )
    chosen = found[-last:]
    incomplete = [
        folder.name
        for step, word, folder in numbered
        if word in words and (step, word, folder) not in found and step > chosen[0][0]
    ]
    if len(found) < last:
        raise MergeError(
            f"{run} has {len(found)} numbered checkpoints (folders with config.json), fewer than "
            f"--last {last}{f'; {left_out(incomplete)}' if incomplete else ''}"
        )
    return {folder.name: folder for _, _, folder in chosen}, incomplete


def left_out(incomplete: Sequence[str]) -> str:
    """The words that say which numbered folders are no part of the mean, and why."""
    return f"left out, without config.json (interrupted?): {', '.join(incomplete)}"
