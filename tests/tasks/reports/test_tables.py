"""Tables on a terminal keep every name and number whole."""

import re

import pytest

from tasks.reports import markdown, tables

TABLE = """|  | ViT, same start | ResNet, same start | BERT |
| --- | ---: | ---: | ---: |
| ours_orthogonal | 79.0 ± 1.4 |  | 56.2 ± 2.2 |
| average | 48.4 ± 12.2 | 74.2 ± 14.5 | 48.5 ± 1.9 |
"""
COLUMNS = [
    ("", "ours_orthogonal", "average"),
    ("ViT, same start", "79.0 ± 1.4", "48.4 ± 12.2"),
    ("ResNet, same start", "", "74.2 ± 14.5"),
    ("BERT", "56.2 ± 2.2", "48.5 ± 1.9"),
]


def test_a_table_that_fits_is_one() -> None:
    assert list(tables.fitting(TABLE, 100)) == [COLUMNS]


def test_a_wide_table_becomes_several_that_lose_nothing() -> None:
    """Each begins with the first column; the others come once, in order, even too wide ones."""
    assert list(tables.fitting(TABLE, 45)) == [COLUMNS[:3], [COLUMNS[0], COLUMNS[3]]]
    assert [len(columns) for columns in tables.fitting(TABLE, 5)] == [2, 2, 2]


def test_a_table_survives_being_written_and_read() -> None:
    """Also a name with Markdown's own separator, or with a line break."""
    header, *rows = zip(*COLUMNS, strict=True)
    assert markdown.table(header, rows) + "\n" == TABLE
    strange = [["a | b", "1.0 ± 0.1"], ["c\nd", ""]]
    [columns] = tables.fitting(markdown.table(["", "|x|"], strange), 100)
    assert columns == [("", "a | b", "c d"), ("|x|", "1.0 ± 0.1", "")]


def test_the_best_is_the_highest_score_and_of_losses_the_lowest() -> None:
    """Equal scores are equally good; what has no error is no score."""
    assert tables.best(("accuracy", "9.5 ± 1.0", "10.0 ± 1.0", "", "99.0", "10.0 ± 2.0")) == {1, 4}
    assert tables.best(("task 0 loss", "0.250 ± 0.010", "-0.125 ± 0.010", "nan ± nan")) == {1}
    assert tables.best(("l2", "0.2500", "0.1250")) == set()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "45")
    (tmp_path / "reports/mine").mkdir(parents=True)
    (tmp_path / "reports/mine/table.md").write_text(f"Joint [accuracy]\n\n{TABLE}")


def test_what_is_printed_has_every_cell_whole_and_no_line_too_wide(mine, capsys) -> None:
    """Piped, it is plain text."""
    tables.show("mine")
    printed = capsys.readouterr().out
    assert "Joint [accuracy]" in printed
    for cell in (cell for column in COLUMNS for cell in column[1:]):
        assert cell in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 45  # the last line is a path
    assert "\x1b" not in printed


def test_a_terminal_shows_the_best_of_each_column_in_bold(mine, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    tables.show("mine")
    bold = re.findall(r"\x1b\[1m([\d.]+ ± [\d.]+)\x1b\[0m", capsys.readouterr().out)
    assert bold == ["79.0 ± 1.4", "74.2 ± 14.5", "56.2 ± 2.2"]


def test_tables_without_an_evaluation_say_what_to_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"table\.md is missing: run `dvc repro evaluate@mine`"):
        tables.show("mine")
