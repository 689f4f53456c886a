"""Tables of results on a terminal: as wide as it is, every name and number whole."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

REPORTS = Path("reports")
NARROWEST = 100  # columns that are taken where there is no terminal, or a narrower one
GAP = 2  # columns between two of a table's

Column = tuple[str, ...]  # header, cells


def show(recipe: str) -> None:
    """Print the tables of a recipe's last evaluation.

    Raises ValueError where there was none.
    """
    path = REPORTS / recipe / "table.md"
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro evaluate@{recipe}` first")
    console = Console(width=max(Console().width, NARROWEST), highlight=False)
    for part in re.split(r"((?:^\|.*\n)+)", path.read_text(), flags=re.M):
        if not part.startswith("|"):
            console.print(escape(part.strip()))
            continue
        for columns in fitting(part, console.width):
            console.print(_drawn(columns), "")
    print(f"The whole story: {REPORTS / recipe / 'report.html'}")


def fitting(table: str, width: int) -> Iterator[list[Column]]:
    """The columns of a Markdown table in groups that fit, each with the first column of the whole."""
    header, _, *rows = (
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()
    )
    first, *columns = zip(header, *rows, strict=True)
    room = width - _width(first)
    while columns:
        taken, used = 0, 0
        while taken < len(columns) and (not taken or used + GAP + _width(columns[taken]) <= room):
            used += GAP + _width(columns[taken])
            taken += 1
        yield [first, *columns[:taken]]
        columns = columns[taken:]


def _width(column: Column) -> int:
    """Columns of the terminal; a header may break between its words, a cell stays on its line."""
    header, *cells = column
    return max(map(len, [*header.split(), *cells]), default=0)


def _drawn(columns: Sequence[Column]) -> Table:
    # of a gap one column is the box's
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    for place, column in enumerate(columns):
        width = _width(column)
        table.add_column(
            escape(column[0]), justify="right" if place else "left", width=width, overflow="fold"
        )
    for row in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(escape, row))
    return table
