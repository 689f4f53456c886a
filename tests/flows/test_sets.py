"""The sets of a stage are task runs below that of the stage."""

from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.sets import Sets, sets_of
from tasks.models.shared import jobs

NAMES = ["pair/0", "pair/1", "other/0 third/0"]
heard: dict[str, bool] = {}
ids: list[UUID] = []


def work(fails: bool, report: jobs.Report) -> None:
    report("say", "halfway")
    if fails:
        raise ValueError("no such unit")


@task(name="stage", persist_result=False)
def a_stage(lines: list[str]) -> None:
    with sets_of("merge@toy") as sets:
        heard.update({line: sets.hear(line) for line in lines})


@flow(persist_result=False)
def a_pipeline(lines: list[str]) -> None:
    ids.append(UUID(str(flow_run.id)))
    a_stage(lines)


def shown(server: str, lines: list[str]) -> list[TaskRun]:
    """The task runs of a pipeline whose stage says these lines."""
    ids.clear()
    with temporary_settings({PREFECT_API_URL: server}):
        a_pipeline(lines)
        with get_client(sync_client=True) as client:
            of_flow = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=ids))
            return client.read_task_runs(task_run_filter=of_flow)


def said(capsys, *, failing: str = "") -> list[str]:
    """What jobs say where the output is no terminal."""
    arguments = {name: (name == failing,) for name in NAMES}
    try:
        jobs.run_jobs("merge", work, arguments, dict.fromkeys(NAMES, 0), here=True)
    except ValueError:
        assert failing
    return capsys.readouterr().out.splitlines()


def test_each_set_is_a_task_run_of_its_stage(prefect_server: str, capsys) -> None:
    """What the jobs say is what the flow reads; other lines open nothing."""
    lines = said(capsys)
    assert [line.partition(" after")[0] for line in lines if "halfway" not in line] == [
        f"merge: {name} {what}" for name in NAMES for what in ("begins", "is done")
    ]
    assert lines[-1].endswith("s, 3 of 3")
    runs = shown(prefect_server, lines)
    assert {line for line, opens in heard.items() if opens} == {
        f"merge: {name} begins" for name in NAMES
    }
    sets = {run.name: run for run in runs if run.name.startswith("merge ")}
    assert set(sets) == {f"merge {name}" for name in NAMES}
    [stage] = {
        parent.id for run in sets.values() for parent in run.task_inputs.get("__parents__", [])
    }
    assert stage not in {run.id for run in sets.values()}
    for run in sets.values():
        assert run.state is not None
        assert run.state.is_completed()


def test_a_set_that_is_not_done_has_failed(prefect_server: str, capsys) -> None:
    lines = said(capsys, failing="pair/1")
    states = {run.name: run.state for run in shown(prefect_server, lines)}
    assert set(states) >= {"merge pair/0", "merge pair/1"}
    assert "merge other/0 third/0" not in states
    done, failed = states["merge pair/0"], states["merge pair/1"]
    assert done is not None
    assert done.is_completed()
    assert failed is not None
    assert failed.is_failed()
    assert failed.message == "stage merge@toy ended before this set was done"


class Gone(SyncPrefectClient):
    """A client of a server that answers nothing."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def create_task_run(self, *_: object, name: str | None = None, **__: object) -> TaskRun:
        self.asked.append(str(name))
        raise httpx.ConnectError("nobody there")


def test_a_server_that_does_not_answer_is_asked_once() -> None:
    """The stage goes on, and waits for it no more; lines are read as before."""
    client = Gone()
    sets = Sets(client, uuid4(), uuid4())
    assert [sets.hear(f"merge: {name} begins") for name in NAMES] == [True] * len(NAMES)
    assert not sets.hear("merge: pair/0 is done after 3.2 s, 1 of 3")
    sets.fail("over")
    assert client.asked == ["merge pair/0"]


@pytest.mark.slow
def test_jobs_side_by_side_say_the_same(capsys) -> None:
    jobs.run_jobs("merge", work, dict.fromkeys(NAMES, (False,)), dict.fromkeys(NAMES, 0))
    lines = capsys.readouterr().out.splitlines()
    assert {f"merge: {name} begins" for name in NAMES} < set(lines)
    assert sum("is done after" in line for line in lines) == len(NAMES)


@pytest.mark.parametrize("show", [True, False])
def test_one_job_alone_and_other_processes_say_no_more(capsys, show: bool) -> None:
    names = NAMES[:1] if show else NAMES
    given = dict.fromkeys(names, (False,))
    jobs.run_jobs("merge", work, given, dict.fromkeys(names, 0), here=True, show=show)
    assert capsys.readouterr().out == "merge: halfway\n" * len(names)
