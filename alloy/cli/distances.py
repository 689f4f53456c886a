"""`alloy distance`: how far apart checkpoints are, by the measures of arXiv:2304.14933."""

import json
from dataclasses import asdict
from itertools import combinations
from typing import Annotated, Any

import typer

from alloy.cli.places import placed
from alloy.cli.wording import refusals
from alloy.errors import MergeError

EXAMPLE = """**Example**: task vectors of two fine-tunes, layer by layer

    alloy distance models/a models/b --base models/seed --layers"""


def distance(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT CHECKPOINT...",
            help="Two or more folders, safetensors files or hf://, s3://, mlflow: sources; "
            "every pair is compared.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Compare what training added to this checkpoint, not the weights."),
    ] = None,
    keep: Annotated[
        float, typer.Option(help="The share of largest entries that TSSD compares.")
    ] = 0.2,
    zeros: Annotated[
        str,
        typer.Option(help="Entries that are 0 in both: exclude (do not count) or agree (count)."),
    ] = "exclude",
    truncation: Annotated[
        str, typer.Option(help="Where TSSD ranks entries: in each tensor, or in the whole model.")
    ] = "tensor",
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, layers included.")] = False,
) -> None:
    """Measure how far apart checkpoints are: L2, cosine and (truncated) sign dissimilarity."""
    import alloy
    from alloy.checkpoint import load_weights

    with refusals("distance"):
        if len(checkpoints) < 2:
            raise MergeError("a distance needs two checkpoints; give another one")
        folders = {source: placed(source) for source in checkpoints}
        origin = None if base is None else load_weights(placed(base))
        settings: dict[str, Any] = {"keep": keep, "zeros": zeros, "truncation": truncation}
        rows = []
        for one, other in combinations(checkpoints, 2):
            weights = (load_weights(folders[source]) for source in (one, other))
            apart = alloy.distance(*weights, base=origin, **settings)
            by_layer = {layer: asdict(values) for layer, values in apart.layers.items()}
            rows.append({"pair": [one, other], **asdict(apart.overall), "layers": by_layer})
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    _show(rows, layers)


def _show(rows: list[dict[str, Any]], layers: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    measures = ("l2", "cosine", "ssd", "tssd")
    table = Table("checkpoints", *(["layer"] if layers else []))
    for measure in measures:
        table.add_column(measure, justify="right")
    for row in rows:
        pair = " - ".join(row["pair"])
        parts = {"all": row, **row["layers"]} if layers else {"all": row}
        for layer, values in parts.items():
            name = [layer] if layers else []
            table.add_row(pair, *name, *(f"{values[measure]:.6g}" for measure in measures))
    Console().print(table)
