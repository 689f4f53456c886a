"""A workspace of its own for each test, and the servers that sources and sinks talk to."""

import os
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.registry import tracking
from tasks.sources import source, transfer
from tasks.sources.s3 import s3_client
from tests import recipes, servers


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace that is the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write_recipe(workspace: Path) -> Callable[..., str]:
    """Write the recipe `toy`, complete but for the sections given; its name."""

    def write(**sections: object) -> str:
        recipes.write(workspace, toy=recipes.experts(**sections))
        return "toy"

    return write


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges and pauses that fit files of a few hundred kilobytes."""
    monkeypatch.setattr(transfer, "RANGE_BYTES", 1 << 16)
    for module in (transfer, source):
        monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.HubServer]:
    server = servers.HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as port:
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Relay]:
    """Environment of somebody who may use the server; traffic is counted, or cut."""
    relay = servers.Relay(s3_port)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", servers.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", servers.SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield relay
    relay.close()


@pytest.fixture
def bucket(s3: servers.Relay, request: pytest.FixtureRequest) -> "Bucket":
    return Bucket(f"bucket-{abs(hash(request.node.nodeid)) % 10**12}")


class Bucket:
    """An empty bucket."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = s3_client()
        self.client.create_bucket(Bucket=name)

    def put(self, prefix: str, files: dict[str, bytes], **metadata: str) -> None:
        for path, content in files.items():
            self.client.put_object(
                Bucket=self.name, Key=f"{prefix}/{path}", Body=content, Metadata=metadata
            )

    def listed(self, prefix: str = "") -> list[str]:
        answer = self.client.list_objects_v2(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for entry in answer.get("Contents", [])]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: its tables take seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.connect().search_experiments()
    return path


@pytest.fixture
def mlflow_workspace(
    workspace: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A workspace with an MLflow database of its own."""
    # MLflow sets these for its children; put back what was there.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "")
    shutil.copy(empty_database, workspace / "mlflow.db")
    return workspace


class Planted:
    """Secrets in the environment, and a search for them in whatever a stage wrote."""

    TOKEN, KEY, PASSWORD = "hf_PlantedTokenOfTheHub", "Planted/Access+Key", "Planted%2FPassword"

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._folder = folder
        self._capture = capture

    def run(self, stage: str, monkeypatch: pytest.MonkeyPatch) -> str:
        """Run a stage as `python -m` does; all that it printed, which holds no secret."""
        monkeypatch.setattr("sys.argv", [stage, "toy"])
        try:
            runpy.run_module(f"tasks.{stage}", run_name="__main__", alter_sys=True)
            message = ""
        except SystemExit as end:
            message = str(end.code)
        output = "\n".join((message, *self._capture.readouterr()))
        assert self._found_in(output.encode()) == []
        return output

    def leaks(self) -> list[str]:
        """The files of the workspace that hold a secret, MLflow's database among them."""
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        return [
            f"{path.relative_to(self._folder)}: {secret}"
            for path in files
            for secret in self._found_in(path.read_bytes())
        ]

    def _found_in(self, content: bytes) -> list[str]:
        forms = (self.TOKEN, self.KEY, self.PASSWORD, self.PASSWORD.replace("%2F", "/"))
        return [form for form in forms if form.encode() in content]


@pytest.fixture
def planted(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Planted:
    """Secrets in the environment of whatever runs in the workspace."""
    monkeypatch.setenv("HF_TOKEN", Planted.TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", Planted.KEY)
    return Planted(workspace, capfd)
