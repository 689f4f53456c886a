"""What a stage took: measured with its processes, kept however it ended, shown on its page."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tasks import usage
from tasks.reports.html import render
from tasks.reports.origin import runs
from tasks.reports.report import Report
from tasks.usage import Usage, last_runs, measured

MIB = 2**20
CHILD = "import sys, os; d = bytearray(os.urandom(8 * 2**20)) * 8; open(sys.argv[1], 'wb').write(d)"
ONE = Usage("merge", "2026-11-27T10:00:00+00:00", False, 2.0, 3.5, 5 * MIB, 7 * MIB, None)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(usage, "RUNS", tmp_path / "runs")
    return tmp_path


def test_processes_of_a_stage_count(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What a child wrote and computed is the stage's, though the child is gone at its end."""
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)
    with measured("mine", "merge"):
        subprocess.run([sys.executable, "-S", "-c", CHILD, str(folder / "file")], check=True)
    taken = last_runs("mine")["merge"]
    assert not taken.failed
    assert taken.seconds > 0
    assert taken.cpu_seconds > 0
    assert taken.peak_memory > 32 * MIB
    assert 64 * MIB <= taken.bytes_written < 80 * MIB
    assert taken.bytes_read > 0


@pytest.mark.parametrize(
    ("ended", "failed"),
    [(ValueError("no"), True), (KeyboardInterrupt(), True), (SystemExit(1), True),
     (SystemExit("no"), True), (SystemExit(0), False)],
)  # fmt: skip
def test_a_stage_that_fails_is_recorded_as_failed(ended: BaseException, failed: bool):
    with pytest.raises(type(ended)), measured("mine", "merge"):
        raise ended
    assert last_runs("mine")["merge"].failed is failed
    assert bool(last_runs("mine", failed=False)) is not failed


def test_the_last_run_of_each_stage_counts_and_damage_does_not(folder: Path):
    assert last_runs("mine") == {}
    file = folder / "runs/mine.jsonl"
    again, other = replace(ONE, seconds=4.0), replace(ONE, stage="collect")
    for each in (ONE, other, again, replace(ONE, failed=True)):
        usage._add(each, file)
    with file.open("a") as lines:
        lines.write(json.dumps({"stage": "align"}) + "\n[]\n{half a li")
    assert list(last_runs("mine")) == ["collect", "merge"]
    assert last_runs("mine")["merge"].failed
    assert last_runs("mine", failed=False) == {"collect": other, "merge": again}


def test_a_stage_goes_on_where_its_usage_cannot_be_kept(folder: Path):
    (folder / "runs").write_text("a file where a folder belongs")
    with measured("mine", "merge"):
        pass
    assert last_runs("mine") == {}


def test_metrics_are_the_numbers_that_were_counted():
    assert ONE.metrics() == {
        "stage/merge/seconds": 2.0,
        "stage/merge/cpu_seconds": 3.5,
        "stage/merge/peak_memory": 5 * MIB,
        "stage/merge/bytes_read": 7 * MIB,
    }


def test_the_page_has_the_runs_where_there_are_any(folder: Path):
    assert runs("mine").parts == []
    usage._add(replace(ONE, failed=True), folder / "runs/mine.jsonl")
    (grid,) = runs("mine").parts
    row = ["merge (failed)", "2026-11-27 10:00", "2.0", "3.5", "5.0 MiB", "7.0 MiB", "not counted"]
    assert list(grid.rows) == [row]
    report = Report(
        recipe="mine", title="t", sections=[runs("mine")], tables=[], metrics={}, rows={}
    )
    page = render(report, {})
    assert "<h2>Runs</h2>" in page
    assert all(f"<td>{cell}</td>" in page for cell in row)
