"""The page of a report is one file that loads nothing, and text is never markup."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from tasks.reports import html, writer
from tasks.reports.report import Chart, Grid, Markup, Report, Section
from tests.tasks.reports.pages import Page, section

HOSTILE = '<script>alert("1")</script> & \'"'


def report(text: str = HOSTILE, num_columns: int = 40) -> Report:
    """A report that has `text` wherever text goes, and a table wider than any screen."""
    wide = Grid(
        text, ["", *[text] * num_columns], [[text, *["1.0 ± 0.1"] * num_columns]], ours=text
    )
    words = Grid("", ["a", "b"], [["x", text]], numbers=False)
    return Report(
        recipe=text,
        title=text,
        sections=[
            Section("", [text, Markup("<p><i>ready</i></p>")]),
            Section(text, [wide, words, Chart("chart", text, Figure()), html.listing([text])]),
            Section("Nothing", []),
        ],
        tables=[wide],
        metrics={"test": {"a": 1.0}},
        rows={"rows": []},
    )


@pytest.fixture
def written(tmp_path):
    writer.write(report(), tmp_path / "report")
    return tmp_path / "report"


def test_text_from_anywhere_is_escaped_and_every_element_closed(written):
    """Names, captions, cells, headings and titles are text; what is ready-made stays."""
    page = Page((written / "report.html").read_text())
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert page.text.count(HOSTILE) >= 8
    assert page.tags.count("i") == 1


def test_a_page_loads_nothing(written):
    text = (written / "report.html").read_text()
    loaded = Page(text).loaded
    assert loaded
    assert all(source.startswith("data:image/png;base64,") for source in loaded)
    assert "url(" not in text
    assert "@import" not in text


def test_the_row_that_a_recipe_is_about_stands_out(written):
    rows = re.findall(r'<tr class="ours">', (written / "report.html").read_text())
    assert len(rows) == 1


def test_a_section_without_parts_has_no_heading(written):
    assert "Nothing" not in (written / "report.html").read_text()


def test_every_table_scrolls_in_a_box_of_its_own(written):
    text = (written / "report.html").read_text()
    assert text.count("<table>") == text.count('<div class="wide"><table>') == 2


def test_a_dark_page_gives_every_colour_that_a_light_one_has():
    light, dark = html.STYLE.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--\w+):", light))
    assert names == set(re.findall(r"(--\w+):", dark))
    assert set(re.findall(r"var\((--\w+)\)", html.STYLE)) == names


def test_pictures_say_what_they_show():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    assert 'alt="a &quot;cat&quot;"' in html.picture(pixels, 'a "cat"')


def test_parts_keep_their_order_and_equal_reports_equal_bytes(tmp_path):
    for name in ("one", "two"):
        writer.write(report("plain"), tmp_path / name)
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert [path.name for path in files] == [
        "examples.safetensors",
        "headline.json",
        "metrics.json",
        "chart.png",
        "rows.json",
        "report.html",
        "table.md",
    ]
    for path in files:
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes()
    shown = section((tmp_path / "one/report.html").read_text(), "plain")
    assert shown.index("<table>") < shown.index("<figure>") < shown.index("<ul>")


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        (
            {"validation": {"merged": {"b": {"r": 9.0}}},
             "test": {"naive": {"b": {"r": 1.0}},
                      "merged": {"b": {"r": 2.0, "r_standard_error": 0.5}, "loss_spread": 3.0}}},
            {"test": {"merged": {"b": {"r": 2.0}}}},
        ),
        ({"calibration": {"finetuned": {"loss": 1.0}, "x": {}}},
         {"calibration": {"finetuned": {"loss": 1.0}}}),
        ({"a - b": {"l2": 1.0}}, {"a - b": {"l2": 1.0}}),
    ],
)  # fmt: skip
def test_headlines_are_the_results_scores_on_test_data(metrics, shown):
    assert writer.headline(metrics) == shown
