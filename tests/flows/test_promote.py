"""The alias moves, or it says why not; with a real MLflow registry and a real Prefect server."""

import contextvars
import io
import socket
import threading
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

import flows.promotion
from flows.promote import main
from flows.promotion import promote, rollback
from flows.workspace import only_run
from tasks.registry import tracking
from tests.flows.conftest import REPOSITORY, wait_until

NAME = "toy-model"
DATA = {"vqa/test.safetensors": "digest"}


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


def register(score: float, data: dict[str, str] = DATA) -> None:
    """Leave what `tasks.registry.register` leaves, without a model."""
    with tracking.run("toy", "result") as log:
        log.values(tracking.LINEAGE, {"data": data})
        log.metrics({"test/finetuned/vqa/accuracy": score})
        log.metrics({"test/finetuned/vqa/accuracy_standard_error": 1.0})
    client = tracking.connect()
    tracking._create_registered_model(client, NAME)
    version = client.create_model_version(NAME, "file:///nowhere", log.run_id).version
    tracking.move_alias(NAME, "challenger", str(version))


def champion() -> str | None:
    found = tracking.aliased(NAME, "champion")
    return found and found.number


def said(flow, **arguments: object) -> str:
    return flow("toy", return_state=True, **arguments).message


@pytest.mark.slow
def test_a_flow_promotes_and_says_in_one_line_where_there_is_nothing_to(
    registry, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing that trying again cannot mend is tried again."""
    assert "no registered model 'toy-model'; `register` makes it" in said(promote)
    assert "etry" not in caplog.text
    register(50)
    assert said(promote) == "toy-model version 1 is the champion: there is no champion yet"
    register(60)
    assert "dry run: toy-model version 2 would be" in said(promote, dry_run=True)
    assert champion() == "1"
    assert "version 1 is the only champion so far" in said(rollback)
    assert "no version is champion now" in said(rollback, yes=True)
    assert champion() is None


def test_without_a_server_the_command_promotes_at_once(
    registry, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It decides, shows its table and moves the alias; rolling back the only champion asks."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", "no-prefect-here")
    monkeypatch.setattr("flows.promote._in_prefect", None)
    assert main(["toy"]) == 1
    assert "no registered model 'toy-model'" in capsys.readouterr().err
    register(50)
    assert main(["toy"]) == 0
    register(60)
    assert main(["toy", "--dry-run"]) == 0
    assert champion() == "1"
    assert main(["toy"]) == 0
    out = capsys.readouterr().out
    assert "| vqa | test, decides | 50.0 ± 1.0 | 60.0 ± 1.0 | +7.1 | independent |" in out
    assert "toy-model version 2 is the champion: the mean changes by +10.00" in out
    assert main(["toy", "--rollback"]) == 0
    assert main(["toy", "--history"]) == 0
    history = capsys.readouterr().out.splitlines()
    assert "| 2 | challenger |" in history[-2]
    assert "the mean changes by +10.00" in history[-2]
    assert "| 1 | champion |" in history[-1]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # no terminal: nobody to ask
    assert main(["toy", "--rollback"]) == 1
    assert "only champion so far: without it nothing answers" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter(["n", "y"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(["toy", "--rollback"]) == 1
    assert main(["toy", "--rollback"]) == 0
    assert champion() is None


@pytest.mark.slow
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
    monkeypatch.setattr(flows.promotion, "RETRIED_AFTER", [])
    assert f"MLflow at http://127.0.0.1:{port}: nothing answers" in said(promote)
    shown = capfd.readouterr()
    assert f"MLflow at http://127.0.0.1:{port}: nothing answers" in shown.err
    assert "Traceback" not in shown.out + shown.err
