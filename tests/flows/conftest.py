"""Workspaces with a toy graph, real DVC in them and one real Prefect server for the session."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.pipeline import main

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a Prefect server on loopback."""
    url = f"http://127.0.0.1:{(port := free_port())}/api"
    home = tmp_path_factory.mktemp("prefect")
    command = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env={**os.environ, "PREFECT_HOME": str(home)},
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            wait_until(lambda: _answers(f"{url}/health"), 120)
            yield url
        finally:
            APILogWorker.drain_all(timeout=5)
            server.kill()  # it would wait for this process's connections


@dataclass
class Workspace:
    """A folder in which flows run."""

    folder: Path
    environment: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a Python module; both its streams are one pipe, its process group is its own."""
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """The exit status and everything that was said."""
        process = self.start(*command)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def control(self, name: str, value: object) -> None:
        (self.folder / "control" / name).write_text(str(value))

    def text(self, path: str) -> str:
        return (self.folder / path).read_text()

    def log(self) -> list[str]:
        """What the toy stages did since the last call."""
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def reached(self, line: str) -> bool:
        path = self.folder / "log"
        return path.exists() and line in path.read_text().splitlines()

    def processes(self) -> list[str]:
        """What still runs in this folder."""
        found = []
        for process in psutil.process_iter():
            try:
                here = process.cwd() == str(self.folder) and process.pid != os.getpid()
                if here and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def _environment(**more: str) -> dict[str, str]:
    ours = ("PREFECT_", "DVC_", "MLFLOW_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | more


@pytest.fixture(scope="session")
def new_toy(tmp_path_factory: pytest.TempPathFactory, prefect_server: str) -> Workspace:
    """A recipe `toy` of three stages that do nothing but can be slow and can fail; none of them has run."""
    folder = tmp_path_factory.mktemp("new") / "toy"
    for name in ("params", "control", ".dvc"):
        (folder / name).mkdir(parents=True)
    for source, target in {
        HERE / "toy_stage.py": "toy_stage.py",
        HERE / "toy_dvc.yaml": "dvc.yaml",
        REPOSITORY / "params" / "modality.yaml": "params/toy.yaml",
        REPOSITORY / ".dvc" / "config": ".dvc/config",
        REPOSITORY / ".dvc" / ".gitignore": ".dvc/.gitignore",
        REPOSITORY / ".dvcignore": ".dvcignore",
    }.items():
        shutil.copy(source, folder / target)
    (folder / "params" / "recipes.yaml").write_text("recipes:\n  - toy\n")
    (folder / ".gitignore").write_text("/out/\n/log\n/.alloy/\n/.prefect/\n")
    workspace = Workspace(folder, _environment(PREFECT_API_URL=prefect_server))
    workspace.control("fetch.text", "checkpoint")
    workspace.control("merge.text", "method")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "toy")
    return workspace


@pytest.fixture(scope="session")
def first_run(new_toy: Workspace) -> tuple[Workspace, str]:
    """The toy after its first run, and what that run said."""
    (new_toy.folder / "reports" / "toy").mkdir(parents=True)
    (new_toy.folder / "reports" / "toy" / "table.md").write_text(f"| {new_toy.folder} |\n")
    status, said = new_toy.run("flows.pipeline", "toy")
    assert status == 0, said
    return new_toy, said


@pytest.fixture
def toy(first_run: tuple[Workspace, str], tmp_path: Path) -> Workspace:
    """A copy of the toy in which everything is up to date."""
    done, _ = first_run
    shutil.copytree(done.folder, tmp_path / "toy")
    (tmp_path / "toy" / "log").unlink()
    return Workspace(tmp_path / "toy", done.environment)


@pytest.fixture
def run_here(
    toy: Workspace,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[..., tuple[int, str]]:
    """`python -m flows.pipeline` in this process, which saves the imports: its exit status and what it said."""
    monkeypatch.chdir(toy.folder)

    def run(*arguments: str) -> tuple[int, str]:
        with temporary_settings({PREFECT_API_URL: prefect_server}):
            status = main(arguments)
        said = capfd.readouterr()
        logged = "\n".join(caplog.messages)
        caplog.clear()
        return status, said.out + said.err + logged

    return run
