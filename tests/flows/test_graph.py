"""The stage graph: DVC's, in an order that runs, and it knows the code that each stage runs."""

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

import alloy
from flows.graph import select, stages
from tasks.command import home
from tasks.recipe.graph import GRAPH, OPTIONAL, STAGES, graph, in_use, write_graph
from tasks.recipe.load import load, recipes
from tasks.recipe.section import ParamsError
from tests.recipes import with_whole_graph

REPOSITORY = Path(__file__).parents[2]

# Modules whose change never changes what a stage writes: settings are tracked as params, the others
# parse the command line, measure and report to MLflow.
# `alloy.lazy` decides when names load, as the `__init__` of `alloy` does, not what they are.
WITHOUT_EFFECT = {
    "alloy.lazy", "tasks.command", "tasks.registry.secrets", "tasks.registry.tracking",
    "tasks.usage",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose graph has all recipes."""
    folder = with_whole_graph(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_graph(*recipes())
    return folder


@pytest.fixture
def repository(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(whole)


@pytest.mark.usefixtures("repository")
def test_every_recipe_has_the_stages_of_its_sections_after_what_they_read() -> None:
    """DVC's stages of a recipe are those it has sections for, ordered so that inputs come first."""
    for name in recipes():
        recipe = load(name)
        expected = [
            stage
            for stage in STAGES
            if stage not in OPTIONAL or getattr(recipe, stage, None) is not None
        ]
        assert [address.split("@")[0] for address in stages(name)] == expected
        assert {address.split("@")[1] for address in stages(name)} == {name}


@pytest.mark.usefixtures("repository")
def test_the_graph_is_what_the_recipes_say() -> None:
    """`params/graph.yaml` is up to date, and lists the recipe alone whose lock is committed."""
    committed = (REPOSITORY / GRAPH).read_text()
    GRAPH.write_text(committed)
    assert in_use() == ["modality"]
    assert yaml.safe_load(committed) == graph(["modality"])
    assert write_graph(*recipes())


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
    things = (getattr(alloy, name, None) for name in names)
    return {thing.__module__ for thing in things if hasattr(thing, "__module__")}


def code_of(module: str, imports: grimp.ImportGraph) -> set[str]:
    """The modules of this repository that a module runs."""
    code: set[str] = set()
    todo = {module}
    while todo:
        module = todo.pop()
        code.add(module)
        reached = imports.find_modules_directly_imported_by(module)
        if "alloy" in reached:
            reached |= through_alloy(module)
        todo |= {name for name in reached - code if not is_without_effect(name)}
    return code


def is_without_effect(module: str) -> bool:
    return (
        module in WITHOUT_EFFECT
        or module in ("alloy", "tasks")
        or f"{module}.".startswith("tasks.recipe.")
    )


def declared_code(stage: str) -> dict[str, set[str]]:
    """By recipe, the code among the deps of its stage in `dvc.yaml`, filled in from the graph."""
    do = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][stage]["do"]
    filled = {}
    for recipe, item in yaml.safe_load(GRAPH.read_text())[stage].items():
        deps = [fill(dep, {"key": recipe, "item": item}) for dep in do["deps"]]
        filled[recipe] = {dep for dep in deps if dep.startswith(("alloy/", "tasks/"))}
    return filled


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of `dvc.yaml` with `${key}` and `${item.NAME}` filled in."""
    template = template.replace("${key}", values["key"])
    return re.sub(r"\$\{item\.(\w+)\}", lambda match: values["item"][match[1]], template)


def covers(dep: str, file: str) -> bool:
    return f"{file}.py" == dep or f"{file}/".startswith(f"{dep}/")


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_it_runs(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed code runs a stage again: of each family of recipes, every module that the stage
    imports is a dependency in dvc.yaml; and no dependency is there for no family."""
    monkeypatch.setattr(sys, "path", [str(REPOSITORY), *sys.path])
    imports = grimp.build_graph(
        "alloy", "tasks", exclude_type_checking_imports=True, cache_dir=None
    )
    declared, unused = declared_code(stage), None
    for recipe, deps in declared.items():
        assert not {dep for dep in deps if not (REPOSITORY / dep).exists()}
        modules = code_of(home(stage, load(recipe).kind), imports)
        files = {module.replace(".", "/") for module in modules}
        missing = {file for file in files if not any(covers(dep, file) for dep in deps)}
        assert not missing, recipe
        idle = {dep for dep in deps if not any(covers(dep, file) for file in files)}
        unused = idle if unused is None else unused & idle
    assert not unused
