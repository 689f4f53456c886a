"""The workspace's own MLflow database after its checkout was moved or copied.

MLflow records where artifacts lie as absolute addresses. The database and `mlartifacts/` lie side
by side, so those that lie elsewhere are told where they are now.
"""

import sqlite3
from contextlib import closing
from itertools import product
from pathlib import Path
from urllib.parse import unquote

_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def follow(database: Path, artifacts: Path) -> None:
    """Let the addresses of experiments whose artifacts lie beside a database say so."""
    if not (database.is_file() and artifacts.is_dir()):
        return
    here = {
        f"/{artifacts.name}/{folder.name}": folder.resolve().as_uri()
        for folder in artifacts.iterdir()
        if folder.is_dir()
    }
    with closing(sqlite3.connect(database)) as connection:
        tables = {row[0] for row in connection.execute("select name from sqlite_master")}
        if not {table for table, _ in _ADDRESSES} <= tables:
            return  # MLflow has yet to make or to upgrade them
        found = connection.execute("select artifact_location from experiments").fetchall()
        moved = {
            old: new
            for (old,) in found
            for end, new in here.items()
            if old and unquote(old).endswith(end) and old != new
        }
        with connection:  # one transaction
            for (old, new), (table, column) in product(moved.items(), _ADDRESSES):
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "
                    f"where {column} = ? or substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
