"""`alloy extract`: an adapter of PEFT from a full fine-tune."""

from pathlib import Path
from typing import Annotated

import typer

from alloy.cli.wording import refusals

EXTRACT_EXAMPLE = """**Example**: layers of the least rank that keeps 90 %, at most 64

    alloy extract adapters/a models/a --base models/seed --energy 0.9 --rank 64"""

Drop = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors that stay the base's."),
]


def extract(
    output: Annotated[
        Path, typer.Argument(help="A folder that does not exist or is empty.", show_default=False)
    ],
    model: Annotated[
        str, typer.Argument(help="The fine-tune: a folder, or BASE+ADAPTER.", show_default=False)
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
            model,
            output,
            base=base,
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
