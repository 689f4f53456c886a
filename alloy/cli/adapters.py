"""`alloy extract` and `alloy adapters`: low-rank adapters from a fine-tune, and from each other."""

import shlex
import sys
from typing import Annotated

import typer

from alloy.cli import merging
from alloy.cli.merging import Method, Output
from alloy.cli.places import named, placed, placed_adapters
from alloy.cli.wording import in_options, refusals

EXTRACT_EXAMPLE = """**Example**: layers of the least rank that keeps 90 %, at most 64

    alloy extract adapters/a models/a --base models/seed --energy 0.9 --rank 64"""

Drop = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors that stay the base's."),
]


def extract(
    output: Output,
    model: Annotated[
        str,
        typer.Argument(
            help="The fine-tune: a folder, BASE+ADAPTER, or hf://, s3://, mlflow:.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str, typer.Option(help="The checkpoint that it was trained from.", show_default=False)
    ],
    rank: Annotated[int | None, typer.Option(help="The most that a layer gets.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="In (0, 1]: each layer gets the least rank that keeps this share of the squares "
            "of what training added to it."
        ),
    ] = None,
    drop: Drop = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the decomposition of large matrices.")] = 0,
) -> None:
    """Write the low-rank adapter (PEFT) that turns a base into nearly a fine-tune of it."""
    from tqdm import tqdm

    from alloy.adapters import extract_adapter

    with refusals("extract"), tqdm(unit=" tensors", disable=None, leave=False) as bar:
        report = extract_adapter(
            placed(model),
            output,
            base=placed(base),
            rank=rank,
            energy=energy,
            drop=drop or (),
            dtype=dtype,
            seed=seed,
            on_tensor=lambda _: bar.update(),
        )
    for what, names in (("saved whole", report.saved), ("left the base's", report.dropped)):
        if names:
            typer.echo(f"{what}: {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
    ranks = report.ranks.values()
    spread = f"ranks {min(ranks)} to {max(ranks)}" if ranks else "no rank"
    typer.echo(
        f"wrote {report.output}: {len(ranks)} layers, {spread}, {report.energy:.2%} of what "
        f"training added to them, {report.num_bytes:,} bytes"
    )


ADAPTERS_EXAMPLE = """**Example**: three adapters of one base, by TIES, as an adapter of rank 32

    alloy adapters ties adapters/abc adapters/a adapters/b adapters/c --rank 32"""


def adapters(
    method: Method,
    output: Output,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]ADAPTER...",
            help="Folders as PEFT saves them, or hf://, s3://, mlflow:, of one base.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(help="Their base: for a model, and for what they hold whole (heads, biases)."),
    ] = None,
    model: Annotated[
        bool, typer.Option("--model", help="Write the base with the merged adapter on it.")
    ] = False,
    coefficients: merging.Coefficients = None,
    options: merging.Options = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the result at most; by default nothing is cut.")
    ] = None,
    dtype: merging.Dtype = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="base_model_name_or_path: they may name their base otherwise."
        ),
    ] = None,
) -> None:
    """Merge adapters of one base with each other, in the space that their factors span."""
    from alloy.adapters import merge_adapters

    with refusals("adapters"):
        report = merge_adapters(
            method,
            placed_adapters(named(merging.named_sources(sources)), base),
            output,
            base=None if base is None else placed(base),
            coefficients=merging.rows_of(coefficients or ()),
            rank=rank,
            result="model" if model else "adapter",
            dtype=dtype,
            allow=allow or (),
            command=shlex.join(["alloy", *sys.argv[1:]]),
            **merging.key_values(options or (), "--set", "OPTION=VALUE", merging.json_value),
        )
    for note in report.notes:
        typer.echo(f"note: {in_options(note)}")
    ranks = report.ranks.values()
    spread = f"{min(ranks)} to {max(ranks)}" if ranks else "none"
    typer.echo(
        f"wrote {report.output}: {len(ranks)} layers of rank {spread}, {report.num_bytes:,} bytes "
        f"in {report.seconds:.1f} s"
    )
