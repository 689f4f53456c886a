"""What flows use of DVC and repair in it: run cache, dvc.lock, damaged caches, locks."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest

from flows import graph
from tests.flows.conftest import PATIENCE, Workspace, snapshot, wait_until
from tests.flows.test_pipeline import RUN, Here, ran


@pytest.mark.slow
def test_a_parameter_switched_back_runs_nothing(toy: Workspace, run_here: Here) -> None:
    """One setting, another, the first again: the third result comes from DVC's run cache."""
    before = snapshot(toy.folder / "out")
    toy.control("merge.text", "another method")
    assert run_here("toy", "--to", "merge")[0] == 0
    assert toy.log() == ran("merge")
    toy.control("merge.text", "method")
    status, said = run_here("toy")
    assert status == 0, said
    assert toy.log() == []
    assert snapshot(toy.folder / "out") == before


def test_damage_in_the_cache_is_never_brought_back(toy: Workspace, run_here: Here) -> None:
    """A result whose copy in DVC's cache is damaged is made again; the damage is named."""
    toy.control("merge.text", "another method")
    assert run_here("toy", "--to", "merge")[0] == 0
    [copy] = [
        path
        for path in (toy.folder / ".dvc" / "cache" / "files").rglob("*")
        if path.is_file() and path.read_bytes() == b"method"
    ]
    copy.chmod(0o644)
    copy.write_text("merhod")
    copy.chmod(stat.S_IREAD | stat.S_IRGRP | stat.S_IROTH)  # as DVC marks what it trusts
    toy.control("merge.text", "method")
    toy.log()
    status, said = run_here("toy", "--to", "merge")
    assert status == 0, said
    assert "1 files in DVC's cache are damaged and were removed: merge@toy runs" in said
    assert toy.log() == ran("merge")
    assert toy.text("out/merge/first") == "method"


def test_a_checkpoint_edited_by_hand_is_fetched_again(toy: Workspace, run_here: Here) -> None:
    """Also where DVC's copy of it is damaged; what is made of it is up to date again."""
    (toy.folder / "out/fetch/first").write_text("edited")
    for copy in (toy.folder / ".dvc" / "cache" / "files").rglob("*"):
        if copy.is_file() and copy.read_bytes() == b"checkpoint":
            copy.chmod(0o644)
            copy.write_text("chackpoint")
    status, said = run_here("toy")
    assert status == 0, said
    assert toy.log() == ran("fetch")
    assert toy.text("out/fetch/first") == "checkpoint"


@pytest.mark.parametrize(
    "cut", [0, pytest.param(0.3, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow)]
)
def test_a_cut_lock_file_comes_back(toy: Workspace, run_here: Here, cut: float) -> None:
    """A dvc.lock that a killed DVC left empty or cut is what it was; the stages are up to date."""
    lock = toy.folder / "dvc.lock"
    whole = lock.read_text()
    end = int(len(whole) * cut)
    lock.write_text(whole[:end])
    status, said = run_here("toy")
    assert status == 0, said
    assert "Traceback" not in said
    if "it is again what it was" in said:
        assert lock.read_text() == whole
        assert "Nothing to do" in said
    assert run_here("toy")[1].startswith("Nothing to do")


def test_a_cut_lock_file_without_a_copy_is_explained(toy: Workspace, run_here: Here) -> None:
    """Where no copy is kept, one sentence names the file and both ways out; nothing is written."""
    (toy.folder / graph.COPY).unlink()
    (toy.folder / "dvc.lock").write_text("")
    before = snapshot(toy.folder)
    status, said = run_here("toy")
    assert status == 2
    assert "dvc.lock is cut or empty" in said
    assert "git checkout dvc.lock" in said
    assert "Traceback" not in said
    assert snapshot(toy.folder) == before


def test_dead_holders_of_dvcs_locks_are_forgotten(toy: Workspace, run_here: Here) -> None:
    """A zombie, a number given out anew and a cut list: none of them makes a run wait."""
    out = str(toy.folder / "out" / "merge")
    with subprocess.Popen([sys.executable, "-c", "pass"]) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        for pid, command in ((zombie.pid, "dvc repro merge@toy"), (os.getpid(), "dvc repro other")):
            held = {"write": {out: {"pid": pid, "cmd": command}}, "read": {}}
            (toy.folder / ".dvc" / "tmp" / "rwlock").write_text(json.dumps(held))
            assert run_here("toy")[1].startswith("Nothing to do")
    (toy.folder / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"')
    assert run_here("toy")[1].startswith("Nothing to do")


@pytest.mark.slow
def test_a_run_waits_for_dvc_by_hand(toy: Workspace) -> None:
    """While `dvc repro` has the workspace, a run says so and waits, then finds the work done."""
    toy.control("merge.text", "another method")
    toy.control("merge.held", "until the run waits")
    by_hand = toy.start("dvc", "repro", "merge@toy")
    wait_until(lambda: toy.reached("start merge"))
    run = toy.start(*RUN)
    assert run.stdout is not None
    told = next(line for line in run.stdout if "waiting" in line)
    (toy.folder / "control" / "merge.held").unlink()
    said, _ = run.communicate(timeout=PATIENCE)
    by_hand.communicate(timeout=PATIENCE)
    assert by_hand.returncode == 0
    assert run.returncode == 0, said
    assert "taken by merge" in told, told
    assert "Traceback" not in said
    assert toy.log() == ran("merge", "register")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["stage", "dvc"])
def test_a_kill_is_told_as_a_kill(toy: Workspace, victim: str) -> None:
    """Signal 9 to a stage or to DVC ends the run with that as its reason; the old output stands."""
    before = snapshot(toy.folder / "out")
    toy.control("merge.text", "another method")
    toy.control("merge.seconds", 60)
    run = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    words = {"stage": ["toy_stage.py", "merge"], "dvc": ["-m", "dvc"]}[victim]
    for pid in toy.pids(*words):
        os.kill(pid, signal.SIGKILL)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 1
    who = {"stage": "stage merge@toy was killed", "dvc": "stage merge@toy failed: DVC was killed"}
    assert f"{who[victim]} (signal 9" in said
    assert "Traceback" not in said
    assert toy.processes() == []
    assert snapshot(toy.folder / "out") == before


@pytest.mark.slow
def test_a_run_waits_for_a_stage_whose_run_and_dvc_were_killed(toy: Workspace) -> None:
    """A stage that outlives its run and its DVC keeps the workspace; the next run repeats it."""
    toy.control("merge.text", "another method")
    toy.control("merge.seconds", 8)
    first = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    for pid in [first.pid, *toy.pids("-m", "dvc")]:
        os.kill(pid, signal.SIGKILL)
    first.communicate()
    toy.control("merge.seconds", 0)
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert "This workspace is taken by merge (process" in said
    assert toy.log() == ran("merge", "merge", "register")
    assert toy.text("out/merge/first") == "another method"
    assert not list(toy.folder.rglob("*.incomplete"))
