"""Servers in processes of their own, on loopback, for as long as a block lasts."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows import SERVER, answers, database
from flows.workspace import end_group

HOST = "127.0.0.1"
START_SECONDS = 900  # a machine with a load of 22 on two cores took 252
GRACE_SECONDS = 20


class ServerError(RuntimeError):
    """A server cannot do its work; the message says why."""


def refuse_taken(port: int, option: str = "--port") -> None:
    """Raise ServerError where a port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"port {port} is taken (is `make serve` or `make ui` running already?); "
                f"choose another: ARGS='{option} {port + 1}'"
            ) from error


@contextmanager
def service(
    *command: str, environment: Mapping[str, str], log: str | None = None
) -> Generator[subprocess.Popen]:
    """A Python module's process, in a group of its own: Ctrl-C reaches it through us, in order.

    It writes into `.prefect/<log>.log`, if a log is named.
    """
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    output = (home / f"{log}.log").open("w") if log else None
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_group(process, signal.SIGTERM, GRACE_SECONDS)
        if output:
            output.close()


def wait_for(url: str, process: subprocess.Popen, log: str) -> None:
    """Return when a service says that it is healthy; ServerError where it ends instead."""
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServerError(f"the {log} does not answer; .prefect/{log}.log says why")
        time.sleep(0.2)


@contextmanager
def prefect_server(port: int, environment: Mapping[str, str]) -> Generator[subprocess.Popen]:
    """Prefect's server with its pages; the flows of this workspace are told where it is."""
    url = f"http://{HOST}:{port}/api"
    command = ("prefect", "server", "start", "--host", HOST, "--port", str(port))
    database.lend(Path(os.environ["PREFECT_HOME"]))
    with service(*command, environment=environment, log="server") as process:
        wait_for(url, process, "server")
        SERVER.write_text(url)
        try:
            yield process
        finally:
            SERVER.unlink(missing_ok=True)


def until_one_ends(*processes: subprocess.Popen) -> None:
    """Wait; ServerError when a service has ended."""
    while all(process.poll() is None for process in processes):
        time.sleep(1)
    raise ServerError("a server or the worker has ended; .prefect/*.log may say why")
