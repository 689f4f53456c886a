"""The stage graph: DVC's, in an order that runs, and it knows the code that each stage runs."""

import ast
import sys
from pathlib import Path

import grimp
import pytest
import yaml

import alloy
from flows.graph import select, stages
from tasks.recipe.load import recipes
from tasks.recipe.section import ParamsError

REPOSITORY = Path(__file__).parents[2]
STAGES = ["fetch", "prepare", "collect", "align", "merge", "finetune", "evaluate", "register"]

# Modules whose change never changes what a stage writes: settings are tracked as params, the others parse the
# command line and report to MLflow.
WITHOUT_EFFECT = {"tasks.recipe.params", "tasks.command", "tasks.registry.tracking"}


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.usefixtures("repository")
def test_every_recipe_has_every_stage_after_what_it_reads() -> None:
    """Each recipe's stages are DVC's stages of that name, in an order in which inputs come first."""
    for recipe in recipes():
        assert [address.split("@")[0] for address in stages(recipe)] == STAGES
        assert {address.split("@")[1] for address in stages(recipe)} == {recipe}


@pytest.mark.usefixtures("repository")
def test_up_to_a_stage_is_what_it_needs() -> None:
    """`to` leaves out what a stage does not read, directly or through others."""
    assert select("modality", to="fetch") == ["fetch@modality"]
    assert select("modality", to="collect") == [
        "fetch@modality",
        "prepare@modality",
        "collect@modality",
    ]
    assert select("modality", only="merge") == ["merge@modality"]
    with pytest.raises(ParamsError, match="stage 'colect' is unknown: did you mean 'collect'"):
        select("modality", to="colect")


def through_alloy(module: str) -> set[str]:
    """The modules behind `alloy.name` where a module says `import alloy`."""
    tree = ast.parse((REPOSITORY / (module.replace(".", "/") + ".py")).read_text())
    names = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "alloy"
    }
    found = (getattr(alloy, name, None) for name in names)
    return {thing.__module__ for thing in found if hasattr(thing, "__module__")}


def code_of(stage: str, imports: grimp.ImportGraph) -> set[str]:
    """The modules of this repository that a stage runs."""
    found: set[str] = set()
    todo = {f"tasks.{stage}"}
    while todo:
        module = todo.pop()
        found.add(module)
        reached = imports.find_modules_directly_imported_by(module)
        if "alloy" in reached:
            reached |= through_alloy(module)
        todo |= reached - found - WITHOUT_EFFECT - {"alloy", "tasks"}
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_it_runs(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module that a stage imports, directly or not, is a dependency in dvc.yaml: changed code runs again."""
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
    imports = grimp.build_graph("alloy", "tasks")
    declared = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][stage]["do"]["deps"]
    code = {dep for dep in declared if dep.endswith(".py") or dep.startswith(("alloy/", "tasks/"))}
    for dep in code:
        assert (REPOSITORY / dep).exists(), dep
    files = {module.replace(".", "/") for module in code_of(stage, imports)}
    missing = {
        file
        for file in files
        if not any(f"{file}.py" == dep or f"{file}/".startswith(f"{dep}/") for dep in code)
    }
    assert not missing
    unused = {
        dep
        for dep in code
        if not any(f"{file}.py" == dep or f"{file}/".startswith(f"{dep}/") for file in files)
    }
    assert not unused
