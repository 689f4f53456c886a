"""Tables of results on a terminal: those of `reports/<recipe>/table.md`.

They are as wide as it is, every name and number whole, and the best score of each column in bold. A
pipeline with nothing to do ends with them: this module imports no torch.
"""

import re
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.workspace import Workspace

GAP = 2  # columns between two of a table's
SCORE = re.compile(r"(-?[\d.]+) ± ")

Column = tuple[str, ...]  # header, cells


def read(recipe: str) -> str:
    """The tables of a recipe's last evaluation, as Markdown.

    Raises ValueError where there was none.
    """
    path = Workspace(recipe).table
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `dvc repro evaluate@{recipe}` first")
    return path.read_text()


def show(recipe: str) -> None:
    """Print the tables of a recipe's last evaluation.

    Raises ValueError where there was none.
    """
    console = Console(highlight=False)
    for part in re.split(r"((?:^\|.*\n)+)", read(recipe), flags=re.M):
        if part.startswith("|"):
            for columns in fitting(part, console.width):
                console.print(_drawn(columns), "")
        elif part.strip():
            console.print(escape(part.strip()))
    print(f"The whole story: {Workspace(recipe).page}")


def fitting(table: str, width: int) -> Iterator[list[Column]]:
    """The columns of a Markdown table in groups that fit, each led by the first column."""
    header, _, *rows = map(_cells, table.splitlines())
    first, *columns = zip(header, *rows, strict=True)
    room = width - _width(first)
    while columns:
        taken, used = 0, 0
        while taken < len(columns) and (not taken or used + GAP + _width(columns[taken]) <= room):
            used += GAP + _width(columns[taken])
            taken += 1
        yield [first, *columns[:taken]]
        columns = columns[taken:]


def _cells(line: str) -> list[str]:
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def best(column: Column) -> set[int]:
    """Mark a column's cells with the best score: the lowest of a loss, otherwise the highest.

    A score has its error behind it; what has none, such as a guess or a distance, does not compete.
    """
    header, *cells = column
    scores = {i: float(score[1]) for i, cell in enumerate(cells) if (score := SCORE.match(cell))}
    choose = min if header.endswith("loss") else max
    return {i for i, score in scores.items() if score == choose(scores.values())}


def _width(column: Column) -> int:
    """Columns of the terminal; a header may break between its words, a cell stays on its line."""
    header, *cells = column
    return max(map(len, [*header.split(), *cells]), default=0)


def _drawn(columns: Sequence[Column]) -> Table:
    # of a gap one column is the box's
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    shown = []
    for place, column in enumerate(columns):
        table.add_column(
            escape(column[0]),
            justify="right" if place else "left",
            width=_width(column),
            overflow="fold",
        )
        bold = best(column)
        cells = map(escape, column[1:])
        shown.append([f"[bold]{c}[/]" if i in bold else c for i, c in enumerate(cells)])
    for row in zip(*shown, strict=True):
        table.add_row(*row)
    return table
