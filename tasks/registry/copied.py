"""A version of a model in another MLflow, with its files, its page and what says which it is."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.registry import tracking
from tasks.registry.held import KEY
from tasks.registry.reach import database_file, probe, reaching, unreachable, uri
from tasks.registry.secrets import without_secrets

COPIED_FROM = "alloy.copied_from"  # tag of a version: where it was registered first
_KEPT = (KEY, "recipe", "alloy.promoted")  # tags of a version that go along


def copy_version(name: str, number: str, alias: str, to: str) -> str:
    """Copy a version to the MLflow at another address, with an alias there; its number there.

    What was copied already is not copied again.

    Raises:
        TrackingError: one of the two does not answer.
    """
    here = tracking.connect()
    probe(to)
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    with reaching():
        version = here.get_model_version(name, number)
        mlflow.set_tracking_uri(uri())
        if registry := os.environ.get("MLFLOW_REGISTRY_URI"):
            mlflow.set_registry_uri(registry)
    with TemporaryDirectory() as folder:
        with reaching():
            files = mlflow.artifacts.download_artifacts(f"models:/{name}/{number}", dst_path=folder)
        try:
            there = MlflowClient(tracking_uri=to, registry_uri=to)
            copied = _held(there, name, version.tags.get(KEY)) or _upload(
                there, name, version, Path(files), to
            )
            there.set_registered_model_alias(name, alias, copied)
        except MlflowException as error:
            raise unreachable(to, str(error).partition("\n")[0]) from error
    return copied


def _held(there, name: str, key: str | None) -> str | None:
    """The number of the version that is this result, in the other MLflow."""
    found = there.search_model_versions(f"name = '{name}'")
    return next((str(v.version) for v in found if key and v.tags.get(KEY) == key), None)


def _upload(there, name: str, version, files: Path, to: str) -> str:
    source = f"{without_secrets(uri())} models:/{name}/{version.version}"
    database = database_file(to)
    place = None if database is None else (database.parent / "mlartifacts" / name).as_uri()
    experiment = there.get_experiment_by_name(name)
    experiment_id = (
        there.create_experiment(name, artifact_location=place)
        if experiment is None
        else experiment.experiment_id
    )
    run = there.create_run(experiment_id, run_name=f"copy of version {version.version}")
    there.set_tag(run.info.run_id, COPIED_FROM, source)
    there.log_artifacts(run.info.run_id, str(files), "model")
    there.set_terminated(run.info.run_id)
    if not there.search_registered_models(f"name = '{name}'"):
        there.create_registered_model(name)
    tags = {key: version.tags[key] for key in _KEPT if key in version.tags}
    created = there.create_model_version(
        name,
        f"{run.info.artifact_uri}/model",
        run.info.run_id,
        tags={**tags, COPIED_FROM: source},
        description=version.description,
    )
    return str(created.version)
