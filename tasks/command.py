"""The command line that all stages share: `python -m tasks.<stage> RECIPE`.

The one dispatch: a stage is `main(recipe)` of its family's module, or of the one that serves both.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from types import ModuleType

from tasks.locks import hold_workspace
from tasks.recipe.load import Recipe, load, recipes
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.registry.secrets import without_secrets
from tasks.sources.edited import refuse_edited
from tasks.usage import measured
from tasks.workers import start_importing, together
from tasks.workers.memory import LESS, within_memory

SHARED = {
    "fetch": "tasks.sources.fetch",
    "register": "tasks.registry.register",
    "ship": "tasks.sources.ship",
}
"""The stages that do the same for both families of recipes."""

WITHOUT_SECTION = {*SHARED, "choose"}
"""The stages that every recipe has; `merge` says what is chosen."""

TOGETHER = ("collect", "finetune", "evaluate")
"""The stages that as many processes as ALLOY_PROCESSES says share."""


BATCHES = {
    "collect": ("collect",),
    "align": ("collect", "evaluate"),
    "merge": ("collect",),
    "choose": ("evaluate",),
    "finetune": ("finetune",),
    "evaluate": ("evaluate",),
}
"""The sections whose batch sizes decide how much memory a stage takes."""


def batch_sizes(stage: str, recipe: Recipe) -> tuple[dict[str, int], str]:
    """The batch sizes of a stage by their names in the params, and how else it takes less."""
    sizes = {}
    for name in BATCHES.get(stage, ()):
        section = getattr(recipe, name, None)
        if (size := getattr(section, "batch_size", None)) is not None:
            sizes[f"{name}.batch_size"] = size
        for benchmark, size in getattr(section, "batch_sizes", {}).items():
            sizes[f"{name}.batch_sizes.{benchmark}"] = size
    return sizes, LESS if stage == "finetune" else ""


def is_shared_by_workers(stage: str, recipe: Recipe) -> bool:
    """True where sets of models are worked on side by side, in processes of their own."""
    return (
        stage in ("align", "merge", "evaluate")
        and isinstance(recipe, ModelsRecipe)
        and recipe.is_calibrated
        and len(recipe.jobs()) > 1
        and not together.is_asked_for()
    )


def home(stage: str, kind: str) -> str:
    """The module whose `main(recipe)` is a stage of one kind of recipe."""
    return SHARED.get(stage, f"tasks.{kind}.{stage}")


def run_stage(description: str | None, switches: Mapping[str, str] | None = None) -> None:
    """Parse `RECIPE`, load it once, run the stage; what a user can get wrong ends with its message.

    `switches` are `--names` with their help; none of them changes a stage's result (params do).
    """
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "a stage is run as python -m tasks.<stage>"
    stage = spec.name.rpartition(".")[2]
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{stage}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: python -m tasks.{stage} modality",
    )
    parser.add_argument("recipe", help=f"a recipe of params/recipes.yaml: {_known()}")
    for name, text in (switches or {}).items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = vars(parser.parse_args())
    try:
        recipe = load(options.pop("recipe"))
        # A switch only shows; processes that share a stage are measured by what started them.
        is_measured = not (any(options.values()) or together.is_started_with_others())
        usage = measured(recipe.name, stage) if is_measured else nullcontext()
        with hold_workspace(f"{stage} of {recipe.name}"), usage:
            if stage != "fetch":
                refuse_edited(recipe.workspace.checkpoints)
            if is_shared_by_workers(stage, recipe):
                start_importing()
            module = _module(stage, recipe)
            if stage in TOGETHER and together.is_asked_for():
                sys.exit(together.launch(f"tasks.{stage}", sys.argv[1:]))
            sizes, advice = batch_sizes(stage, recipe)
            with together.speaking_in_turn(), within_memory(stage, sizes, advice):
                module.main(recipe, **_chosen(stage, recipe, module, options))
    except ConnectionError as error:
        # The arguments are right, the network is not: flows try such a stage again.
        print(f"{stage}: {without_secrets(str(error))}", file=sys.stderr)
        sys.exit(os.EX_TEMPFAIL)
    except (ValueError, OSError) as error:
        sys.exit(f"{stage}: {without_secrets(str(error))}")


def _chosen(
    stage: str, recipe: Recipe, module: ModuleType, options: Mapping[str, bool]
) -> dict[str, bool]:
    """The switches that were given, all of which this family's stage has."""
    chosen = {name: given for name, given in options.items() if given}
    if unknown := sorted(set(chosen) - set(signature(module.main).parameters)):
        raise ParamsError(
            f"--{unknown[0]}: the stage {stage} of recipe {recipe.name} (kind {recipe.kind}) has "
            "no such switch: leave it out"
        )
    return chosen


def _known() -> str:
    try:
        return ", ".join(recipes())
    except ParamsError:
        return "none can be read"


def _module(stage: str, recipe: Recipe) -> ModuleType:
    if stage not in WITHOUT_SECTION and getattr(recipe, stage, None) is None:
        raise ParamsError(
            f"{recipe.where} has no section {stage!r}, so there is nothing to {stage}: add one, or "
            "run another stage"
        )
    return import_module(home(stage, recipe.kind))
