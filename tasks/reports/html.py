"""The one HTML skeleton: a report as one self-contained page, for somebody who looks.

Pictures are embedded, nothing is loaded, no script runs. The page fits a phone (a table or chart
that is wider scrolls in a box of its own) and follows the reader's choice of light or dark. Text is
escaped here; only `Markup` stands as it is.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

from tasks.reports.report import Chart, Grid, Markup, Part, Report, Section

STYLE = """
:root { color-scheme: light dark; --text: #1d2733; --paper: #ffffff; --soft: #56636f;
        --line: #dde3e9; --box: #f6f8fa; --ours: #fdf1e8; --accent: #c75f1c; --frame: #c4ccd4;
        --v: #dcebfa; --l: #e4f3dd; --vl: #efe3f7; --merged: #fbd9bf;
        --yes: #1f7a45; --no: #b3362b; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e8ed; --paper: #14181d; --soft: #a3afba; --line: #323b45; --box: #1e242b;
          --ours: #3a2618; --accent: #f0955a; --frame: #4a5663; --v: #1d3550; --l: #24401d;
          --vl: #3c2650; --merged: #5a3218; --yes: #58c486; --no: #f0857b; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper);
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; line-height: 1.25; }
p.small { margin-bottom: 0; } p.small, figcaption { color: var(--soft); font-size: 14px; }
figure { margin: 1rem 0; }
.wide { overflow-x: auto; max-width: 100%; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
         font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td { white-space: nowrap; } td.words { white-space: normal; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
tr.ours td { background: var(--ours); }
img { max-width: 100%; }
img.chart { background: #ffffff; border-radius: 6px; padding: .3rem; display: block;
            min-width: 640px; }
img.scene { width: 66px; max-width: none; image-rendering: pixelated; display: block;
            border: 3px solid transparent; }
img.map { border: 1px solid var(--frame); } img.right { border-color: #2e9e5b; }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem; }
.line { display: flex; gap: .2rem; }
.box { border: 1px solid var(--frame); border-radius: 8px; padding: .45rem .8rem;
       background: var(--box); }
.box.v { background: var(--v); } .box.l { background: var(--l); } .box.vl { background: var(--vl); }
.box.m { background: var(--merged); font-weight: 600; }
.arrow { font-size: 1.5rem; color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.2rem 0; }
.fact { flex: 1 1 15rem; border-left: 4px solid var(--accent); padding: .2rem .8rem; }
.fact b { font-size: 1.7rem; display: block; } .yes { color: var(--yes); } .no { color: var(--no); }
code { font-size: 13px; word-break: break-all; }
a { color: var(--accent); }
"""


def render(report: Report, pictures: Mapping[str, bytes]) -> str:
    """A report's page; `pictures` are its charts' PNG bytes by name."""
    sections = (_section(section, pictures) for section in report.sections)
    return page(f"Alloy: the {report.recipe} recipe", report.title, sections)


def page(title: str, headline: str, sections: Iterable[Markup]) -> str:
    """A whole HTML document: its title, its headline, its parts in their order."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{escape(headline)}</h1>{''.join(sections)}</body></html>\n"
    )


def _section(section: Section, pictures: Mapping[str, bytes]) -> Markup:
    """A section, nothing where it has no parts."""
    if not section.parts:
        return Markup()
    heading = f"<h2>{escape(section.heading)}</h2>" if section.heading else ""
    return Markup(heading + "".join(_part(part, pictures) for part in section.parts))


def _part(part: Part, pictures: Mapping[str, bytes]) -> Markup:
    if isinstance(part, Grid):
        return table(part)
    if isinstance(part, Chart):
        return figure(pictures[part.name], part.text)
    return part if isinstance(part, Markup) else element("p", part)


def text(value: str) -> Markup:
    """Text as HTML; what is HTML already stays."""
    return value if isinstance(value, Markup) else Markup(escape(value))


def element(tag: str, *parts: str, style: str = "") -> Markup:
    """An element around text or HTML."""
    opening = f'<{tag} class="{escape(style)}">' if style else f"<{tag}>"
    return Markup(f"{opening}{''.join(map(text, parts))}</{tag}>")


def link(address: str, words: str) -> Markup:
    """Words that lead somewhere; nothing is loaded before somebody follows them."""
    return Markup(f'<a href="{escape(address)}">{text(words)}</a>')


def table(grid: Grid) -> Markup:
    """A table that scrolls in a box of its own where it is wider than the page."""
    style = "" if grid.numbers else "words"
    lines = [_line("th", grid.header, style)]
    for row in grid.rows:
        lines.append(_line("td", row, style, ours=row[0] == grid.ours))
    caption = element("p", grid.caption, style="small") if grid.caption else Markup()
    return Markup(caption + element("div", element("table", *lines), style="wide"))


def _line(tag: str, cells: Sequence[str], style: str, *, ours: bool = False) -> Markup:
    row = (element(tag, cell, style=style) for cell in cells)
    return element("tr", *row, style="ours" if ours else "")


def listing(items: Iterable[str]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


def figure(png: bytes, caption: str) -> Markup:
    """A chart with its caption."""
    box = element("div", image(png, caption, "chart"), style="wide")
    return element("figure", box, element("figcaption", caption))


def picture(pixels_HW3: np.ndarray, alternative: str, style: str = "scene") -> Markup:
    """A small picture from its pixels, uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, format="PNG")
    return image(buffer.getvalue(), alternative, style)


def image(png: bytes, alternative: str, style: str) -> Markup:
    """A PNG in the page itself; `alternative` says what it shows to those who do not see it."""
    data = base64.b64encode(png).decode()
    return Markup(
        f'<img class="{escape(style)}" alt="{escape(alternative)}" '
        f'src="data:image/png;base64,{data}">'
    )
