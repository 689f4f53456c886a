"""A look at whether MLflow, as it is set now, holds a result: files that lie around do not say.

The workspace's own database is asked directly: MLflow's import would cost a second whenever there
is nothing to do.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from tasks.recipe.load import Recipe
from tasks.registry import reach, tracking
from tasks.storage import read_json

KEY = "alloy.result"  # tag of a version: the result that it is


def is_lost(recipe: Recipe) -> bool:
    """True where a result was registered, but not at the server or database in force.

    Another server, a new database, a version that somebody deleted, a server that does not answer:
    stage register will register the result there, or say what is wrong.
    """
    file = recipe.workspace.registered
    if not file.is_file():
        return False  # DVC knows that the stage must run
    try:
        registered = read_json(file)
        name, number, key = (registered[field] for field in ("name", "version", "result"))
    except (ValueError, TypeError, KeyError):
        return False  # edited by hand, which DVC sees, too
    try:
        database = reach.database_file(reach.uri())
        if database is not None and not os.environ.get("MLFLOW_REGISTRY_URI"):
            return _of_database(database, name, number) != key
        found = {(entry.number, entry.tags.get(KEY)) for entry in tracking.versions(name)}
        return (number, key) not in found
    except (reach.TrackingError, sqlite3.Error):
        return True


def _of_database(path: Path, name: str, number: str) -> str | None:
    """The result that a version is, as MLflow's database has it."""
    if not path.is_file():
        return None
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        row = database.execute(
            "select value from model_version_tags join model_versions using (name, version) "
            "where name = ? and version = ? and key = ? and current_stage != 'Deleted_Internal'",
            (name, number, KEY),
        ).fetchone()
    return row[0] if row else None
