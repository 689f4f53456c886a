"""`make serve`: a local Prefect server, a worker and prefect.yaml's deployments, until Ctrl-C.

Everything listens on loopback. While it serves, `make merge` in this workspace shows in the same
server.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows import SERVER, answers
from tasks.recipe.plan import check
from tasks.recipe.section import ParamsError

HOST = "127.0.0.1"
POOL = "alloy"
START_SECONDS = 300
GRACE_SECONDS = 20


class ServeError(RuntimeError):
    """The server or the worker cannot do their work; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C
    try:
        check(asked.recipe)
        serve(asked.recipe, asked.port)
    except (ParamsError, ServeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Schedules rest until the next `make serve`.")
    return 0


def serve(recipe: str, port: int) -> None:
    """Run until interrupted, or until the server or the worker ends."""
    _refuse_taken(port)
    url = f"http://{HOST}:{port}/api"
    environment = {
        **os.environ,
        "ALLOY_RECIPE": recipe,
        "PREFECT_API_URL": url,
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")])
        ),
    }
    with ExitStack() as stack:
        server = stack.enter_context(
            _prefect(
                "server",
                "start",
                "--host",
                HOST,
                "--port",
                str(port),
                environment=environment,
                log="server",
            )
        )
        _wait_for(url, server)
        stack.enter_context(_announced(url))
        for command in (
            ["work-pool", "create", POOL, "--type", "process", "--overwrite"],
            ["deploy", "--all"],
        ):
            _configure(command, environment)
        worker = stack.enter_context(
            _prefect("worker", "start", "--pool", POOL, "--limit", "1", environment=environment)
        )
        print(
            f"Serving {recipe}: http://{HOST}:{port} shows runs and schedules "
            f"(those of prefect.yaml, UTC).\n"
            f"Run it now: PREFECT_API_URL={url} prefect deployment run pipeline/nightly\n"
            "Stop: Ctrl-C",
            flush=True,
        )
        while server.poll() is None and worker.poll() is None:
            time.sleep(1)
        raise ServeError("the server or the worker has ended; .prefect/server.log may say why")


def _configure(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise ServeError(f"`prefect {' '.join(command)}` failed:\n{done.stdout}{done.stderr}")


def _wait_for(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise ServeError("the Prefect server does not answer; .prefect/server.log says why")
        time.sleep(0.2)


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServeError(
                f"port {port} is taken (is `make serve` running already?); "
                f"choose another: make serve ARGS='--port {port + 1}'"
            ) from error


@contextmanager
def _prefect(
    *command: str, environment: dict[str, str], log: str | None = None
) -> Generator[subprocess.Popen]:
    """A Prefect process, in a group of its own so that Ctrl-C reaches it through us, in order."""
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        output = stack.enter_context((home / f"{log}.log").open("w")) if log else None
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _announced(url: str) -> Generator[None]:
    """Tell the flows of this workspace where the server is."""
    SERVER.write_text(url)
    try:
        yield
    finally:
        SERVER.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flows.serve", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", default="modality", help="one of params/recipes.yaml")
    parser.add_argument("--port", type=int, default=4200, help="of the server, on loopback (4200)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
