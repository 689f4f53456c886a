"""Prefect's database comes with the environment; a workspace that has none gets a copy."""

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from flows import database
from flows.server import own_server
from flows.services import ServerError, prefect_server
from tests.servers import free_port


@pytest.fixture
def lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database of an environment, and a workspace to which it can be lent."""
    template = tmp_path / "template.db"
    template.write_bytes(b"the environment's")
    monkeypatch.setattr(database, "TEMPLATE", template)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "prefect.db"


def test_a_database_is_lent_once(lent: Path) -> None:
    """Never over the one that a workspace has; nothing else is left beside it."""
    database.lend(lent.parent)
    assert lent.read_bytes() == b"the environment's"
    lent.write_bytes(b"runs")
    database.lend(lent.parent)
    assert lent.read_bytes() == b"runs"
    assert list(lent.parent.iterdir()) == [lent]


def test_an_environment_without_one_lends_none(lent: Path) -> None:
    """Prefect's server then makes its own, as it does where a folder takes none."""
    database.lend(database.TEMPLATE)  # a file where a folder should be
    assert database.TEMPLATE.read_bytes() == b"the environment's"
    database.TEMPLATE.unlink()
    database.lend(lent.parent)
    assert not lent.exists()


def test_the_server_of_a_run_finds_it(lent: Path) -> None:
    """It lies there before the server has begun."""

    def look() -> None:
        assert lent.read_bytes() == b"the environment's"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        own_server(look).__enter__()


def test_the_server_that_stays_finds_it(lent: Path) -> None:
    """`make serve` and `make ui` start another, here one that ends at once."""
    with (
        pytest.raises(ServerError, match="does not answer"),
        prefect_server(free_port(), {**os.environ, "PYTHONHOME": "/nowhere"}),
    ):
        pass
    assert lent.read_bytes() == b"the environment's"


def test_it_is_what_prefect_makes(prefect_database: Path) -> None:
    """Migrated to the head of its migrations, without a run; it lies in the environment."""
    assert prefect_database.is_relative_to(sys.prefix)
    with closing(sqlite3.connect(prefect_database)) as connection:
        assert connection.execute("select count(*) from alembic_version").fetchone() == (1,)
        assert connection.execute("select count(*) from flow_run").fetchone() == (0,)
