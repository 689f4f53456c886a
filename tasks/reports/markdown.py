"""Markdown tables: the one place that writes them."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_names: int = 1) -> str:
    """A table whose first `num_names` columns have text and whose others have numbers.

    A cell stays on its line and in its column: line breaks become spaces, `|` is escaped.
    """
    rule = ["---" if place < num_names else "---:" for place in range(len(header))]
    lines = [[on_one_line(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def on_one_line(cell: str) -> str:
    return " ".join(cell.split()).replace("|", r"\|")
