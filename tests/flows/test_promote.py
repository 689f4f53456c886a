"""The alias moves, or it says why not; with a real MLflow registry and a real Prefect server."""

import contextvars
import socket
import threading
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

import flows.promote
from flows.promote import main, promote, rollback
from flows.workspace import only_run
from tasks.registry import tracking
from tests.flows.conftest import REPOSITORY, wait_until

NAME = "toy-model"
DATA = {"data/vqa/test.safetensors": "digest"}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str):
    """A workspace with gates and an MLflow database, in which flows run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    gates = {
        "split": "test",
        "model": "finetuned",
        "benchmarks": {"vqa": "accuracy"},
        "minimal_gain": 1.0,
        "maximal_regression": 2.0,
    }
    recipe = yaml.safe_load((REPOSITORY / "params" / "modality.yaml").read_text())
    for file, content in {
        "recipes": {"recipes": ["toy"]},
        "toy": recipe | {"register": {"name": NAME, "model": "finetuned"}},
        "promote": {"gates": {"toy": gates}},
    }.items():
        path = tmp_path / f"params/{file}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        yield


def register(score: float, tags: dict[str, str] = DATA) -> None:
    """Leave what `tasks.registry.register` leaves, without a model."""
    with tracking.run("toy", "result", tags) as log:
        log.metrics({"test/finetuned/vqa/accuracy": score})
        log.metrics({"test/finetuned/vqa/accuracy_standard_error": 1.0})
    client = tracking.connect()
    tracking._create_registered_model(client, NAME)
    version = client.create_model_version(NAME, "file:///nowhere", log.run_id).version
    tracking.move_alias(NAME, "challenger", str(version))


def champion() -> str | None:
    found = tracking.aliased(NAME, "champion")
    return found and found.number


def said(flow, **arguments: str) -> str:
    return flow("toy", return_state=True, **arguments).message


def test_a_life_of_champions(registry) -> None:
    assert "no registered model 'toy-model'; `register` makes it" in said(promote)

    register(50)
    assert said(promote) == "toy-model version 1 is the champion: there is no champion yet"
    assert said(promote) == "toy-model version 1 is the champion already"

    register(50.5)
    assert "version 2 stays challenger: the mean changes by +0.50 = +0.4" in said(promote)
    assert champion() == "1"

    register(60)
    assert "version 3 is the champion: the mean changes by +10.00" in said(promote)
    assert champion() == "3"

    register(99, {"data/vqa/test.safetensors": "other digest"})
    state = promote("toy", return_state=True)
    assert state.is_failed()
    assert "measured on different data: vqa" in state.message
    assert champion() == "3"
    assert "regardless of the gates: new data" in said(promote, regardless="new data")
    assert champion() == "4"

    assert "version 4 was rolled back; version 3 is the champion again" in said(rollback)
    assert champion() == "3"
    assert "it was rolled back" in said(promote)  # a schedule does not bring it back
    assert champion() == "3"
    assert "version 1 is the champion again" in said(rollback)
    assert "no version is champion now" in said(rollback)
    assert champion() is None
    assert "nothing to roll back" in said(rollback)


def test_a_promotion_waits_for_the_run(registry, caplog: pytest.LogCaptureFixture) -> None:
    """While a run, perhaps registering, has the workspace, a promotion waits and says for whom."""
    register(50)
    done = []
    settings = contextvars.copy_context()
    waiting = threading.Thread(target=lambda: done.append(settings.run(said, promote)))
    with only_run("toy in Prefect"):
        waiting.start()
        wait_until(lambda: "taken by toy in Prefect" in caplog.text)
        assert not done
    waiting.join(60)
    assert done == ["toy-model version 1 is the champion: there is no champion yet"]


def test_a_registry_that_is_away_is_one_sentence(
    registry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before a flow and inside one: no traceback, but where MLflow was expected and what helps."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    assert main(["toy"]) == 2
    monkeypatch.setattr("flows.promote.find", flows.promote.find.with_options(retries=0))
    assert f"MLflow at http://127.0.0.1:{port}: nothing answers" in said(promote)
    shown = capfd.readouterr()
    assert f"MLflow at http://127.0.0.1:{port}: nothing answers" in shown.err
    assert "Traceback" not in shown.out + shown.err
