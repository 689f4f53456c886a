"""The flow around DVC's stages: what runs, what is tried again, what an early end leaves behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import pipeline
from flows.api import ask
from flows.workspace import only_run
from tests.flows.conftest import PATIENCE, Workspace, cpu_seconds, snapshot, wait_until

RUN = ("flows.pipeline", "toy")


def ran(*names: str) -> list[str]:
    return [f"{event} {name}" for name in names for event in ("start", "end")]


Here = Callable[..., tuple[int, str]]


def test_a_first_run_runs_every_stage_in_order(
    first_run: tuple[Workspace, str], prefect_server: str
) -> None:
    """Each stage is one task run with its output in Prefect's log; the table is an artifact.

    The log says where the pipeline is, without colours where it is no terminal.
    """
    toy, said = first_run
    assert toy.text("log").splitlines() == ran("fetch", "merge", "register")
    assert "merge@toy | merge speaks" in said
    assert "stage 2 of 3: merge@toy" in said
    assert "\x1b" not in said
    runs = [  # of this table: other tests' toys may have published it on the same server
        one["flow_run_id"]
        for one in ask(prefect_server, "artifacts/filter", {"limit": 200})
        if one["data"] == toy.text("reports/toy/table.md") and one["key"] == "toy-results"
    ]
    stages = {
        run: {
            one["name"]
            for one in ask(
                prefect_server, "task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}}
            )
        }
        for run in runs
    }
    first = next(
        run for run, names in stages.items() if names == {"fetch@toy", "merge@toy", "register@toy"}
    )
    this = {"any_": [first]}

    def lines() -> set[str]:
        found = ask(prefect_server, "logs/filter", {"logs": {"flow_run_id": this}})
        return {line["message"] for line in found}

    wait_until(lambda: {"fetch speaks", "merge speaks", "register speaks"} <= lines())


def test_a_run_that_does_nothing_loads_no_torch() -> None:
    """Importing what says "Nothing to do" costs no second for what only stages need."""
    script = "import sys, flows.pipeline; print({'torch', 'mlflow'} & {*sys.modules})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_nothing_stale_nothing_runs(toy: Workspace) -> None:
    """With nothing changed a run says so, starts no Prefect server, and is quick."""
    before = cpu_seconds()
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert said.startswith("Nothing to do: 3 stages of toy are up to date.\n")
    assert "View at" not in said
    assert not (toy.folder / "log").exists()
    assert cpu_seconds() - before < 30


@pytest.mark.slow
def test_only_a_network_that_does_not_answer_is_tried_again(toy: Workspace, run_here: Here) -> None:
    """fetch reaches nothing once and is tried again; another stage or another failure ends the run.

    The next run goes on with the stage that failed.
    """
    toy.control("fetch.text", "another checkpoint")
    toy.control("fetch.status", os.EX_TEMPFAIL)
    toy.control("fetch.failures", 1)
    toy.control("merge.status", os.EX_TEMPFAIL)
    toy.control("merge.failures", 1)
    status, said = run_here("toy")
    assert status == 1
    assert toy.log() == ["start fetch", *ran("fetch"), "start merge"]
    assert "stage merge@toy failed: merge: the toy broke" in said
    assert "Traceback" not in said
    assert "NoneType" not in said

    status, said = run_here("toy")
    assert status == 0, said
    assert toy.log() == ran(
        "merge"
    )  # which writes what it wrote before: register has nothing to do

    toy.control("fetch.text", "a third checkpoint")
    toy.control("fetch.status", 1)
    toy.control("fetch.failures", 1)
    assert run_here("toy")[0] == 1
    assert toy.log() == ["start fetch"]


def test_refresh_asks_the_sources_and_stops_there_when_they_are_the_same(
    toy: Workspace, run_here: Here
) -> None:
    """With --refresh fetch runs although it is unchanged; what it did not change does not run."""
    status, said = run_here("toy", "--refresh")
    assert status == 0, said
    assert toy.log() == ran("fetch")


def test_stages_can_be_chosen(toy: Workspace, run_here: Here) -> None:
    """--to ends with a stage; --only runs one alone, if it is stale."""
    toy.control("merge.text", "another method")
    assert run_here("toy", "--to", "fetch")[1].startswith("Nothing to do: 1 stages")
    assert run_here("toy", "--only", "register")[1].startswith("Nothing to do: 1 stages")
    assert run_here("toy", "--to", "merge")[0] == 0
    assert toy.log() == ran("merge")


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_done(toy: Workspace, run_here: Here) -> None:
    """Ctrl-C, sent to the whole foreground group, ends the stage's processes and the run.

    The old output stands, and the next run goes on with that stage.
    """
    before = snapshot(toy.folder / "out")
    toy.control("merge.text", "another method")
    toy.control("merge.seconds", 60)
    run = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130
    assert said.splitlines()[-1].startswith("Interrupted. Nothing is half-done")
    assert "Traceback" not in said
    assert toy.processes() == []
    assert toy.log() == ["start merge"]
    assert snapshot(toy.folder / "out") == before

    toy.control("merge.seconds", 0)
    status, said = run_here("toy")
    assert status == 0, said
    assert toy.log() == ran("merge", "register")
    assert toy.text("out/merge/first") == "another method"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_is_as_clean_as_ctrl_c(toy: Workspace, number: signal.Signals) -> None:
    """A cancelled run or a closed terminal leaves no process; the old output stands."""
    before = snapshot(toy.folder / "out")
    toy.control("merge.text", "another method")
    toy.control("merge.seconds", 60)
    run = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    run.send_signal(number)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode != 0
    assert toy.processes() == [], said
    assert toy.log() == ["start merge"]
    assert snapshot(toy.folder / "out") == before


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose workspace is taken says for whom it waits, and goes on after that run."""
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    events: list[str] = []

    def second() -> None:
        with only_run("second", said.append):
            events.append("second")

    waiting = threading.Thread(target=second)
    with only_run("first"):
        waiting.start()
        wait_until(lambda: said)
        events.append("first")
    waiting.join(PATIENCE)
    assert events == ["first", "second"]
    assert f"taken by first (process {os.getpid()}" in said[0]


@pytest.mark.slow
def test_the_second_of_two_runs_waits(toy: Workspace) -> None:
    """Of two runs in one workspace the second says for whom it waits; nothing runs twice."""
    toy.control("merge.text", "another method")
    toy.control("merge.seconds", 15)
    first = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    status, said = toy.run(*RUN)
    first.communicate(timeout=PATIENCE)
    assert first.returncode == 0
    assert status == 0, said
    assert f"toy in Prefect (process {first.pid}" in said
    assert "Nothing to do" in said
    assert toy.log() == ran("merge", "register")


@pytest.mark.slow
def test_a_killed_run_loses_nothing(toy: Workspace) -> None:
    """The stage of a killed run ends well; the next run waits for it and keeps its result."""
    toy.control("fetch.text", "another checkpoint")
    toy.control("fetch.seconds", 60)  # longer than a run takes to begin
    first = toy.start(*RUN)
    wait_until(lambda: toy.reached("start fetch"))
    first.kill()
    first.communicate()
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert "waiting until it is free" in said
    assert toy.log() == ran("fetch", "merge")  # which writes what it wrote before


def test_a_full_disk_leaves_the_old_state(toy: Workspace, run_here: Here) -> None:
    """A stage whose write fails fails; what it had written before stands, and the rerun goes on."""
    before = snapshot(toy.folder / "out")
    dvc = toy.folder / "dvc.yaml"
    plain = dvc.read_text()
    # No file may grow beyond 64 KiB: the kernel refuses the write as it would on a full disk.
    dvc.write_text(
        plain.replace("python toy_stage.py merge", "ulimit -f 64; python toy_stage.py merge")
    )
    toy.control("merge.bytes", 200_000)
    status, said = run_here("toy")
    assert status == 1
    assert "File too large" in said
    assert toy.log() == ["start merge"]
    assert snapshot(toy.folder / "out") == before
    dvc.write_text(plain)
    toy.control("merge.text", "another method")
    status, said = run_here("toy")
    assert status == 0, said
    assert toy.log() == ran("merge", "register")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toyy"], "recipe 'toyy' is unknown: did you mean 'toy'? choose one of ['toy']"),
        (["toy", "--to", "merg"], "stage 'merg' is unknown: did you mean 'merge'?"),
        (["toy", "--only", "align"], "stage 'align' is unknown: "),
    ],
)
def test_what_does_not_exist_is_refused(
    toy: Workspace, run_here: Here, arguments: list[str], message: str
) -> None:
    """An unknown recipe or stage is named with the nearest right one, and nothing is written."""
    before = snapshot(toy.folder)
    status, said = run_here(*arguments)
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert snapshot(toy.folder) == before


def test_an_unknown_recipe_starts_no_server_of_its_own(
    toy: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server has a folder in the workspace, which a mistyped command leaves as it is."""
    monkeypatch.chdir(toy.folder)
    monkeypatch.setattr(pipeline, "own_server", lambda **_: pytest.fail("a server was started"))
    assert pipeline.main(["toyy"]) == 2
    assert "did you mean 'toy'?" in capfd.readouterr().err


def test_a_wrong_key_is_refused_before_the_first_stage(toy: Workspace, run_here: Here) -> None:
    """A misspelt key of a late stage's section is found before the first stage writes anything."""
    path = toy.folder / "params" / "toy.yaml"
    path.write_text(path.read_text().replace("\nmerge:\n", "\nmerge:\n  resutl: x\n"))
    before = snapshot(toy.folder)
    status, said = run_here("toy")
    assert status == 2
    assert "params/toy.yaml: merge" in said
    assert "unknown key 'resutl': did you mean 'result'?" in said
    assert snapshot(toy.folder) == before
