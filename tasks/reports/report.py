"""A report as a value: sections of tables, charts and text, with the numbers behind them.

Each family of recipes builds one from what it measured; `tasks.reports.writer` writes any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


class Markup(str):
    """HTML that stands as it is; every other string is text, and escaped."""

    __slots__ = ()


@dataclass(frozen=True)
class Grid:
    """A table. The first cell of a row is its name; the others are numbers, or text."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: str | None = None  # the name of the row that the recipe is about
    numbers: bool = True


@dataclass(frozen=True)
class Chart:
    """A figure, the name of its file in `plots/` without its ending, and what it shows."""

    name: str
    text: str
    figure: Figure


Part = Grid | Chart | Markup | str  # a string is a paragraph


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading; the first of a page may have none."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The contents of `reports/<recipe>/`."""

    recipe: str
    title: str  # the page's headline
    sections: Sequence[Section]
    tables: Sequence[Grid]  # of table.md, and of the terminal
    metrics: Mapping[str, Any]  # of metrics.json
    rows: Mapping[str, Sequence[Any]]  # of plots/<name>.json: dataclasses, for `dvc plots`
    by_example: Mapping[str, Tensor] = field(default_factory=dict)
    """The result's values by `SPLIT/MODEL/BENCHMARK/METRIC`, which promotion compares in pairs."""

    @property
    def charts(self) -> list[Chart]:
        """Charts of all sections, in their order."""
        return [p for section in self.sections for p in section.parts if isinstance(p, Chart)]
