"""What a stage took: measured with its processes, kept however it ended, shown on its page."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from tasks import usage
from tasks.reports.html import render
from tasks.reports.origin import runs
from tasks.reports.report import Report
from tasks.usage import Usage, last_runs, measured

MIB = 2**20
REPOSITORY = Path(__file__).parents[2]
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


def test_a_killed_stage_is_a_failed_run(folder: Path):
    """Signal 9 leaves what the stage took so far; that of a living run is nobody's yet."""
    code = (
        "import os, pathlib, sys; from tasks import usage; usage.RUNS = pathlib.Path(sys.argv[1])\n"
        "with usage.measured('mine', 'merge'): sys.stdin.read(1); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(folder / "runs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=REPOSITORY) as stage:
        while (
            not (noted := list((folder / "runs").glob("*.running"))) or not noted[0].stat().st_size
        ):
            time.sleep(0.02)
        assert last_runs("mine") == {}
        stage.communicate(b"x")
    taken = last_runs("mine")["merge"]
    assert taken.failed
    assert taken.peak_memory > MIB
    assert list((folder / "runs").iterdir()) == [folder / "runs/mine.jsonl"]
    assert last_runs("mine", failed=False) == {}


def test_a_look_while_torch_is_being_imported_sees_no_gpu(monkeypatch: pytest.MonkeyPatch):
    """The thread that looks may find a torch whose parts another thread is still filling in."""
    half = ModuleType("torch")
    monkeypatch.setitem(sys.modules, "torch", half)
    monkeypatch.setattr(usage.shutil, "which", lambda _: None)
    assert usage._GpuMemory().peak() is None
    monkeypatch.setattr(half, "cuda", ModuleType("torch.cuda"), raising=False)
    assert usage._GpuMemory().peak() is None


def test_the_memory_of_gpus_is_what_came_on_top(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As NVIDIA's tool says it, for all GPUs together."""
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(usage, "RARELY_SECONDS", 0.1)
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat {folder}/used\necho >> {folder}/asked\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    (folder / "used").write_text("100\n7\n")
    (folder / "asked").touch()
    with measured("mine", "merge"):
        (folder / "used").write_text("150\n17\n")
        before = (folder / "asked").stat().st_size
        while (folder / "asked").stat().st_size < before + 3:  # the first may have read before
            time.sleep(0.02)
    taken = last_runs("mine")["merge"]
    assert taken.gpu_memory == 60 * MIB
    assert taken.metrics()["stage/merge/gpu_memory"] == 60 * MIB


def test_the_last_run_of_each_stage_counts_and_damage_does_not(folder: Path):
    assert last_runs("mine") == {}
    file = folder / "runs/mine.jsonl"
    again, other = replace(ONE, seconds=4.0), replace(ONE, stage="collect")
    for each in (ONE, other, again, replace(ONE, failed=True)):
        usage.record("mine", each)
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
    usage.record("mine", replace(ONE, failed=True))
    (grid,) = runs("mine").parts
    row = ["merge (failed)", "2026-11-27 10:00", "2.0", "3.5", "5.0 MiB", "7.0 MiB", "not counted",
           "no GPU"]  # fmt: skip
    assert list(grid.rows) == [row]
    report = Report(
        recipe="mine", title="t", sections=[runs("mine")], tables=[], metrics={}, rows={}
    )
    page = render(report, {})
    assert "<h2>Runs</h2>" in page
    assert all(f"<td>{cell}</td>" in page for cell in row)
