"""`python -m tasks.reports RECIPE [--publish]`: it prints what was evaluated, no more."""

import pytest

from tasks.reports.__main__ import main
from tasks.storage import read_json, write_json

TABLE = "Scores\n\n|  | accuracy |\n| --- | ---: |\n| ours | 79.0 ± 1.4 |\n"
MARKS = """\
# Mine

<!-- results: python -m tasks.reports mine --publish -->
{}<!-- end of results -->
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A workspace with an evaluated recipe and a page that has its marks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/recipes.yaml").write_text("recipes: [mine, other]\n")
    for name in ("mine", "other"):
        (tmp_path / f"params/{name}.yaml").write_text("kind: models\n")
    (tmp_path / "reports/mine").mkdir(parents=True)
    (tmp_path / "reports/mine/table.md").write_text(TABLE)
    write_json(tmp_path / "reports/mine/metrics.json", {"test": {"ours": {"accuracy": 79.0}}})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text(MARKS.format("old\n"))
    return tmp_path


def test_the_tables_are_printed_and_nothing_is_written(mine, capsys):
    main(["mine"])
    printed = capsys.readouterr().out
    assert "79.0 ± 1.4" in printed
    assert "\x1b" not in printed  # no colours where it is no terminal
    assert "The whole story: reports/mine/report.html" in printed
    assert (mine / "docs/results.md").read_text() == MARKS.format("old\n")


def test_the_page_gets_the_tables_between_its_marks(mine):
    for _ in range(2):
        main(["mine", "--publish"])
        assert (mine / "docs/results.md").read_text() == MARKS.format(TABLE)
    published = read_json(mine / "benchmarks/results/reports/mine.json")
    assert published["test"] == {"ours": {"accuracy": 79.0}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("mind", "reports: recipe 'mind' is unknown: did you mean 'mine'"),
        ("other", "reports: reports/other/table.md is missing: run `dvc repro evaluate@other`"),
    ],
)
def test_a_recipe_without_results_is_refused_with_what_to_do(mine, recipe, message):
    with pytest.raises(SystemExit, match=message):
        main([recipe])


def test_a_page_without_marks_stays_as_it_is(mine):
    (mine / "docs/results.md").write_text("nothing")
    with pytest.raises(
        SystemExit, match=r"docs/results\.md: expected the lines '<!-- results: .* mine"
    ):
        main(["mine", "--publish"])
    assert (mine / "docs/results.md").read_text() == "nothing"
