"""The report of a recipe of kind "models" as one self-contained HTML page."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from tasks.experts.page import STYLE
from tasks.models.report import Grid

STORY = (
    "<p>Networks that were trained apart compute alike with their units in different orders. Alignment brings the "
    "units together, by weights and by what they compute on calibration data (arXiv:2209.04836, 2403.01753); merging "
    "then takes one weight for each. <i>parent i</i> is member i of a set alone, <i>ensemble</i> runs all of them.</p>"
)


def render(
    recipe: str,
    grids: Mapping[str, Sequence[Grid]],
    charts: Mapping[Path, str],
    warnings: Sequence[str],
) -> str:
    """The page; `charts` are PNG files with what they show."""
    parts = [f"<h1>{escape(recipe)}: models of sets, merged</h1>", STORY]
    for heading, found in grids.items():
        if found:
            parts.append(f"<h2>{escape(heading)}</h2>")
            parts += [_chart(path, text) for path, text in charts.items() if _of(path) == heading]
            parts += map(_table, found)
    if warnings:
        items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
        parts.append(f"<h2>Warnings</h2><ul>{items}</ul>")
    title = f"Alloy: the {escape(recipe)} recipe"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _of(chart: Path) -> str:
    """The heading that a chart stands under."""
    return "How well they do" if chart.stem == "scores" else "Barriers between the parents"


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in grid.header)
    body = "".join(
        f"<tr{' class=ours' if row[0] == grid.ours else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in grid.rows
    )
    return (
        f'<p>{escape(grid.caption)}</p><div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    )


def _chart(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img class="chart" alt="{escape(text)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(text)}</figcaption></figure>"
    )
