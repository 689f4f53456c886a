"""Curves arrive, runs say how they ended, a missing MLflow is noticed within seconds."""

import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tasks.registry import tracking
from tasks.registry.tracking import TrackingError
from tests import servers

pytestmark = pytest.mark.usefixtures("mlflow_workspace")


def curve(run_id: str, name: str) -> list[tuple[int, float]]:
    return [
        (point.step, point.value) for point in tracking.connect().get_metric_history(run_id, name)
    ]


def status(run_id: str) -> str:
    return tracking.connect().get_run(run_id).info.status


def test_every_point_of_a_curve_arrives_in_the_workspace_database(mlflow_workspace) -> None:
    with tracking.run("toy", "finetune", {"stage": "finetune"}) as log:
        for step in range(1500):  # more than fit into one request
            log.metrics({"loss": 1 / (1 + step)}, step)
        log.params({f"p{i}": i for i in range(150)})
    assert curve(log.run_id, "loss") == [(step, 1 / (1 + step)) for step in range(1500)]
    found = tracking.connect().get_run(log.run_id)
    assert found.info.run_name == "finetune"
    assert found.data.tags["stage"] == "finetune"
    assert len(found.data.params) == 150
    assert status(log.run_id) == "FINISHED"
    assert str(mlflow_workspace / "mlartifacts") in found.info.artifact_uri


def test_a_long_stage_shows_what_it_takes_of_the_machine(monkeypatch) -> None:
    """MLflow's system metrics of the processor and the memory, in the stage's own run."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    deadline = time.monotonic() + 300
    with tracking.run("toy", "finetune", system_metrics=True) as log:
        while not (metrics := tracking.connect().get_run(log.run_id).data.metrics):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= {
        *metrics
    }


@pytest.mark.parametrize(
    ("error", "ending"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_a_run_that_breaks_off_says_so_keeps_its_points_and_goes_on(error, ending) -> None:
    logs: list[tracking.Log] = []

    def break_off() -> None:
        with tracking.run("toy", "finetune") as log:
            logs.append(log)
            log.metrics({"loss": 1.0}, 0)
            raise error

    with pytest.raises(error):
        break_off()
    (log,) = logs
    assert status(log.run_id) == ending
    with tracking.run("toy", "finetune", resume=log.run_id) as again:
        assert status(log.run_id) == "RUNNING"
        again.metrics({"loss": 0.5}, 1)
    assert again.run_id == log.run_id
    assert curve(log.run_id, "loss") == [(0, 1.0), (1, 0.5)]
    assert status(log.run_id) == "FINISHED"


def test_a_run_that_is_gone_is_begun_anew() -> None:
    with tracking.run("toy", "finetune", resume="0" * 32) as log:
        log.metrics({"loss": 1.0})
    assert log.run_id != "0" * 32


def test_points_wait_while_mlflow_is_away_and_the_end_delivers(monkeypatch, capsys) -> None:
    """A server that is restarted costs no training."""
    monkeypatch.setattr("tasks.registry.log._FLUSH_SECONDS", 0)
    with tracking.run("toy", "finetune") as log:
        log_batch = log._client.log_batch
        with monkeypatch.context() as patch:
            patch.setattr(log._client, "log_batch", _away)
            log.metrics({"loss": 1.0}, 0)
        assert log._client.log_batch == log_batch
        log.metrics({"loss": 0.5}, 1)
    assert "curves wait: MLflow at" in capsys.readouterr().out
    assert curve(log.run_id, "loss") == [(0, 1.0), (1, 0.5)]


def _away(*_: object, **__: object) -> None:
    import requests

    raise requests.ConnectionError("away")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9", "nothing answers"),
        ("http://user:secret@127.0.0.1:9/path", "nothing answers"),
        ("postgresql://user:secret@127.0.0.1:9/db", "nothing answers"),
        ("sqlite:////proc/nowhere/mlflow.db", "not a usable database"),
        ("sqlite:///params.yaml", "not a usable database"),
    ],
)
def test_what_is_not_there_is_said_at_once_without_secrets(
    mlflow_workspace, monkeypatch, uri: str, message: str
) -> None:
    (mlflow_workspace / "params.yaml").write_text("no database, " * 1000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=message) as caught, tracking.run("toy", "finetune"):
        raise AssertionError("the run began")
    assert time.monotonic() - begun < 90  # MLflow's own retries take minutes
    assert "secret" not in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)


@pytest.mark.slow
def test_a_server_that_hangs_is_given_up(monkeypatch) -> None:
    """One that takes connections and says nothing costs seconds, not minutes of retries."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(TrackingError, match="timed out"), tracking.run("toy", "finetune"):
            raise AssertionError("the run began")
        assert time.monotonic() - begun < 90


@pytest.mark.parametrize("is_copy", [False, True])
def test_the_database_follows_its_checkout(
    mlflow_workspace, monkeypatch, tmp_path_factory, is_copy: bool
) -> None:
    """Artifacts of a moved or copied checkout are read and written where they lie now."""
    (mlflow_workspace / "a.txt").write_text("a")
    with tracking.run("toy", "register") as log:
        log.file(mlflow_workspace / "a.txt")
    moved = tmp_path_factory.mktemp("another") / "moved here & there"
    (shutil.copytree if is_copy else shutil.move)(mlflow_workspace, moved)
    monkeypatch.chdir(moved)
    client = tracking.connect()
    assert [one.path for one in client.list_artifacts(log.run_id)] == ["a.txt"]
    assert client.get_run(log.run_id).info.artifact_uri.startswith(moved.as_uri())
    with tracking.run("toy", "register") as again:
        again.file(moved / "a.txt")
    assert len(list((moved / "mlartifacts").rglob("a.txt"))) == 2


def test_a_database_without_its_artifacts_keeps_its_addresses(
    mlflow_workspace, monkeypatch, tmp_path_factory
) -> None:
    """Only the database was copied, beside artifacts of others: what it names lies elsewhere."""
    with tracking.run("toy", "register") as log:
        pass
    before = tracking.connect().get_run(log.run_id).info.artifact_uri
    place = tmp_path_factory.mktemp("another")
    shutil.copy(mlflow_workspace / "mlflow.db", place)
    (place / "mlartifacts/other").mkdir(parents=True)
    monkeypatch.chdir(place)
    assert tracking.connect().get_run(log.run_id).info.artifact_uri == before


def _write_until_killed(pipe) -> None:
    with tracking.run("toy", "register") as log:
        pipe.send(log.run_id)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_closed_by_the_next(mlflow_workspace) -> None:
    """What a killed process left RUNNING is KILLED; a run whose process lives goes on."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_write_until_killed, args=(writer,))
    process.start()
    killed = reader.recv()
    process.join(60)
    assert status(killed) == "RUNNING"
    with tracking.run("toy", "finetune") as lives:
        assert status(killed) == "KILLED"
        tracking.close_killed_runs("toy")
        assert status(lives.run_id) == "RUNNING"


@pytest.mark.slow
def test_a_database_that_is_taken_is_one_sentence(mlflow_workspace) -> None:
    """No statement of MLflow's, none of its values: where, why, and what helps."""
    with tracking.run("toy", "finetune"):
        pass
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("begin exclusive")
        with pytest.raises(TrackingError, match="database is locked") as caught:
            tracking.versions("toy")
    assert "\n" not in str(caught.value)
    path = mlflow_workspace / "mlflow.db"
    content = bytearray(path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(TrackingError, match=r"malformed|not a database|no such table") as caught:
        tracking.versions("toy")
    assert "\n" not in str(caught.value)


def test_an_alias_moves_and_is_taken_away() -> None:
    with tracking.run("toy", "result") as log:
        log.metrics({"score": 1.0})
    client = tracking.connect()
    client.create_registered_model("toy")
    for _ in range(2):
        client.create_model_version("toy", "file:///nowhere", log.run_id)
    assert tracking.aliased("toy", "champion") is None
    tracking.move_alias("toy", "champion", "1")
    assert tracking.version_of("toy", "champion") == "1"
    tracking.move_alias("toy", "champion", "2")
    assert tracking.version_of("toy", "champion") == "2"
    assert tracking.versions("toy")[0].number == "2"
    tracking.move_alias("toy", "champion", None)
    with pytest.raises(tracking.NotRegisteredError, match="'toy' has no version 'champion'"):
        tracking.version_of("toy", "champion")
    with pytest.raises(tracking.NotRegisteredError, match="no registered model 'other'"):
        tracking.version_of("other", "champion")


def test_large_files_go_in_parts_unless_the_user_says_otherwise(monkeypatch) -> None:
    """MLflow's own switch is off: a proxy then gets files whole, however large."""
    name = "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"
    for given, expected in ((None, "true"), ("false", "false")):
        monkeypatch.delenv(name, raising=False)
        if given is not None:
            monkeypatch.setenv(name, given)
        tracking.connect()
        assert os.environ[name] == expected


@pytest.mark.slow
def test_a_large_file_goes_through_a_server_in_parts(
    mlflow_workspace, bucket, s3, monkeypatch
) -> None:
    """A real server in front of a real S3: three parts of one object, byte for byte."""
    port, part = servers.free_port(), 5 * 2**20
    destination = f"s3://{bucket.name}/kept"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", "sqlite:///server.db"]
    command += ["--artifacts-destination", destination, "--serve-artifacts"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_S3_ENDPOINT_URL": s3.url, "PATH": path}
    with (mlflow_workspace / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        servers.wait_for_port(port, process, seconds=300)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(part))
        monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(part))
        content = os.urandom(2 * part + 1000)
        (mlflow_workspace / "weights").write_bytes(content)
        with tracking.run("toy", "large") as log:
            log.file(mlflow_workspace / "weights")
        (key,) = [name for name in bucket.listed() if name.endswith("weights")]
        found = bucket.client.get_object(Bucket=bucket.name, Key=key)
        assert found["ETag"].endswith('-3"')
        assert found["Body"].read() == content
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
