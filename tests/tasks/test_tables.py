"""Tables on a terminal keep every name and number whole."""

from tasks import tables

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
    """Each begins with the first column; the others are there once, in order, even where they do not fit."""
    assert list(tables.fitting(TABLE, 45)) == [COLUMNS[:3], [COLUMNS[0], COLUMNS[3]]]
    assert [len(columns) for columns in tables.fitting(TABLE, 5)] == [2, 2, 2]


def test_what_is_printed_has_every_cell_whole_and_no_line_too_wide(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "NARROWEST", 45)
    monkeypatch.setenv("COLUMNS", "45")
    (tmp_path / "reports/mine").mkdir(parents=True)
    (tmp_path / "reports/mine/table.md").write_text(f"Joint [accuracy]\n\n{TABLE}")
    tables.show("mine")
    printed = capsys.readouterr().out
    assert "Joint [accuracy]" in printed
    for cell in (cell for column in COLUMNS for cell in column[1:]):
        assert cell in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 45  # the last line is a path
