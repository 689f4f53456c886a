"""The only module that imports MLflow: runs with their curves, and the registry of models.

Where MLflow is comes from the environment (`MLFLOW_TRACKING_URI`, `MLFLOW_REGISTRY_URI`); without it, it is
`mlflow.db` and `mlartifacts/` in the workspace. The import costs seconds of CPU, so it happens on first use.
"""

import os
import socket
import sqlite3
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

DEFAULT_URI = "sqlite:///mlflow.db"
ARTIFACTS = Path("mlartifacts")

_PROBE_SECONDS = 5
_FLUSH_SECONDS = 2
_MOST_POINTS_A_REQUEST = 1000  # the limit of MLflow's log-batch
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # MLflow's own default is to try for minutes; a stage that cannot reach it is run again instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


class TrackingError(ConnectionError):
    """MLflow cannot be reached or refuses; what the stage wrote to disk stands."""


def uri() -> str:
    """The tracking URI in force."""
    return os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


class Log:
    """One MLflow run that is being written. Points that cannot be delivered wait; the end delivers or fails."""

    def __init__(self, client, run_id: str) -> None:
        self.run_id = run_id
        self._client = client
        self._points: list = []
        self._flushed = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add one point to each named curve; a `/` in a name groups curves in MLflow's page."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._points += [Metric(name, float(value), now, step) for name, value in values.items()]
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            try:
                self._deliver()
            except TrackingError as error:
                # Hours of training are worth more than a curve: keep the points, try again later.
                print(f"curves wait: {error}")

    def params(self, values: Mapping[str, object]) -> None:
        """Record settings; MLflow refuses to change one that is already there."""
        from mlflow.entities import Param

        with _reaching():
            self._client.log_batch(
                self.run_id, params=[Param(name, str(value)) for name, value in values.items()]
            )

    def tags(self, values: Mapping[str, str]) -> None:
        with _reaching():
            for name, value in values.items():
                self._client.set_tag(self.run_id, name, value)

    def _deliver(self) -> None:
        self._flushed = time.monotonic()
        while self._points:
            batch = self._points[:_MOST_POINTS_A_REQUEST]
            with _reaching():
                self._client.log_batch(self.run_id, metrics=batch)
            del self._points[: len(batch)]

    def _end(self, status: str) -> None:
        self._deliver()
        with _reaching():
            self._client.set_terminated(self.run_id, status)


@contextmanager
def run(
    recipe: str, name: str, tags: Mapping[str, str] | None = None, *, resume: str | None = None
) -> Generator[Log]:
    """Open one MLflow run in the experiment that is named as the recipe.

    `resume` is the `run_id` of an earlier, interrupted run: its curves go on. An exception in the
    block marks the run as failed (an interrupt: as killed) and passes through.
    Raises TrackingError, within seconds, when MLflow cannot be reached.
    """
    client = connect()
    with _reaching():
        run_id = resume if resume and _is_there(client, resume) else None
        if run_id is None:
            experiment = _experiment(client, recipe)
            run_id = client.create_run(experiment, run_name=name, tags=dict(tags or {})).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
    log = Log(client, run_id)
    try:
        yield log
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            log._end(status)
        except TrackingError as lost:
            print(lost)  # must not hide why the block ended
        raise
    log._end("FINISHED")


def connect():
    """An `MlflowClient`, after a quick look that something answers at `uri()`."""
    _probe(uri())
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    with _reaching():
        return MlflowClient(tracking_uri=uri(), registry_uri=os.environ.get("MLFLOW_REGISTRY_URI"))


def _experiment(client, recipe: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(recipe)
    if found is None:
        # A server decides where artifacts go; a plain database has nobody to decide.
        location = None if uri().startswith("http") else (ARTIFACTS / recipe).resolve().as_uri()
        try:
            return client.create_experiment(recipe, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return client.get_experiment_by_name(recipe).experiment_id  # made by a run beside us
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _is_there(client, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


@contextmanager
def _reaching() -> Generator[None]:
    """Turn whatever MLflow raises into one error that says where MLflow was looked for."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError) as error:
        raise _unreachable(uri(), str(error)) from error


def _unreachable(address: str, reason: str) -> TrackingError:
    return TrackingError(
        f"MLflow at {_without_secret(address)}: {reason}; "
        f"start it or set MLFLOW_TRACKING_URI (without it: {DEFAULT_URI}), then run the stage again"
    )


def _probe(address: str) -> None:
    """Fail within seconds where nothing answers; MLflow itself would retry for minutes."""
    parts = urlsplit(address)
    if parts.scheme == "sqlite":
        return _probe_sqlite(address)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[0])
    behind_proxy = parts.scheme in getproxies() and not proxy_bypass(parts.netloc)
    if parts.hostname and port and not behind_proxy:
        try:
            socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            raise _unreachable(address, f"nothing answers ({error})") from error
    return None


def _probe_sqlite(address: str) -> None:
    path = Path(address.removeprefix("sqlite:///"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_PROBE_SECONDS)) as database:
            database.execute("select count(*) from sqlite_master")
    except (OSError, sqlite3.Error) as error:
        raise _unreachable(address, f"not a usable database ({error})") from error


def _without_secret(address: str) -> str:
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", "")) if host else address
