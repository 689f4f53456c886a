"""Write a report: metrics.json, headline.json, examples.safetensors, plots/, table.md, report.html.

Each is written whole, or stays as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tasks.reports import html, markdown
from tasks.reports.charts import save
from tasks.reports.report import Grid, Report
from tasks.storage import write_file, write_folder, write_json

SPLITS = ("test", "held_out", "validation", "calibration")
RESULTS = ("merged", "finetuned")
_ERRORS = ("_standard_error", "_spread")


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
    write_json(folder / "headline.json", headline(report.metrics))
    write_json(folder / "metrics.json", dict(report.metrics))


def headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The few of a report's metrics that DVC shows and compares: those of the result, on test data.

    Where nothing is measured on test data, those of the first split there is; where there is no
    split, all, which are distances.
    """
    split = next((name for name in SPLITS if name in metrics), None)
    if split is None:
        return dict(metrics)
    shown = {model: metrics[split][model] for model in RESULTS if model in metrics[split]}
    return {split: {model: _scores(values) for model, values in shown.items()}}


def _scores(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _scores(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if not name.endswith(_ERRORS)
    }


def tables(grids: Sequence[Grid]) -> str:
    """Tables in Markdown, each below its caption."""
    parts = (f"{grid.caption}\n\n{markdown.table(grid.header, grid.rows)}" for grid in grids)
    return "\n\n".join(parts) + "\n"
