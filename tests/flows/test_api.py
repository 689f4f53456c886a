"""What is asked of a Prefect server that is busy, or refuses."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.api import ask


class Busy:
    """A server that gives these answers to posts, one after the other, and then only the last."""

    def __init__(self, *statuses: int) -> None:
        self.asked: list[str] = []
        busy, left = self, list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                busy.asked.append(self.path)
                self.answer(left.pop(0) if len(left) > 1 else left[0])

            def do_GET(self) -> None:  # the client asks for the server's version and its token
                self.answer(404)

            def answer(self, status: int) -> None:
                self.send_response(status)
                self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(b'[{"id": 1}]' if status == 200 else b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"


@pytest.fixture
def busy(request: pytest.FixtureRequest) -> Iterator[Busy]:
    busy = Busy(*request.param)
    yield busy
    busy.server.shutdown()
    busy.server.server_close()


@pytest.mark.parametrize("busy", [(503, 429, 200)], indirect=True)
def test_a_busy_server_is_asked_again(busy: Busy) -> None:
    """Prefect's server answers 503 where its database is locked, and did nothing."""
    assert ask(busy.url, "deployments/", {"name": "nightly"}) == [{"id": 1}]
    assert busy.asked == ["/api/deployments/"] * 3


@pytest.mark.parametrize("busy", [(403,)], indirect=True)
def test_a_server_that_refuses_is_named(busy: Busy) -> None:
    """Asked once: it will not change its mind."""
    with pytest.raises(ConnectionError, match=rf"the Prefect server at {busy.url}: .*403"):
        ask(busy.url, "flows/filter", {})
    assert len(busy.asked) == 1


def test_a_server_that_is_not_there_is_named() -> None:
    """A refused connection is an OSError, as all that commands expect from the network."""
    with pytest.raises(ConnectionError, match=r"Prefect server at http://127\.0"):
        ask("http://127.0.0.1:9/api", "flows/filter", {})
