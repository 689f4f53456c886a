"""The workspace's own MLflow database after its checkout was moved or copied.

MLflow records where artifacts lie as absolute addresses. The database and `mlartifacts/` lie side
by side, so those that lie elsewhere are told where they are now.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def follow(database: Path, artifacts: Path) -> None:
    """Let the addresses in a database begin with the folder of artifacts beside it."""
    if not (database.is_file() and artifacts.is_dir()):
        return
    here = artifacts.resolve().as_uri()
    with closing(sqlite3.connect(database)) as connection:
        tables = {row[0] for row in connection.execute("select name from sqlite_master")}
        if not {table for table, _ in _ADDRESSES} <= tables:
            return  # MLflow has yet to make or to upgrade them
        found = connection.execute("select artifact_location from experiments").fetchall()
        roots = {location.rpartition("/")[0] for (location,) in found if location}
        ours = {root for root in roots if root.endswith(f"/{artifacts.name}")}
        with connection:  # one transaction
            for old in ours - {here}:
                for table, column in _ADDRESSES:
                    connection.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) "
                        f"where substr({column}, 1, ?) = ?",
                        (here, len(old) + 1, len(old) + 1, f"{old}/"),
                    )
