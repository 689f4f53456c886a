"""A Prefect server for the flows that have none: one of their own, which ends when they do.

Prefect would start one, too, but in this process's group, where a signal to the group ends it
before the flow can say how it ended, and where it lives on when this process is killed.

    with own_server():
        pipeline("modality")
"""

import atexit
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import urlopen

from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows import answers, database
from flows.services import HOST, START_SECONDS, ServerError
from tasks.registry.secrets import without_secrets

GRACE_SECONDS = 5
_PROBE_SECONDS = 5
MOST_STARTS = 3  # anew, where somebody kills it


@contextmanager
def own_server(meanwhile: Callable[[], object] = lambda: None) -> Generator[None]:
    """Have an address at which Prefect answers: the one that is set, or our own server's.

    Args:
        meanwhile: what can be done while our own server starts, which takes it seconds.
    """
    if address := PREFECT_API_URL.value():
        meanwhile()
        refuse_silent(address)
        yield
        return
    listener = socket.create_server((HOST, 0))
    url = f"http://{HOST}:{listener.getsockname()[1]}/api"
    server = _Server(listener)
    # Prefect's threads report when the interpreter ends; exit handlers run after that.
    atexit.register(server.end)
    try:
        meanwhile()
    except BaseException:
        server.kill()  # nobody has spoken to it
        raise
    server.wait_for(url)
    logging.getLogger("prefect.flow_runs").addFilter(_NO_PAGE)
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        logging.getLogger("prefect.flow_runs").removeFilter(_NO_PAGE)


def refuse_silent(address: str) -> None:
    """Raise ServerError where nothing answers; Prefect itself would end in a traceback."""
    parts = urlsplit(address)
    health = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))
    try:
        urlopen(f"{health}/health", timeout=_PROBE_SECONDS).close()
    except HTTPError:  # something answers, if only those who may ask
        return
    except (OSError, ValueError, HTTPException) as error:
        if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # Prefect's to judge
            raise ServerError(
                f"Prefect at {without_secrets(address)}: nothing answers ({error}); start it, or "
                "unset PREFECT_API_URL: a run has a server of its own"
            ) from error


class _NoPage(logging.Filter):
    """Prefect names the page of a run, which nobody can open when the run is over."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("View at ")


_NO_PAGE = _NoPage()


class _Server:
    """A server process that is started again should it end before its time."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        # Its end tells the server that we are gone, however we went.
        self._read_end, self._lifeline = os.pipe()
        self._ending = self._has_answered = False
        home = Path(os.environ["PREFECT_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        database.lend(home)
        self._log = home / "temporary-server.log"
        self._log.unlink(missing_ok=True)
        self._process = self._start()
        self._given_up = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _start(self) -> subprocess.Popen:
        with self._log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.server", str(self._listener.fileno())],
                stdin=self._read_end,
                stdout=log,
                stderr=log,
                pass_fds=[self._listener.fileno()],
                start_new_session=True,
                env={
                    **os.environ,
                    **get_current_settings().to_environment_variables(exclude_unset=True),
                    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
                    "PREFECT__SERVER_EPHEMERAL": "1",
                    "PREFECT__SERVER_FINAL": "1",
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
            )

    def _watch(self) -> None:
        for _ in range(MOST_STARTS):
            self._process.wait()
            if self._ending:
                return
            if not self._has_answered:
                self._given_up.set()
                return
            self._process = self._start()

    def wait_for(self, url: str) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + START_SECONDS
        while not answers(url):
            if self._given_up.is_set() or time.monotonic() > deadline:
                raise ServerError(f"Prefect's server does not start: {self._last_words()}")
            time.sleep(0.1)
        self._has_answered = True

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{last.strip()} ({self._log} has the rest)"

    def kill(self) -> None:
        self._ending = True
        self._process.kill()

    def end(self) -> None:
        self._ending = True
        os.close(self._lifeline)
        os.close(self._read_end)
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.close()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve on the socket whose descriptor is given, until the standard input ends."""
    import uvicorn

    threading.Thread(target=_end_with_parent, daemon=True).start()
    listener = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=1,  # seconds; the flow's own connections are open until it ends
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
