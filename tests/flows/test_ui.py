"""`make ui`: both pages, until Ctrl-C."""

import os
import signal
import socket

import pytest

from flows.services import ServerError
from flows.ui import show
from tasks.registry.reach import TrackingError
from tests.flows.conftest import PATIENCE, Workspace, answers, wait_until
from tests.servers import free_port


def test_a_port_that_is_taken_is_refused() -> None:
    """Each of the two is named with the option that chooses another."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=rf"port {port} is taken .*--prefect-port {port + 1}"):
            show(port, free_port())
        with pytest.raises(ServerError, match=rf"port {port} is taken .*--mlflow-port {port + 1}"):
            show(free_port(), port)


def test_a_database_that_mlflow_cannot_open_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence without the password, before a server starts."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unheard-of://user:S3cret@host/db")
    with pytest.raises(TrackingError, match=r"MLflow at unheard-of://\*\*\*@host/db") as refused:
        show(free_port(), free_port())
    assert "S3cret" not in str(refused.value)


@pytest.mark.slow
def test_both_pages_answer_until_ctrl_c(toy: Workspace) -> None:
    """The addresses that are printed show pages; after Ctrl-C nothing runs or is announced."""
    toy.environment.pop("PREFECT_API_URL")
    ports = free_port(), free_port()
    options = ("--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1]))
    served = toy.start("flows.ui", *options)
    pages = [f"http://127.0.0.1:{port}" for port in ports]
    wait_until(lambda: all(map(answers, pages)) or served.poll() is not None)
    announced = toy.folder / ".prefect" / "server-url"
    assert announced.read_text() == f"{pages[0]}/api"
    os.killpg(served.pid, signal.SIGINT)
    said, _ = served.communicate(timeout=PATIENCE)
    assert served.returncode == 0, said
    assert f"Prefect: {pages[0]}    MLflow: {pages[1]}" in said
    wait_until(lambda: not toy.processes())
    assert not announced.exists()
