"""Recipes by name: what the list and the files may say, and each refusal in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tasks.recipe.load import load, load_experts, load_models, recipes
from tasks.recipe.section import ParamsError
from tests.recipes import experts, write

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def toy(workspace: Path) -> Path:
    write(workspace, toy=experts())
    return workspace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the one key `recipes`"),
        ("- toy\n", "expected the one key `recipes`"),
        ("toy\n", "expected the one key `recipes`"),
        ("recipes: [toy]\nrecipe: [x]\n", "expected the one key `recipes`"),
        ("recipes: toy\n", "expected a list of names, found 'toy'"),
        ("recipes: []\n", "expected a list of names, found"),
        ("recipes: {toy: 1}\n", "expected a list of names, found"),
        ("recipes:\n", "expected a list of names, found None"),
        ('recipes: ["a;touch x"]\n', "'a;touch x' cannot name a recipe: take one word"),
        ("recipes: [../../esc]\n", "'../../esc' cannot name a recipe"),
        ("recipes: [a b]\n", "cannot name a recipe"),
        ('recipes: ["$(ls)"]\n', "cannot name a recipe"),
        ("recipes: [-rf]\n", "'-rf' cannot name a recipe"),
        ("recipes: [é]\n", "cannot name a recipe"),
        ("recipes: [1]\n", "1 cannot name a recipe"),
        ("recipes: [null]\n", "None cannot name a recipe"),
        ("recipes: [[toy]]\n", "cannot name a recipe"),
        ("recipes: [toy, toy]\n", "'toy' stands twice"),
        ("recipes: [toy\n", "line 2"),
    ],
)
def test_a_list_that_is_none_is_refused(text, message) -> None:
    Path("params/recipes.yaml").write_text(text)
    for read in (recipes, lambda: load("toy")):
        with pytest.raises(ParamsError, match=rf"params/recipes\.yaml.*{message}"):
            read()


@pytest.mark.parametrize("name", ["toi", "../../esc", "a;touch x", "", "recipes", "TOY"])
def test_a_name_that_is_not_listed_is_refused(name) -> None:
    with pytest.raises(ParamsError, match=r"recipe .* is unknown: .*'toy'"):
        load(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one section per stage, found None"),
        ("- a\n", "expected one section per stage"),
        ("abc\n", "expected one section per stage, found 'abc'"),
        ("kind: models\nmerge: null\n", "merge: null: leave out a section"),
        ("kind: [models]\n", r"kind \['models'\]"),
        ("kind: weights\n", "kind 'weights': .*'experts', 'models'"),
        ("kind: modality\n", "kind 'modality': .*'experts', 'models'"),
        ("fetch: {}\n", "kind None"),
        ("kind: models\nname: x\n", "a recipe is named by its file"),
        ("kind: models\n1: x\n", "unknown key 1"),
        ("kind: models\nmembers: 3\n", "fetch: this is missing"),
        ("kind: models\nkind: experts\n", "line 2: key 'kind' stands twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text, message) -> None:
    Path("params/toy.yaml").write_text(text)
    with pytest.raises(ParamsError, match=rf"params/toy\.yaml.*{message}"):
        load("toy")


def test_a_listed_recipe_without_a_file_is_refused() -> None:
    Path("params/toy.yaml").unlink()
    with pytest.raises(ParamsError, match=r"params/toy\.yaml is missing, yet .*lists 'toy'"):
        load("toy")


@pytest.mark.parametrize("section", ["prepare", "finetune", "ship", "register", "align"])
def test_no_section_may_be_null(section) -> None:
    content = yaml.safe_load(Path("params/toy.yaml").read_text())
    Path("params/toy.yaml").write_text(yaml.safe_dump({**content, section: None}))
    with pytest.raises(ParamsError, match=rf"{section}: null: leave out a section"):
        load("toy")


def test_a_recipe_of_the_other_kind_is_refused() -> None:
    assert load_experts("toy").kind == "experts"
    with pytest.raises(ParamsError, match="is of kind 'experts'; this takes one of 'models'"):
        load_models("toy")


def test_a_wrong_value_is_repeated_in_part() -> None:
    """A message stays short, however large the value is that it complains of."""
    write(Path(), toy=experts(collect={"checkpoints": "x" * 10_000, "batch_size": [1] * 10_000}))
    with pytest.raises(ParamsError) as caught:
        load("toy")
    assert max(map(len, str(caught.value).splitlines())) < 250


@pytest.mark.parametrize("stage", ["fetch", "merge", "choose", "register"])
@pytest.mark.parametrize("name", ["../../esc", "toi", "a;touch x"])
def test_every_stage_refuses_a_name_that_is_not_listed(stage, name, toy) -> None:
    """By hand, too: a sentence, a status, and nothing is written."""
    before = sorted(toy.rglob("*"))
    run = subprocess.run(
        [sys.executable, "-m", f"tasks.{stage}", name],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=toy,
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"{stage}: recipe '{name}' is unknown: ")
    assert run.stderr.count("\n") == 1
    assert sorted(toy.rglob("*")) == before


def test_a_stage_without_its_section_says_so(toy) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tasks.finetune", "toy"],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=toy,
    )
    assert run.returncode == 1
    assert (
        "params/toy.yaml has no section 'finetune', so there is nothing to finetune" in run.stderr
    )
