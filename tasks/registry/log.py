"""One MLflow run under way, and where it comes from."""

import getpass
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from tasks.registry.reach import TrackingError, reaching
from tasks.registry.secrets import without_secrets
from tasks.workspace import revision

_FLUSH_SECONDS = 2
_MOST_POINTS_A_REQUEST = 1000  # the limits of MLflow's log-batch
_MOST_PARAMS_A_REQUEST = 100


class Log:
    """One MLflow run under way. Points that cannot be delivered wait; the end delivers or fails."""

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

        params = [Param(name, without_secrets(str(value))) for name, value in values.items()]
        with reaching():
            for start in range(0, len(params), _MOST_PARAMS_A_REQUEST):
                batch = params[start : start + _MOST_PARAMS_A_REQUEST]
                self._client.log_batch(self.run_id, params=batch)

    def tags(self, values: Mapping[str, str]) -> None:
        with reaching():
            for name, value in values.items():
                self._client.set_tag(self.run_id, name, without_secrets(value))

    def file(self, path: Path) -> None:
        """Keep a copy of a file, or of a folder under its name, with the run."""
        with reaching():
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), path.name)
            else:
                self._client.log_artifact(self.run_id, str(path))

    def values(self, file: str, content: Mapping[str, object]) -> None:
        """Keep nested values with the run, as a JSON file of this name."""
        with reaching():
            self._client.log_dict(self.run_id, dict(content), file)

    def curves_of(self, run_id: str) -> None:
        """Take over the curves of another run, but for what it took of its machine."""
        with reaching():
            for name in self._client.get_run(run_id).data.metrics:
                if not name.startswith("system/"):
                    self._points += self._client.get_metric_history(run_id, name)
        self._deliver()

    def dataset(self, name: str, digest: str, context: str, source: Mapping[str, object]) -> None:
        """Name data that the result was made or measured with; a digest keeps 36 characters.

        Args:
            source: where they lie or came from, with `uri` for one place.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        kind, place = "local", without_secrets(json.dumps(source))
        data = Dataset(name=name, digest=digest[:36], source_type=kind, source=place)
        tags = [InputTag("mlflow.data.context", context)]
        with reaching():
            self._client.log_inputs(self.run_id, datasets=[DatasetInput(data, tags)])

    def _deliver(self) -> None:
        self._flushed = time.monotonic()
        while self._points:
            batch = self._points[:_MOST_POINTS_A_REQUEST]
            with reaching():
                self._client.log_batch(self.run_id, metrics=batch)
            del self._points[: len(batch)]

    def end(self, status: str) -> None:
        self._deliver()
        with reaching():
            self._client.set_terminated(self.run_id, status)


def origin() -> dict[str, str]:
    """The tags by which MLflow's pages say who made a run, with which command and commit."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have a number alone
        tags["mlflow.user"] = "unknown"
    commit = revision()
    return tags if commit is None else {**tags, "mlflow.source.git.commit": commit[:40]}
