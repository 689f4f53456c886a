"""The study of real towers: its measures, and that its tables hold what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks.towers import table
from benchmarks.towers.whisper import distance

SCORES = {"cross_entropy": 1.5, "agreement": 60.0, "word_error_rate": 40.0, "cpu_seconds": 9}


@pytest.mark.parametrize(
    ("right", "found", "expected"),
    [("a b c", "a b c", 0), ("a b c", "a x c", 1), ("a b", "a b c d", 2), ("a b c", "", 3)],
)
def test_word_errors_are_counted(right, found, expected):
    assert distance(right.split(), found.split()) == expected


def test_the_table_has_means_over_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results = tmp_path / "towers"
    results.mkdir()
    for draw, agreement in enumerate((60.0, 70.0)):
        arms = {"average": {**SCORES, "agreement": agreement}}
        (results / f"whisper_all_{draw}.json").write_text(json.dumps({"arms": arms}))
        steps = {"200": {**SCORES, "agreement": agreement}, **({"1000": SCORES} if draw else {})}
        (results / f"distilled_all_{draw}.json").write_text(json.dumps({"average": steps}))
    dims = {"width": 100, "layer": "0.fc1.weight", "dims": [10, 50, 90]}
    rows = [{**dims, "member": member} for member in ("encoder", "decoder")]
    (results / "slack.json").write_text(json.dumps(rows))
    monkeypatch.setattr(table, "RESULTS", results)
    table.write()
    text = (tmp_path / "towers.md").read_text()
    assert "| average | 1.5 ± 0 | 65 ± 7.1 | 40 ± 0 |" in text
    assert "| average, 200 | 1.5 ± 0 | 65 ± 7.1 | 40 ± 0 |" in text
    assert "| average, 1000 | 1.5 | 60 | 40 |" in text
    assert "| 0.fc1 | 0.10 0.50 0.90 | 0.10 0.50 0.90 | 0.20 | 1.00 |" in text
