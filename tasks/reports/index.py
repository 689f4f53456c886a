"""`reports/index.html`: all recipes of a workspace, their results, and where to look further."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tasks.recipe.load import Recipe, load, recipes
from tasks.recipe.section import ParamsError
from tasks.reports.html import element, link, page, table
from tasks.reports.report import Grid, Markup
from tasks.storage import read_json, write_file
from tasks.workspace import REPORTS

INDEX = REPORTS / "index.html"
HEADER = ["recipe", "arm", "report", "evaluated", "model", "registered as"]


def write_index(prefect: str, mlflow: str) -> Path:
    """Write the page of all recipes; the addresses are those of Prefect's and MLflow's pages."""
    grid = Grid("", HEADER, [_row(name, mlflow) for name in recipes()], numbers=False)
    further = element(
        "p",
        "Runs of the pipeline: ",
        link(prefect, "Prefect"),
        ". Curves, metrics and versions: ",
        link(mlflow, "MLflow"),
        ".",
    )
    with write_file(INDEX) as partial:
        partial.write_text(page("Alloy: recipes", "Recipes", [table(grid), further]))
    return INDEX


def _row(name: str, mlflow: str) -> list[str]:
    """A recipe and its last result; where it cannot be read, why."""
    try:
        recipe = load(name)
    except ParamsError as error:
        return [name, str(error), "", "", "", ""]
    return [name, *_result(recipe, mlflow)]


def _result(recipe: Recipe, mlflow: str) -> Iterator[str]:
    workspace = recipe.workspace
    chosen = workspace.choice.is_file()
    yield read_json(workspace.choice)["arm"] if chosen else "not merged yet"
    if workspace.page.is_file():
        written = datetime.fromtimestamp(workspace.page.stat().st_mtime, UTC)
        yield link(workspace.page.relative_to(REPORTS).as_posix(), "report")
        yield f"{written:%Y-%m-%d %H:%M} UTC"
    else:
        yield "none yet"
        yield element("code", f"make merge RECIPE={recipe.name}")
    folder = recipe.registration.folder(workspace)
    yield link(f"../{folder}", str(folder)) if folder.is_dir() else "none yet"
    yield _version(recipe, mlflow) if workspace.registered.is_file() else "not registered"


def _version(recipe: Recipe, mlflow: str) -> Markup:
    """The version that register wrote down, and its page in MLflow."""
    receipt = read_json(recipe.workspace.registered)
    name, number = receipt["name"], receipt["version"]
    return link(f"{mlflow}/#/models/{name}/versions/{number}", f"{name} {number}")
