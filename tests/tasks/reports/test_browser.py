"""A report in a browser: nothing sticks out, nothing fails, and dark mode is dark.

Runs where there is a Chromium (Debian's package `chromium`, or Google's Chrome).
"""

import json
import re
import runpy
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tasks.reports import html
from tasks.reports.html import element, picture
from tasks.reports.report import Chart, Grid, Markup, Report, Section
from tasks.reports.writer import write

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 60
PHONE, DESK = 360, 1440
REPOSITORY = Path(__file__).parents[3]
SCREENSHOTS = REPOSITORY / ".pytest_cache" / "screenshots"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]

# A frame as wide as the screen; what the page in it measures becomes the title.
SCREEN = """<!doctype html><meta charset="utf-8"><title>not measured</title>
<iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  const root = page.documentElement;
  const boxes = [...page.querySelectorAll(".wide")];
  document.title = JSON.stringify({{
    screen: root.clientWidth,
    page: root.scrollWidth,
    scrolling: boxes.filter((box) => box.scrollWidth > box.clientWidth).length,
    paper: page.defaultView.getComputedStyle(page.body).backgroundColor,
    broken: [...page.images].filter((image) => !image.naturalWidth).length,
  }});
}});
</script>
"""


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


def look(page: str, folder: Path, width: int, *options: str) -> tuple[dict, str]:
    """What a page measures on a screen, and what the browser's console said."""
    file = folder / "screen.html"
    file.write_text(SCREEN.format(width=width, page=escape(page)))
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={DESK},900",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", *options,
            file.as_uri(),
        ],
        capture_output=True, text=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout)[:1]
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return json.loads(unescape(title)), console


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_sticks_out_and_nothing_fails(page, tmp_path, width):
    """Only tables and charts are wider than a phone, and those scroll in their own boxes."""
    measured, console = look(page, tmp_path, width)
    assert console == ""
    assert measured["broken"] == 0
    assert measured["page"] <= measured["screen"] <= width
    if width == PHONE:
        assert measured["scrolling"] == 3


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_real_page_fits_and_is_kept_as_a_picture(tmp_path, width):
    """The page of a recipe that was run; its screenshot stays in .pytest_cache/screenshots."""
    recipe = runpy.run_path(str(REPOSITORY / "examples/recipe.py"))
    page = recipe["main"](tmp_path / "recipe")
    measured, console = look(page.read_text(), tmp_path, width)
    assert console == ""
    assert measured["broken"] == 0
    assert measured["page"] <= measured["screen"] <= width
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    picture = SCREENSHOTS / f"report_{width}.png"
    picture.unlink(missing_ok=True)
    look(page.read_text(), tmp_path, width, f"--screenshot={picture}")
    assert picture.stat().st_size > 10_000


def test_the_reader_chooses_between_light_and_dark(page, tmp_path):
    colours = [
        look(page, tmp_path, DESK, f"--blink-settings=preferredColorScheme={scheme}")[0]["paper"]
        for scheme in (0, 1)  # dark, light
    ]
    assert colours == ["rgb(20, 24, 29)", "rgb(255, 255, 255)"]
