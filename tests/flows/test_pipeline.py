"""The flow around DVC's stages: what runs, what is tried again, what an early end leaves behind."""

import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest

from tests.flows.conftest import Workspace, wait_until

RUN = ("flows.pipeline", "toy")


def ran(*names: str) -> list[str]:
    return [f"{event} {name}" for name in names for event in ("start", "end")]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {".git", ".prefect"} & set(path.parts)
    }


def ask(api: str, path: str, body: dict) -> list[dict]:
    request = urllib.request.Request(
        f"{api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_runs_what_is_stale_and_nothing_else(toy: Workspace) -> None:
    """All stages run in order once; then none; after a change, that stage and those behind it."""
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert toy.log() == ran("fetch", "merge", "register")

    status, said = toy.run(*RUN)
    assert status == 0, said
    assert "Nothing to do: 3 stages of toy are up to date." in said
    assert toy.log() == []

    toy.control("merge.text", "another method")
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert toy.log() == ran("merge", "register")


def test_refresh_asks_the_sources_and_stops_there_when_they_are_the_same(toy: Workspace) -> None:
    """With --refresh fetch runs although DVC finds it unchanged; what it did not change does not run."""
    toy.run(*RUN)
    toy.log()
    status, said = toy.run(*RUN, "--refresh")
    assert status == 0, said
    assert toy.log() == ran("fetch")


def test_stages_can_be_chosen(toy: Workspace) -> None:
    """--to ends with a stage, --only runs one alone."""
    toy.run(*RUN, "--to", "merge")
    assert toy.log() == ran("fetch", "merge")
    toy.control("fetch.text", "another checkpoint")
    toy.run(*RUN, "--only", "register")
    assert toy.log() == ran("register")


def test_only_what_meets_a_network_is_tried_again(toy: Workspace) -> None:
    """fetch fails once and is tried again; merge fails once and the run ends; the next run goes on with merge."""
    toy.control("fetch.failures", 1)
    toy.control("merge.failures", 1)
    status, said = toy.run(*RUN)
    assert status == 1
    assert toy.log() == ["start fetch", *ran("fetch"), "start merge"]
    assert "merge: the toy broke" in said
    assert "stage merge@toy failed" in said
    assert "Traceback" not in said
    assert "NoneType" not in said

    status, said = toy.run(*RUN)
    assert status == 0, said
    assert toy.log() == ran("merge", "register")


def test_prefect_keeps_the_output_and_the_table(toy: Workspace, prefect_server: str) -> None:
    """Each stale stage is one task run, its output is in Prefect's log, the results table is an artifact."""
    (toy.folder / "reports" / "toy").mkdir(parents=True)
    (toy.folder / "reports" / "toy" / "table.md").write_text(f"| a table of {toy.folder} |\n")
    toy.run(*RUN)
    [artifact] = [
        one
        for one in ask(prefect_server, "artifacts/filter", {"limit": 200})
        if one["data"] == f"| a table of {toy.folder} |\n"
    ]
    assert artifact["key"] == "toy-results"
    flow_run = {"id": {"any_": [artifact["flow_run_id"]]}}
    tasks = ask(prefect_server, "task_runs/filter", {"flow_runs": flow_run, "sort": "EXPECTED_START_TIME_ASC"})
    assert [one["name"] for one in tasks] == ["fetch@toy", "merge@toy", "register@toy"]

    def lines() -> list[str]:
        body = {"logs": {"flow_run_id": {"any_": [artifact["flow_run_id"]]}}}
        return [line["message"] for line in ask(prefect_server, "logs/filter", body)]

    wait_until(lambda: {"fetch speaks", "merge speaks", "register speaks"} <= set(lines()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing_half_done(toy: Workspace, number: signal.Signals) -> None:
    """Ctrl-C ends the stage's processes, the old output stands, and the next run goes on with that stage."""
    toy.run(*RUN)
    before = snapshot(toy.folder / "out")
    toy.log()
    toy.control("merge.text", "another method")
    toy.control("merge.seconds", 60)
    run = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    run.send_signal(number)
    said, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert toy.processes() == [], said
    assert toy.log() == ["start merge"]
    assert snapshot(toy.folder / "out") == before

    toy.control("merge.seconds", 0)
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert toy.log() == ran("merge", "register")
    assert toy.text("out/merge/first") == "another method"


def test_ctrl_c_speaks_to_who_pressed_it(toy: Workspace) -> None:
    """A Ctrl-C, which a terminal sends to the whole foreground group, ends with one sentence and status 130."""
    toy.control("fetch.seconds", 60)
    run = toy.start(*RUN)
    wait_until(lambda: toy.reached("start fetch"))
    os.killpg(run.pid, signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.splitlines()[-1].startswith("Interrupted. Nothing is half-done")
    assert "Traceback" not in said


def test_the_second_of_two_runs_waits(toy: Workspace) -> None:
    """Of two runs in one workspace the second says for whom it waits, then finds nothing to do: nothing runs twice."""
    toy.control("merge.seconds", 5)
    first = toy.start(*RUN)
    wait_until(lambda: toy.reached("start merge"))
    status, said = toy.run(*RUN)
    assert first.wait(60) == 0
    assert status == 0, said
    assert f"toy in Prefect (process {first.pid}" in said
    assert "Nothing to do" in said
    assert toy.log() == ran("fetch", "merge", "register")


def test_a_killed_run_loses_nothing(toy: Workspace) -> None:
    """The stage of a run that was killed outright ends well; the next run waits for it and keeps its result."""
    toy.control("fetch.seconds", 8)
    first = toy.start(*RUN)
    wait_until(lambda: toy.reached("start fetch"))
    first.kill()
    first.wait()
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert "waiting until it is free" in said
    assert toy.log() == ran("fetch", "merge", "register")


def test_a_full_disk_leaves_the_old_state(toy: Workspace) -> None:
    """A stage whose write fails fails; what it had written before stands, and the rerun goes on."""
    toy.run(*RUN)
    before = snapshot(toy.folder / "out")
    dvc = toy.folder / "dvc.yaml"
    plain = dvc.read_text()
    # No file may grow beyond 64 KiB: the kernel refuses the write as it would on a full disk.
    dvc.write_text(plain.replace("python toy_stage.py merge", "ulimit -f 64; python toy_stage.py merge"))
    toy.control("merge.bytes", 200_000)
    toy.log()
    status, said = toy.run(*RUN)
    assert status == 1
    assert "File too large" in said
    assert toy.log() == ["start merge"]
    assert snapshot(toy.folder / "out") == before
    dvc.write_text(plain)
    toy.control("merge.text", "another method")
    status, said = toy.run(*RUN)
    assert status == 0, said
    assert toy.log() == ran("merge", "register")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tois"], "recipe 'tois' is unknown: did you mean 'toy'? choose one of ['toy']"),
        (["toy", "--to", "merg"], "stage 'merg' is unknown: did you mean 'merge'?"),
        (["toy", "--only", "align"], "stage 'align' is unknown: "),
    ],
)
def test_what_does_not_exist_is_refused(toy: Workspace, arguments: list[str], message: str) -> None:
    """An unknown recipe or stage is named with the nearest right one, and nothing is written."""
    before = snapshot(toy.folder)
    status, said = toy.run("flows.pipeline", *arguments)
    assert status == 2
    assert message in said
    assert "Traceback" not in said
    assert snapshot(toy.folder) == before


def test_a_wrong_key_is_refused_before_the_first_stage(toy: Workspace) -> None:
    """A misspelt key of a late stage's section is found before the first stage writes anything."""
    path = toy.folder / "params" / "toy.yaml"
    path.write_text(path.read_text().replace("\nmerge:\n", "\nmerge:\n  resutl: x\n"))
    before = snapshot(toy.folder)
    status, said = toy.run(*RUN)
    assert status == 2
    assert "params/toy.yaml: merge" in said
    assert "unknown key 'resutl': did you mean 'result'?" in said
    assert snapshot(toy.folder) == before
