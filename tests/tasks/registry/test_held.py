"""The look at whether MLflow holds a result: it does, or register runs again."""

import socket
from types import SimpleNamespace

import pytest

from tasks.registry import tracking
from tasks.registry.held import KEY, is_lost
from tasks.storage import write_json
from tasks.workspace import Workspace


@pytest.fixture
def recipe(mlflow_workspace):
    """A recipe whose result, key "k", is version 1 of the workspace's database."""
    client = tracking.connect()
    client.create_registered_model("mine")
    client.create_model_version("mine", str(mlflow_workspace / "model"), tags={KEY: "k"})
    recipe = SimpleNamespace(workspace=Workspace("mine"))
    recipe.workspace.models.mkdir(parents=True)
    write_json(recipe.workspace.registered, {"name": "mine", "version": "1", "result": "k"})
    return recipe


def test_what_the_registry_holds_is_not_lost(recipe, monkeypatch, mlflow_workspace) -> None:
    """The database read directly, and asked through MLflow, say the same."""
    assert not is_lost(recipe)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{mlflow_workspace / 'mlflow.db'}")
    assert not is_lost(recipe)


def test_addresses_of_one_database_say_the_same(recipe, monkeypatch) -> None:
    """A relative address and one with a query mean the workspace's file, too."""
    for address in ("sqlite:///mlflow.db", "sqlite:///mlflow.db?timeout=5"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert not is_lost(recipe)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"name": 3}'])
def test_a_damaged_receipt_is_dvcs_to_find(recipe, content: str) -> None:
    recipe.workspace.registered.write_text(content)
    assert not is_lost(recipe)


def test_what_was_never_registered_is_not_lost(recipe) -> None:
    recipe.workspace.registered.unlink()
    assert not is_lost(recipe)


@pytest.mark.parametrize("through_mlflow", [False, True])
def test_another_result_and_a_deleted_version_are_lost(
    recipe, monkeypatch, mlflow_workspace, through_mlflow: bool
) -> None:
    if through_mlflow:
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{mlflow_workspace / 'mlflow.db'}")
    write_json(recipe.workspace.registered, {"name": "mine", "version": "1", "result": "other"})
    assert is_lost(recipe)
    write_json(recipe.workspace.registered, {"name": "mine", "version": "1", "result": "k"})
    tracking.connect().delete_model_version("mine", "1")
    assert is_lost(recipe)


def test_another_database_or_a_server_that_is_away_holds_nothing(recipe, monkeypatch) -> None:
    """Register then says what is wrong; a new database is not made by the question."""
    other = recipe.workspace.models.resolve() / "other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert is_lost(recipe)
    assert not other.exists()
    other.write_bytes(b"")
    assert is_lost(recipe)
    other.write_text("no database, " * 1000)
    assert is_lost(recipe)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert is_lost(recipe)
