"""Every block of code in the site's pages has a test; those of YAML are loaded here."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from flows.placement.params import Placement
from tasks.recipe.graph import STAGES
from tasks.recipe.load import load, load_experts, load_file, load_models
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.recipe.yaml_file import read_yaml

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)

# By page and language, the test of the blocks. It runs them, or where they need a team, an editor
# or a registry, does what they do. A new one fails until it has a test.
TESTS = {
    "alignment.md python": "tests/test_docs.py::test_the_alignment_of_the_documentation",
    "bring_your_own.md bash": "tests/tasks/recipe/test_new.py::test_a_new_recipe_loads_and_is",
    "bring_your_own.md yaml": "tests/docs/test_blocks.py::test_the_parts_of_a_recipe_of_your_own",
    "gauge.md python": "tests/test_docs.py::test_the_gauge_of_the_documentation",
    "gauge.md yaml": "tests/docs/test_blocks.py::test_the_arm_in_a_gauge_is_one",
    "how_to/checkpoints.md bash": "tests/flows/test_readme.py::test_every_command_of_the_readme",
    "how_to/checkpoints.md sh": "tests/tasks/recipe/test_new.py::test_a_new_recipe_loads_and_is",
    "how_to/checkpoints.md yaml": "tests/tasks/models/test_streamed_recipe.py::test_the_recipe_of",
    "how_to/rerun.md bash": "tests/flows/test_readme.py::test_every_command_of_the_readme",
    "study.md bash": "tests/benchmarks/test_study.py::test_publishing_the_rows_that_are_there",
    "teams.md bash": "tests/flows/test_teams.py::test_a_second_clone_pulls_and_skips",
    "index.md python": "tests/flows/test_readme.py::test_its_python_prints_what_it_shows",
    "index.md sh": "tests/alloy/test_package.py::test_a_clean_environment",
    "merge_checkpoints.md bash": "tests/test_docs.py::test_the_commands_of_the_documentation",
    "merge_checkpoints.md python": "tests/test_docs.py::test_the_merges_of_the_documentation",
    "merge_checkpoints.md sh": "tests/tasks/sources/test_cache.py::test_the_command_of_the_docum",
    "merge_checkpoints.md yaml": "tests/docs/test_blocks.py::test_adapters_are_checkpoints",
    "methods.md bash": "tests/test_docs.py::test_the_commands_of_the_documentation",
    "methods.md python": "tests/test_docs.py::test_the_merges_of_the_documentation",
    "operations.md bash": "tests/flows/test_readme.py::test_every_command_of_the_readme",
    "operations.md sh": "tests/tasks/registry/test_server.py::test_the_request_of_the_document",
    "placement.md bash": "tests/flows/placement/test_pools.py::test_two_workers_run_what_is_placed",
    "placement.md yaml": "tests/docs/test_blocks.py::test_the_placement_is_one",
    "symmetry.md python": "tests/test_docs.py::test_the_symmetry_of_the_documentation",
    "towers.md python": "tests/test_docs.py::test_the_towers_of_the_documentation",
    "towers.md yaml": "tests/docs/test_blocks.py::test_the_arms_with_a_trunk_are_a_recipe",
    "tutorials/language_models.md bash": "tests/examples/test_examples.py::test_language_models",
    "tutorials/language_models.md python": "tests/examples/test_examples.py::test_a_tutorial_quot",
    "tutorials/language_models.md sh": "tests/test_docs.py::test_the_commands_of_the_document",
    "tutorials/recipe.md bash": "tests/examples/test_examples.py::test_a_recipe_from_python_ends",
    "tutorials/recipe.md python": "tests/examples/test_examples.py::test_a_tutorial_quotes_its",
    "tutorials/recipe.md sh": "tests/docs/test_blocks.py::test_a_misspelt_option_is_refused_as",
    "tutorials/symmetries.md python": "tests/examples/test_examples.py::test_a_tutorial_prints",
    "tutorials/two_models.md python": "tests/examples/test_examples.py::test_a_tutorial_prints",
}


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall((DOCS / page).read_text()) if kind == language]


def test_every_block_has_its_test() -> None:
    pages = {path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")}
    found = {
        f"{page} {language}"
        for page, text in pages.items()
        for language, _ in BLOCK.findall(text)
        if language != "text"
    }
    assert found == TESTS.keys()
    for test in TESTS.values():
        path, name = test.split("::")
        assert f"\ndef {name}" in (REPOSITORY / path).read_text(), test


def test_code_is_in_blocks_of_its_language() -> None:
    """What is indented instead would have no test; only formulas are, and the log keeps its own."""
    for path in DOCS.rglob("*.md"):
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        indented = re.findall(r"(?<=\n\n)    (?=\S)(.*)", prose)
        assert path.name == "log.md" or all("Σ" in line or "²" in line for line in indented), path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace with the shipped recipes."""
    shutil.copytree(REPOSITORY / "params", tmp_path / "params")
    (tmp_path / "params/recipes.yaml").write_text("recipes: [mine]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, recipe: dict[str, object]) -> None:
    (folder / "params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def test_the_arms_with_a_trunk_are_a_recipe(folder: Path) -> None:
    """Members and arms of the page in the shipped recipe for towers."""
    (block,) = blocks("towers.md", "yaml")
    shipped = yaml.safe_load(Path("params/towers.yaml").read_text())
    write(folder, {**shipped, **yaml.safe_load(block)})
    assert load_models("mine").merge.result == "distilled"


def test_the_arm_in_a_gauge_is_one(folder: Path) -> None:
    (block,) = blocks("gauge.md", "yaml")
    shipped = yaml.safe_load(Path("params/modality.yaml").read_text())
    arm = {**shipped["merge"]["arms"]["gauge_naive"], **yaml.safe_load(block)}
    shipped["merge"]["arms"]["gauge_naive"] = arm
    write(folder, shipped)
    assert load_experts("mine").merge.arms["gauge_naive"].masked_share == 0.5


def test_the_placement_is_one(folder: Path) -> None:
    """Of stages that there are, in pools that it lists."""
    (code,) = blocks("placement.md", "yaml")
    (folder / "params/placement.yaml").write_text(code)
    placement = load_file("placement", Placement)
    assert {stage.partition("@")[0] for stage in placement.stages} <= set(STAGES)
    assert set(placement.stages.values()) == set(placement.pools)
    assert placement.pools["gpu"].timeout_seconds == 7200


def test_adapters_are_checkpoints_of_a_recipe(folder: Path) -> None:
    (block,) = blocks("merge_checkpoints.md", "yaml")
    arms = {"average": {"method": "linear"}}
    more = {"merge": {"result": "average", "arms": arms}, "evaluate": {"tssd_keep": 0.2}}
    more["register"] = {"name": "mine", "model": "merged"}
    write(folder, {"kind": "models", **yaml.safe_load(block), **more})
    assert load_models("mine").sets["mine"].members == {0: ["a", "b"]}


def as_data(code: str) -> dict:
    """A block, read as recipes are: a key `on` is no boolean."""
    path = Path("block.yaml")
    path.write_text(code)
    return read_yaml(path)


def laid_over(recipe: dict, part: dict) -> dict:
    """The recipe with a part's keys in the place of its own, mapping by mapping."""
    merged = {
        key: laid_over(recipe[key], value)
        if isinstance(value, dict) and isinstance(recipe.get(key), dict)
        else value
        for key, value in part.items()
    }
    return {**recipe, **merged}


def test_the_parts_of_a_recipe_of_your_own_are_accepted(folder: Path) -> None:
    """Each further block of the page, laid over the page's recipe, is a recipe."""
    own, sets, heads, benchmarks, search, finetune = map(
        as_data, blocks("bring_your_own.md", "yaml")
    )
    own["merge"]["result"] = "mudsc"

    def loaded(*parts: dict, without: str = "", members: str = "a b") -> ModelsRecipe:
        recipe = {key: value for key, value in own.items() if key != without}
        recipe["fetch"] = {"checkpoints": {name: f"path/to/{name}" for name in members.split()}}
        for part in parts:
            recipe = laid_over(recipe, part)
        write(folder, recipe)
        return load_models("mine")

    result = {"merge": {"result": {"set": "cats", "seed": 0, "arm": "mudsc"}}}
    result["merge"]["candidates"] = []
    several = loaded(sets, result, without="members", members="a0 b0 a1 b1 c0")
    assert several.sets.keys() == {"cats", "dogs"}
    assert loaded(benchmarks).evaluate.benchmarks.keys() >= {"wiki", "pets", "own"}
    wiki = {"measure": "perplexity", "texts": "texts", "tokens": 8, "examples": 2}
    validation = {"evaluate": {"benchmarks": {"wiki": {**wiki, "split": "validation"}}}}
    streamed = {key: own[key] for key in ("kind", "members", "register")}
    validation["evaluate"]["tssd_keep"] = 0.2
    write(folder, {**streamed, **laid_over(search, validation), "fetch": own["fetch"]})
    assert load_models("mine").merge.arms["tuned"].search is not None
    assert loaded(finetune).finetune is not None
    del finetune["finetune"]["data"]
    two = loaded(finetune, heads, {"evaluate": {"curves": []}}, members="digits animals")
    assert two.registration.head == "animals"


def test_a_misspelt_option_is_refused_as_the_tutorial_shows(folder: Path) -> None:
    (recipe,) = blocks("how_to/checkpoints.md", "yaml")
    write(folder, yaml.safe_load(recipe.replace("density", "densty")))
    shown = blocks("tutorials/recipe.md", "sh")[-1].splitlines()[-1]
    start, _, end = shown.partition(" ... ")
    with pytest.raises(ParamsError) as refused:
        load("mine")
    assert str(refused.value).startswith(start)
    assert end in str(refused.value)
