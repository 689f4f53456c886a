"""The command line of the stages: one dispatch for both families of recipes."""

import runpy
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from tasks import command, usage
from tasks.command import home, is_shared_by_workers
from tasks.recipe.load import load

RECIPES = {"experts": "modality", "models": "multitask"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a stage's command with a stage that does nothing, and says how it was called."""

    def run(stage: str, recipe: str, *switches: str) -> dict:
        module, called = import_module(home(stage, load(recipe).kind)), {}
        names = signature(module.main).parameters

        def main(recipe, **options):
            called.update(options, recipe=recipe.name)

        main.__signature__ = signature(module.main)
        assert next(iter(names)) == "recipe"
        monkeypatch.setattr(module, "main", main)
        monkeypatch.setattr(usage, "RUNS", tmp_path)
        monkeypatch.setattr(command, "start_importing", lambda: None)
        monkeypatch.setattr(sys, "argv", [f"tasks.{stage}", recipe, *switches])
        runpy.run_module(f"tasks.{stage}", run_name="__main__", alter_sys=True)
        return called

    return run


@pytest.mark.parametrize("recipe", RECIPES.values())
@pytest.mark.parametrize("stage", ["fetch", "prepare", "collect", "align", "merge", "evaluate"])
def test_every_stage_of_both_families_is_called_with_its_recipe(run, stage: str, recipe: str):
    """A switch that was not given is not passed on: the other family may not have it."""
    assert run(stage, recipe) == {"recipe": recipe}


def test_a_switch_reaches_the_stage_that_has_it(run):
    assert run("prepare", "modality", "--show") == {"recipe": "modality", "show": True}


def test_a_stage_is_measured_and_a_look_is_not(run, tmp_path: Path):
    run("prepare", "modality", "--show")
    assert not list(tmp_path.iterdir())
    run("prepare", "modality")
    assert list(usage.last_runs("modality")) == ["prepare"]


def test_a_switch_of_the_other_family_is_refused(run):
    with pytest.raises(SystemExit, match=r"--show: the stage prepare of recipe multitask"):
        run("prepare", "multitask", "--show")


def test_workers_start_to_import_where_several_sets_wait_for_them():
    """Before the stage itself is imported; one job alone, or processes together, need none."""
    multitask = load("multitask")
    assert is_shared_by_workers("merge", multitask)
    assert not is_shared_by_workers("fetch", multitask)
    assert not is_shared_by_workers("merge", load("modality"))
    one = multitask.model_copy(update={"sets": dict(list(multitask.sets.items())[:1])})
    assert is_shared_by_workers("merge", one) == (len(one.jobs()) > 1)
