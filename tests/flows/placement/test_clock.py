"""A clock that is off is told of, once, in one sentence."""

import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.placement.clock import compare
from flows.placement.dispatch import Silence


@pytest.fixture
def server() -> Iterator[None]:
    """A server that answers with its date, as every HTTP server does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{served.server_port}"}):
            yield
        served.shutdown()


@pytest.mark.usefixtures("server")
def test_a_clock_that_is_off_is_told_of() -> None:
    said: list[str] = []
    compare(said.append)
    assert said == []
    compare(said.append, now=lambda: time.time() - 36000)
    compare(said.append, now=lambda: time.time() + 7200)
    behind, ahead = said
    assert re.search(r"of this machine is 3[56]\d{3} s behind that of the Prefect server", behind)
    assert re.search(r"72\d\d s ahead of", ahead)


def test_no_server_is_no_clock() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        compare(pytest.fail)


def test_silence_is_measured_by_one_clock() -> None:
    """Whatever times the other machine has, a sign that changed starts the count anew."""
    now = [0.0]
    silence = Silence(lambda: now[0])
    assert silence.seconds("a") == 0
    now[0] = 30
    assert silence.seconds("a") == 30
    assert silence.seconds("b") == 0
    now[0] = 31
    assert silence.seconds("b") == 1
