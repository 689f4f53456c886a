"""MLflow, which this module and `flavours` alone import: runs with their curves, the registry.

Where MLflow is comes from the environment (`MLFLOW_TRACKING_URI`, `MLFLOW_REGISTRY_URI`); without
it, it is `mlflow.db` and `mlartifacts/` in the workspace. The import costs seconds of CPU, so it
happens on first use.
"""

import json
import os
import socket
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psutil

from tasks.registry.log import Log, origin
from tasks.registry.moved import follow
from tasks.registry.reach import (
    DATABASE,
    TrackingError,
    database_file,
    probe,
    reaching,
    unburdened,
    uri,
)
from tasks.registry.secrets import without_secrets

ARTIFACTS = Path("mlartifacts")
WRITER = "alloy.writer"  # tag of a run: the process that writes it
PARENT = "mlflow.parentRunId"
MADE = "alloy.made"  # tag of a run: SHA-256 of the weights that it made
LINEAGE = "lineage.json"  # artifact of a run: what its result was made of

_CLOCK_SECONDS = 5  # by which a clock that is set right may change when a process began
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # MLflow's own default is to try for minutes; a stage that cannot reach it is run again instead.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Large files go through a server in parts, which proxies take, where its store knows parts.
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
    # What it prints at the end of a run is the address with its password.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# MLflow 3.17 warns of its own imports and of what it does to pandas; none of it is about us.
_NOISE = (
    ".*Any type hint is inferred as AnyType",
    "Operation with range is deprecated",
    ".*An input example was not provided",
)


class NotRegisteredError(ValueError):
    """The registry has no such model, version or alias."""


class Version(NamedTuple):
    """One version of a registered model."""

    number: str
    run_id: str
    tags: Mapping[str, str]


class Run(NamedTuple):
    """The record that MLflow has of a run that is over."""

    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@contextmanager
def run(
    recipe: str,
    name: str,
    tags: Mapping[str, str] | None = None,
    *,
    resume: str | None = None,
    parent: str | None = None,
    system_metrics: bool = False,
) -> Generator[Log]:
    """Open one MLflow run in the experiment that is named as the recipe.

    An exception in the block marks the run as failed (an interrupt: as killed) and passes through.

    Args:
        resume: the `run_id` of an earlier, interrupted run: its curves go on.
        parent: the `run_id` of the run that MLflow's page shows this one under.
        system_metrics: watch the processor, the memory and the GPUs meanwhile.

    Raises:
        TrackingError: within seconds, when MLflow cannot be reached.
    """
    client = connect()
    with reaching():
        experiment = _experiment(client, recipe)
        _close_killed(client, experiment)
        run_id = resume if resume and _is_there(client, resume) else None
        if run_id is None:
            owned = {**_masked(tags or {}), **_masked(origin()), WRITER: _writer()}
            owned |= {PARENT: parent} if parent else {}
            run_id = client.create_run(experiment, run_name=name, tags=owned).info.run_id
        else:
            client.set_tag(run_id, WRITER, _writer())
            client.update_run(run_id, status="RUNNING")
    log = Log(client, run_id)
    try:
        with _watched(run_id) if system_metrics else nullcontext():
            yield log
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        try:
            log.end(status)
        except TrackingError as lost:
            print(lost)  # must not hide why the block ended
        raise
    log.end("FINISHED")


@contextmanager
def _watched(run_id: str) -> Generator[None]:
    """Have MLflow log what a long stage takes of the machine."""
    import mlflow
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    mlflow.set_tracking_uri(uri())
    monitor = SystemMetricsMonitor(run_id, resume_logging=True)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def adopt(recipe: str, parent: str, stage: str) -> None:
    """Show the finished runs of a stage that nobody has adopted under a run."""
    client = connect()
    with reaching():
        experiment = _experiment(client, recipe)
        wanted = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
        for orphan in client.search_runs([experiment], wanted):
            if PARENT not in orphan.data.tags:
                client.set_tag(orphan.info.run_id, PARENT, parent)


def makers(stage: str) -> Mapping[str, str]:
    """The last finished run of a stage that made weights, by their SHA-256, in any experiment."""
    client, found = connect(), {}
    with reaching():
        everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
        wanted = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
        for run in client.search_runs(everywhere, wanted, order_by=["attributes.start_time ASC"]):
            if PARENT not in run.data.tags and MADE in run.data.tags:
                found[run.data.tags[MADE]] = run.info.run_id
    return found


def close_killed_runs(recipe: str) -> None:
    """Mark the runs of a recipe as killed whose process on this machine is gone."""
    client = connect()
    with reaching():
        if experiment := client.get_experiment_by_name(recipe):
            _close_killed(client, experiment.experiment_id)


def _close_killed(client, experiment: str) -> None:
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        if WRITER in run.data.tags and _is_gone(run.data.tags[WRITER]):
            client.set_terminated(run.info.run_id, "KILLED")


def _writer() -> str:
    """This process, so that others of this machine can tell whether it lives."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.2f}"


def _is_gone(writer: str) -> bool:
    host, pid, begun = writer.rsplit(" ", 2)
    if host != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(pid))
        another = abs(process.create_time() - float(begun)) > _CLOCK_SECONDS
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def connect():
    """An `MlflowClient`, after a quick look that something answers at `uri()`."""
    probe(uri())
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with unburdened():
        from mlflow.tracking import MlflowClient

    for message in _NOISE:  # after the import, which sets filters of its own
        warnings.filterwarnings("ignore", message)
    with reaching():
        if database_file(uri()) == DATABASE.resolve():
            follow(DATABASE, ARTIFACTS)
        return MlflowClient(tracking_uri=uri(), registry_uri=os.environ.get("MLFLOW_REGISTRY_URI"))


def register(
    log: Log,
    name: str,
    *,
    code: Path,
    artifacts: Mapping[str, Path],
    packages: Sequence[Path],
    settings: Mapping[str, object],
    requirements: Sequence[str],
    inputs: Sequence[tuple[str, str]],
    outputs: Sequence[tuple[str, str]],
    options: Mapping[str, str | int],
    example: Mapping[str, object] | None,
    flavour: Mapping[str, object] | None,
    components: Mapping[str, Path],
    tags: Mapping[str, str],
    alias: str,
) -> str:
    """Keep a model with its run and register it as a new version with an alias; its number.

    Args:
        code: the file that defines the served model (it ends with `mlflow.models.set_model`).
        artifacts: what it finds under `context.artifacts`.
        packages: folders of code that travel with the model.
        inputs, outputs: columns and their types, a `[]` behind a type for a list; none is required.
        options: the served model's parameters and their defaults.
        example: one row of input, by column; None for a model that answers none.
        flavour: the entry of MLflow's transformers flavour, beside the one of Python functions.
        components: folders that this flavour finds under `components/`.
    """
    import mlflow
    from mlflow.models import Model

    from tasks.registry import flavours

    client = connect()
    signature = flavours.signature(inputs, outputs, options)
    with reaching():
        mlflow.set_tracking_uri(uri())
        if registry := os.environ.get("MLFLOW_REGISTRY_URI"):
            mlflow.set_registry_uri(registry)
        with mlflow.start_run(run_id=log.run_id):
            logged = Model.log(
                artifact_path=None,
                name="model",
                flavor=flavours.Flavours(flavour, components),
                python_model=str(code),
                artifacts={key: str(path) for key, path in artifacts.items()},
                code_paths=[str(path) for path in packages],
                model_config=dict(settings),
                pip_requirements=list(requirements),
                signature=signature,
                input_example=None if example is None else flavours.frame(example),
                validate_serving_input=False,  # it would load the model
            )
        _create_registered_model(client, name)
        version = client.create_model_version(
            name, logged.model_uri, log.run_id, tags=_masked(tags), model_id=logged.model_id
        ).version
        client.set_registered_model_alias(name, alias, version)
    return str(version)


def load(model: str):
    """The served model of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or a folder, loaded."""
    import mlflow

    if model.startswith("models:"):
        connect()
    with reaching():
        mlflow.set_tracking_uri(uri())
        if registry := os.environ.get("MLFLOW_REGISTRY_URI"):
            mlflow.set_registry_uri(registry)
        return mlflow.pyfunc.load_model(model).unwrap_python_model()


def version_of(name: str, alias: str) -> str:
    """The number of the version that has an alias; NotRegisteredError where there is none."""
    version = aliased(name, alias)
    if version is None:
        raise NotRegisteredError(
            f"MLflow at {without_secrets(uri())}: {name!r} has no version {alias!r}"
        )
    return version.number


def aliased(name: str, alias: str) -> Version | None:
    """The version that has an alias, None where there is none."""
    client = connect()
    with reaching():
        number = _registered(client, name).aliases.get(alias)
        return None if number is None else _version(client.get_model_version(name, number))


def versions(name: str) -> list[Version]:
    """All versions of a registered model, the newest first; none where there is no such model."""
    client = connect()
    with reaching():
        listed = client.search_model_versions(f"name = '{name}'")
    return sorted(map(_version, listed), key=lambda version: -int(version.number))


def model_tags(name: str) -> Mapping[str, str]:
    """The tags of a registered model."""
    client = connect()
    with reaching():
        return _registered(client, name).tags


def finished_run(run_id: str) -> Run:
    client = connect()
    with reaching():
        data = client.get_run(run_id).data
    return Run(data.metrics, data.tags)


def lineage(run_id: str) -> dict:
    """Return what a run's result was made of; empty where the run keeps no such file."""
    client = connect()
    with reaching(), TemporaryDirectory() as folder:
        if not any(entry.path == LINEAGE for entry in client.list_artifacts(run_id)):
            return {}
        return json.loads(Path(client.download_artifacts(run_id, LINEAGE, folder)).read_text())


def values_by_example(run_id: str, file: str) -> dict:
    """The arrays that a run kept in a safetensors file; none where it kept no such file."""
    from safetensors.numpy import load_file

    client = connect()
    with reaching(), TemporaryDirectory() as folder:
        if not any(entry.path == file for entry in client.list_artifacts(run_id)):
            return {}
        return load_file(client.download_artifacts(run_id, file, folder))


def move_alias(name: str, alias: str, number: str | None) -> None:
    """Give an alias to a version; to none: take it away."""
    client = connect()
    with reaching():
        if number is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, number)


def tag_model(name: str, tags: Mapping[str, str]) -> None:
    client = connect()
    with reaching():
        for key, value in tags.items():
            client.set_registered_model_tag(name, key, without_secrets(value))


def describe(name: str, number: str, text: str) -> None:
    """Put a text, in Markdown, below what a version's page says so far."""
    client = connect()
    with reaching():
        so_far = client.get_model_version(name, number).description
        whole = "\n\n".join(filter(None, [so_far, without_secrets(text)]))
        client.update_model_version(name, number, whole)


def tag_version(name: str, number: str, tags: Mapping[str, str]) -> None:
    client = connect()
    with reaching():
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, without_secrets(value))


def model_files(name: str, number: str) -> dict[str, int]:
    """The files of a version and their sizes in bytes."""
    client = connect()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with reaching():
        location = _download_uri(client, name, number)
        stored = get_artifact_repository(location, tracking_uri=uri())
        files, folders = {}, [None]
        while folders:
            for entry in stored.list_artifacts(folders.pop()):
                if entry.is_dir:
                    folders.append(entry.path)
                else:
                    files[entry.path] = entry.file_size
    return files


@contextmanager
def model_file(name: str, number: str, path: str) -> Generator[Path]:
    """A copy of one file of a version, for as long as the block runs."""
    client = connect()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with TemporaryDirectory() as folder:
        with reaching():
            location = _download_uri(client, name, number)
            stored = get_artifact_repository(location, tracking_uri=uri())
            local = stored.download_artifacts(path, folder)
        yield Path(local)


def _download_uri(client, name: str, number: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_download_uri(name, number)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise NotRegisteredError(
            f"MLflow at {without_secrets(uri())} has no version {number} of {name!r}"
        ) from error


def _registered(client, name: str):
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise NotRegisteredError(
            f"MLflow at {without_secrets(uri())} has no registered model {name!r}; "
            "`register` makes it"
        ) from error


def _create_registered_model(client, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _masked(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: without_secrets(value) for name, value in tags.items()}


def _version(entity) -> Version:
    return Version(str(entity.version), str(entity.run_id), dict(entity.tags))


def _experiment(client, recipe: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(recipe)
    if experiment is None:
        # A server decides where artifacts go; a plain database has nobody to decide.
        location = None if uri().startswith("http") else (ARTIFACTS / recipe).resolve().as_uri()
        try:
            return client.create_experiment(recipe, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return client.get_experiment_by_name(recipe).experiment_id  # made by a run beside us
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def _is_there(client, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
