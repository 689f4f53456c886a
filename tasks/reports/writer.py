"""Write a report: metrics.json, examples.safetensors, plots/, table.md and report.html.

Each is written whole, or stays as it was.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file

from tasks.reports import html, markdown
from tasks.reports.charts import save
from tasks.reports.report import Grid, Report
from tasks.storage import write_file, write_folder, write_json


def write(report: Report, folder: Path) -> None:
    """Write everything that `reports/<recipe>/`, the folder, holds.

    The metrics come last: where they are new, everything else is.
    """
    with write_folder(folder / "plots") as plots:
        for name, rows in report.rows.items():
            write_json(plots / f"{name}.json", [asdict(row) for row in rows])
        for chart in report.charts:
            save(chart.figure, plots / f"{chart.name}.png")
        pictures = {
            chart.name: (plots / f"{chart.name}.png").read_bytes() for chart in report.charts
        }
        page = html.render(report, pictures)
    for name, text in (("report.html", page), ("table.md", tables(report.tables))):
        with write_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    with write_file(folder / "examples.safetensors") as partial:
        save_file(dict(report.by_example), partial)
    write_json(folder / "metrics.json", dict(report.metrics))


def tables(grids: Sequence[Grid]) -> str:
    """Tables in Markdown, each below its caption."""
    parts = (f"{grid.caption}\n\n{markdown.table(grid.header, grid.rows)}" for grid in grids)
    return "\n\n".join(parts) + "\n"
