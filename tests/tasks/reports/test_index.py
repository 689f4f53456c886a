"""The page of all recipes, and the origin of a result on its own page."""

import pytest

from tasks.reports.index import write_index
from tasks.reports.mlflow_pages import MLFLOW, mlflow_pages
from tasks.storage import write_json
from tests import recipes
from tests.tasks.reports.pages import Page


def test_every_recipe_has_a_row_with_what_there_is(workspace) -> None:
    """One that never ran says how to run it; one that cannot be read says why."""
    recipes.write(workspace, done=recipes.experts(), new=recipes.experts(), bad={"kind": "exprts"})
    write_json(workspace / "models/done/choice.json", {"arm": "sequential"})
    write_json(workspace / "models/done/registered.json", {"name": "toy", "version": "3"})
    (workspace / "models/done/merged").mkdir()
    (workspace / "reports/done").mkdir(parents=True)
    (workspace / "reports/done/report.html").write_text("")
    page = Page(write_index("http://prefect", "http://mlflow").read_text())
    assert page.open == []
    assert "http://mlflow/#/models/toy/versions/3" in page.loaded
    assert {"done/report.html", "http://prefect", "http://mlflow"} <= set(page.loaded)
    assert "make merge RECIPE=new" in page.text
    assert "did you mean 'experts'" in page.text


@pytest.mark.parametrize(
    ("address", "pages"),
    [
        ("", MLFLOW),
        ("sqlite:///mlflow.db", MLFLOW),
        ("https://user:S3cret@host:8080/mlflow/?token=S3cret", "https://host:8080/mlflow"),
    ],
)
def test_an_address_shows_no_secret(monkeypatch, address, pages) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert mlflow_pages() == pages
