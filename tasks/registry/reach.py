"""Reach of MLflow, known within seconds; MLflow itself would try for minutes.

One error says where MLflow was looked for and why it does not answer, without secrets, in one
sentence whatever was raised.
"""

import http.client
import os
import socket
import sqlite3
import ssl
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import SplitResult, urlsplit, urlunsplit
from urllib.request import urlopen

from tasks.registry.secrets import without_secrets

DATABASE = Path("mlflow.db")

_PROBE_SECONDS = 5
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_BAD_GATEWAYS = (502, 503, 504)


class TrackingError(ConnectionError):
    """MLflow cannot be reached or refuses; what the stage wrote to disk stands."""


def uri() -> str:
    """The tracking URI in force."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DATABASE.resolve()}"


def database_file(address: str) -> Path | None:
    """The file of a sqlite address, absolute; None for a server or another kind of database."""
    if not address.startswith("sqlite:///"):
        return None
    return Path(address.removeprefix("sqlite:///").partition("?")[0]).resolve()


@contextmanager
def reaching() -> Generator[None]:
    """Turn whatever MLflow raises into one error that says where MLflow was looked for."""
    import sqlalchemy.exc
    from alembic.util import CommandError

    with unburdened():
        import requests
        from mlflow.exceptions import MlflowException

    errors = (
        MlflowException,
        requests.RequestException,
        sqlalchemy.exc.SQLAlchemyError,
        CommandError,
        sqlite3.Error,  # of `moved.follow`, which asks the database itself
    )
    try:
        yield
    except errors as error:
        # What follows the first line is the database's statement with its values.
        raise unreachable(uri(), str(error).partition("\n")[0]) from error


@contextmanager
def unburdened() -> Generator[None]:
    """Keep out of the imports of a block what MLflow takes if it is there and can do without.

    requests prefers chardet, whose tables take a CPU second, to charset-normalizer; MLflow knows
    polars' tables, which we log none of.
    """
    hidden = [name for name in ("chardet", "polars") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # ty: ignore[no-matching-overload]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


def unreachable(address: str, reason: str) -> TrackingError:
    """The one error, with its advice."""
    return TrackingError(
        f"MLflow at {without_secrets(address)}: {without_secrets(reason)}; start it or set "
        f"MLFLOW_TRACKING_URI (without it: {DATABASE} in the workspace), then run the stage again"
    )


def probe(address: str) -> None:
    """Raise TrackingError where nothing answers within seconds."""
    parts = urlsplit(address)
    if (file := database_file(address)) is not None:
        _probe_sqlite(address, file)
    elif parts.scheme in ("http", "https"):
        _probe_http(address, parts)
    elif parts.hostname and (port := parts.port or _PORTS.get(parts.scheme.partition("+")[0])):
        try:
            socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()
        except OSError as error:
            raise unreachable(address, f"nothing answers ({error})") from error


def _probe_http(address: str, parts: SplitResult) -> None:
    """Ask for the server's health: one that takes connections alone is as good as none."""
    host = parts.netloc.rpartition("@")[2]
    health = urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/health", "", ""))
    # Nothing is sent that a stranger must not see, so whose certificate it is does not matter here.
    anybody = ssl.create_default_context()
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    try:
        urlopen(health, timeout=_PROBE_SECONDS, context=anybody).close()
    except HTTPError as error:
        if error.code in _BAD_GATEWAYS:
            raise unreachable(address, f"nothing answers ({error})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise unreachable(address, f"nothing answers ({error})") from error


def _probe_sqlite(address: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_PROBE_SECONDS)) as database:
            database.execute("select count(*) from sqlite_master")
    except (OSError, sqlite3.Error) as error:
        raise unreachable(address, f"not a usable database ({error})") from error
