"""The server that a flow starts for itself: it ends with the run, however that ends."""

import os
import signal
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.server import own_server
from flows.services import ServerError
from tests.flows.conftest import PATIENCE, Workspace, wait_until
from tests.flows.test_pipeline import RUN, ran


@pytest.fixture
def alone(toy: Workspace) -> Workspace:
    """The toy, stale, in a workspace to which no Prefect server is known."""
    toy.environment.pop("PREFECT_API_URL")
    toy.control("merge.text", "another method")
    return toy


@pytest.mark.slow
def test_a_server_that_cannot_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is none: its last words are told, and where the rest is."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}")
    with pytest.raises(ServerError, match=r"does not start: .*temporary-server\.log has the rest"):
        own_server().__enter__()


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
    """Its address is told without the password that it holds."""
    with (
        temporary_settings({PREFECT_API_URL: "http://user:S3cret@127.0.0.1:9/api"}),
        pytest.raises(ServerError) as refused,
    ):
        own_server().__enter__()
    message = str(refused.value)
    assert message.startswith("Prefect at http://***@127.0.0.1:9/api: nothing answers")
    assert "unset PREFECT_API_URL" in message


@pytest.mark.slow
def test_a_killed_run_leaves_no_server(alone: Workspace) -> None:
    """kill -9 of the run alone: DVC ends its stage, the server ends; the next run is whole."""
    alone.control("merge.seconds", 3)
    run = alone.start(*RUN)
    wait_until(lambda: alone.reached("start merge"))
    assert alone.pids("flows.server")
    run.kill()
    run.communicate()
    wait_until(lambda: not alone.processes())
    status, said = alone.run(*RUN)
    assert status == 0, said
    assert alone.log() == ran("merge", "register")
    assert alone.processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_ends_a_run_promptly(
    alone: Workspace, number: signal.Signals
) -> None:
    """The server outlives the signal, so the flow can say how it ended; nothing waits for it."""
    alone.control("merge.seconds", 2 * PATIENCE)
    run = alone.start(*RUN)
    wait_until(lambda: alone.reached("start merge"))
    os.killpg(run.pid, number)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130, said
    assert said.splitlines()[-1].startswith("Interrupted. Nothing is half-done")
    assert "View at" not in said
    assert alone.processes() == []


@pytest.mark.slow
def test_a_server_that_is_killed_is_started_again(alone: Workspace) -> None:
    """The flow does not notice that its server was killed."""
    alone.control("merge.seconds", 5)
    run = alone.start(*RUN)
    wait_until(lambda: alone.reached("start merge"))
    [server] = alone.pids("flows.server")
    os.kill(server, signal.SIGKILL)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said
    assert alone.log() == ran("merge", "register")
    assert alone.processes() == []
