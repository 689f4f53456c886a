"""A report in a browser: nothing sticks out, nothing fails, and dark mode is dark.

Runs where there is a Chromium (Debian's package `chromium`, or Google's Chrome).
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tasks.reports import html
from tasks.reports.html import element, picture
from tasks.reports.report import Chart, Grid, Markup, Report, Section
from tasks.reports.writer import write
from tests.tasks.reports.browser import CHROMIUM, DESK, PHONE, fits, look

REPOSITORY = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]


def report() -> Report:
    """Every kind of part, each wider or longer than a phone."""
    words = "a_name_without_any_place_to_break_it_" * 5
    numbers = Grid(
        words, ["", *[f"benchmark {i}" for i in range(12)]], [["x", *["99.9 ± 0.1"] * 12]]
    )
    scene = picture(np.zeros((48, 48, 3), dtype=np.uint8), "a scene")
    pictures = Grid(
        "", ["", words], [[words, element("div", *[scene] * 12, style="line")]], numbers=False
    )
    figure = Figure(figsize=(13, 4))
    figure.subplots().plot([1, 2])
    box = element("span", words, style="box")
    fact = element("div", element("b", words), words, style="fact")
    return Report(
        recipe="toy",
        title=words,
        sections=[
            Section("", [words, Markup(element("div", box, box, style="row")), fact]),
            Section(words, [numbers, pictures, Chart("chart", words, figure)]),
            Section("Warnings", [html.listing([words])]),
        ],
        tables=[numbers],
        metrics={},
        rows={},
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write(report(), folder / "toy")
    return (folder / "toy/report.html").read_text()


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_sticks_out_and_nothing_fails(page, tmp_path, width):
    """Only tables and charts are wider than a phone, and those scroll in their own boxes."""
    measured, console = look(page, tmp_path, width)
    assert console == ""
    assert measured["broken"] == 0
    assert measured["page"] <= measured["screen"] <= width
    if width == PHONE:
        assert measured["scrolling"] == 3


def test_the_page_of_members_merged_as_they_are_fits(tmp_path):
    """The page of a recipe from Python, on a phone and on a desk; screenshots are kept."""
    recipe = runpy.run_path(str(REPOSITORY / "examples/recipe.py"))
    fits(recipe["main"](tmp_path / "recipe"), tmp_path)


def test_the_reader_chooses_between_light_and_dark(page, tmp_path):
    colours = [
        look(page, tmp_path, DESK, f"--blink-settings=preferredColorScheme={scheme}")[0]["paper"]
        for scheme in (0, 1)  # dark, light
    ]
    assert colours == ["rgb(20, 24, 29)", "rgb(255, 255, 255)"]
