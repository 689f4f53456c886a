"""`alloy new`: a recipe that loads, added to the lists; or nothing is written."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from alloy.cli import app as cli
from tasks.recipe.graph import GRAPH, refuse_stale
from tasks.recipe.load import load, load_experts, load_models, recipes
from tasks.recipe.new import named, new
from tasks.recipe.plan import check
from tasks.recipe.section import ParamsError
from tests.recipes import experts, write

LISTED = "# The recipes that exist.\nrecipes:\n  - toy\n"


@pytest.fixture(autouse=True)
def checkout(workspace: Path) -> Path:
    """A workspace with one recipe, gates and two folders to merge."""
    write(workspace, toy=experts())
    (workspace / "params/recipes.yaml").write_text(LISTED)
    (workspace / "params/promote.yaml").write_text("gates: {}\n")
    for name in ("cats", "dogs"):
        (workspace / name).mkdir()
    return workspace


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def test_a_new_recipe_loads_and_is_in_the_lists() -> None:
    """Its file is commented, every stage's entry is in the graph, the list keeps its comment."""
    assert new("mine", ["cats", "hf://org/dog-b@v1"]) == Path("params/mine.yaml")
    recipe = load_models("mine")
    assert recipe.sets["mine"].members == {0: ["cats", "dog-b"]}
    assert recipe.fetch.checkpoints["dog-b"].source == "hf://org/dog-b@v1"
    assert recipe.registration.name == "mine"
    assert Path("params/recipes.yaml").read_text() == f"{LISTED}  - mine\n"
    assert Path("params/mine.yaml").read_text().startswith("# mine: cats and dog-b become one")
    refuse_stale("mine")
    check("mine")
    assert "mine" not in yaml.safe_load(GRAPH.read_text())["prepare"]


def test_names_that_yaml_would_read_as_something_else_are_quoted(workspace) -> None:
    for folder in ("12", "on"):
        (workspace / folder).mkdir()
    new("no", ["12", "on"])
    assert load_models("no").sets["no"].members == {0: ["12", "on"]}
    assert recipes() == ["toy", "no"]


def test_a_new_recipe_of_experts_loads() -> None:
    new("mine", ["cats"], "experts")
    recipe = load_experts("mine")
    assert {arm.checkpoint for arm in recipe.merge.arms.values()} == {"cats"}
    refuse_stale("mine")


def test_names_come_from_the_sources_or_are_given() -> None:
    sources = ["hf://org/vit@main", "hf://other/vit", "s3://b/x.y/", "mlflow:models/m@champion"]
    assert named([*sources, "mlflow:models/n/3", "pets=cats"]) == {
        "vit": "hf://org/vit@main",
        "vit_2": "hf://other/vit",
        "x_y": "s3://b/x.y/",
        "m": "mlflow:models/m@champion",
        "n": "mlflow:models/n/3",
        "pets": "cats",
    }


@pytest.mark.parametrize("text", ["recipes: [toy]\n", "recipes:\n- toy\n", "recipes:\n  - toy #x"])
def test_a_list_of_any_style_is_extended(text) -> None:
    Path("params/recipes.yaml").write_text(text)
    new("mine", ["cats", "dogs"])
    assert recipes() == ["toy", "mine"]


@pytest.mark.parametrize(
    ("name", "members", "kind", "message"),
    [
        ("toy", ["cats", "dogs"], "models", r"recipe 'toy' exists \(params/toy.yaml\)"),
        ("promote", ["cats", "dogs"], "models", "recipe 'promote' exists"),
        ("../x", ["cats", "dogs"], "models", "'../x' cannot name a recipe"),
        ("a;b", ["cats", "dogs"], "models", "cannot name a recipe"),
        ("", ["cats", "dogs"], "models", "cannot name a recipe"),
        ("mine", ["cats", "dgos"], "models", "member 'dgos': dgos: no such folder"),
        ("mine", ["cats", "ftp://x"], "models", "source 'ftp://x' is unknown; write it as one of"),
        ("mine", ["cats", "hf://"], "models", "source 'hf://' is unknown"),
        ("mine", ["cats", "cats"], "models", "'cats' is given twice"),
        ("mine", ["a=cats", "a=dogs"], "models", "two members are called 'a'"),
        ("mine", ["cats"], "models", "1 members given; a recipe of kind 'models' has 2 or more"),
        ("mine", [], "experts", "0 members given; a recipe of kind 'experts' has 1 or more"),
        ("mine", ["cats", "dogs"], "weights", "choose one of experts, models"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_and_nothing_is_written(
    name, members, kind, message
) -> None:
    before = files()
    with pytest.raises(ParamsError, match=message):
        new(name, members, kind)
    assert files() == before


def test_another_recipe_that_is_broken_is_named_before_anything_is_written() -> None:
    GRAPH.write_text("fetch: {toy: {}}\n")
    Path("params/toy.yaml").write_text("kind: experts\n")
    before = files()
    with pytest.raises(ParamsError, match=r"params/toy.yaml: fetch: this is missing"):
        new("mine", ["cats", "dogs"])
    assert files() == before


def test_a_name_that_another_recipe_registers_under_is_refused() -> None:
    write(Path(), toy=experts(register={"name": "mine", "model": "merged"}))
    before = files()
    with pytest.raises(ParamsError, match="'mine' is the name of recipe 'toy', too"):
        new("mine", ["cats", "dogs"])
    assert files() == before


def test_the_command_takes_members_one_after_another() -> None:
    """`--members a b`, in a checkout; errors are one line and a status."""
    run = CliRunner().invoke(cli.app, ["new", "mine", "--members", "cats", "dogs"])
    assert run.exit_code == 0, run.output
    assert "make merge RECIPE=mine" in run.output
    assert load("mine").kind == "models"
    run = CliRunner().invoke(cli.app, ["new", "mine", "--members", "cats", "dogs"])
    assert run.exit_code == 1
    assert run.output.startswith("alloy new: recipe 'mine' exists")


def test_an_installed_library_has_no_commands_of_the_pipeline(tmp_path, monkeypatch) -> None:
    """Nothing is imported from a folder that is no checkout."""
    (tmp_path / "tasks/recipe").mkdir(parents=True)
    (tmp_path / "tasks/recipe/cli.py").write_text("raise AssertionError")
    before = len(cli.app.registered_commands)
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail(name))
    cli.add_pipeline(tmp_path)
    assert len(cli.app.registered_commands) == before
