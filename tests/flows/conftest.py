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
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API address of a Prefect server on loopback."""
    url = f"http://127.0.0.1:{(port := free_port())}/api"
    home = tmp_path_factory.mktemp("prefect")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "PREFECT_HOME": str(home)},
        stdout=(home / "server.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: _answers(f"{url}/health"), 120)
        yield url
    finally:
        server.terminate()
        server.wait(30)


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
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found


def _environment(**more: str) -> dict[str, str]:
    ours = ("PREFECT_", "DVC_", "MLFLOW_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | more


@pytest.fixture()
def toy(tmp_path: Path, prefect_server: str) -> Workspace:
    """A recipe `toy` of three stages that do nothing but can be slow and can fail."""
    folder = tmp_path / "toy"
    for name in ("params", "control", ".dvc"):
        (folder / name).mkdir(parents=True)
    for source, target in {
        HERE / "toy_stage.py": "toy_stage.py",
        HERE / "toy_dvc.yaml": "dvc.yaml",
        REPOSITORY / "params" / "modality.yaml": "params/toy.yaml",
        REPOSITORY / ".dvc" / "config": ".dvc/config",
        REPOSITORY / ".dvcignore": ".dvcignore",
    }.items():
        shutil.copy(source, folder / target)
    (folder / "params" / "recipes.yaml").write_text("recipes:\n  - toy\n")
    (folder / ".gitignore").write_text("/out/\n/log\n/.alloy/\n/.prefect/\n/.dvc/tmp/\n/.dvc/cache/\n")
    workspace = Workspace(folder, _environment(PREFECT_API_URL=prefect_server))
    workspace.control("fetch.text", "checkpoint")
    workspace.control("merge.text", "method")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "toy")
    return workspace
