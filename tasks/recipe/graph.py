"""`params/graph.yaml`: which stages each recipe has, for `dvc.yaml`; derived from the recipes.

DVC runs a stage for each recipe that the stage's list names, and must find every path and section
that the stage reads. A recipe that lacks one names in its place what the stage reads anyway, twice.

Only recipes in use are listed, so that `dvc pull`, `dvc status` and the rest speak of these alone.
`make merge RECIPE=...` and `alloy new` put a recipe there; so does

    python -m tasks.recipe.graph multitask     # without a name: write it anew
"""

import sys
from collections.abc import Sequence

import yaml

from tasks.recipe.load import PARAMS, Recipe, load, recipes
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.recipe.yaml_file import read_yaml
from tasks.storage import write_file

GRAPH = PARAMS / "graph.yaml"
STAGES = (
    "fetch", "prepare", "collect", "align", "merge", "choose", "finetune", "evaluate", "register",
)  # fmt: skip
OPTIONAL = ("prepare", "collect", "align", "finetune")
HEADER = """\
# Written by `python -m tasks.recipe.graph` from the recipes; dvc.yaml reads it. Do not edit.
"""


def graph(names: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Values that the entries of `dvc.yaml` fill in, by stage and recipe.

    Raises:
        ParamsError: a recipe that no stage could run.
    """
    loaded = [load(name) for name in names]
    return {
        stage: {recipe.name: _entry(recipe, stage) for recipe in loaded if _has(recipe, stage)}
        for stage in STAGES
    }


def in_use() -> list[str]:
    """The recipes that `params/graph.yaml` lists and that still exist."""
    known = read_yaml(GRAPH) if GRAPH.is_file() else {}
    listed = (known.get(STAGES[0]) or {}) if isinstance(known, dict) else {}
    return [name for name in recipes() if name in listed]


def write_graph(*names: str) -> bool:
    """Bring `params/graph.yaml` up to date, with these recipes in use; says if it was not."""
    used = in_use()
    text = HEADER + yaml.safe_dump(
        graph([name for name in recipes() if name in used or name in names]),
        sort_keys=False,
        width=100,
    )
    if GRAPH.is_file() and GRAPH.read_text() == text:
        return False
    with write_file(GRAPH) as partial:
        partial.write_text(text)
    return True


def refuse_stale(recipe: str) -> None:
    """Raise ParamsError where `params/graph.yaml` does not say what a recipe's file says."""
    loaded = load(recipe)
    known = read_yaml(GRAPH) if GRAPH.is_file() else {}
    for stage in STAGES:
        expected = _entry(loaded, stage) if _has(loaded, stage) else None
        if (known.get(stage) or {}).get(recipe) != expected:
            raise ParamsError(
                f"{GRAPH} does not know {loaded.where} as it is now: "
                f"`python -m tasks.recipe.graph {recipe}` writes it anew"
            )


def _has(recipe: Recipe, stage: str) -> bool:
    return stage not in OPTIONAL or getattr(recipe, stage, None) is not None


OWN_SECTION = {"merge": "merge.arms", "choose": "merge.result"}
"""The section that a stage tracks in any case; by default that of its own name."""

RAW_SETS = ("raw1", "raw2", "raw3", "raw4", "raw5")
"""Places of the folders of data sets that `prepare` reads; there are five benchmarks on sets."""

FILLS = {
    "choose": ("family", "library", "data", "candidates"),
    "prepare": ("family", "members", *RAW_SETS),
    "collect": ("family", "library", "members"),
    "align": ("family", "library", "collect", "members"),
    "merge": (
        "family", "library", "data", "statistics", "transforms",
        "align", "collect", "dtype", "kept", "names", "members", "code", "searched", "trunk",
    ),
    "finetune": (
        "family", "library", "data", "benchmarks", "examples", "finetune_set",
        "symmetry", "writing",
    ),
    "evaluate": (
        "family", "library", "data", "statistics", "transforms", "finetuned", "finetuned_arms",
        "align", "collect", "finetune", "members", "code", "benchmarks",
    ),
    "register": ("data", "result"),
}  # fmt: skip
"""The placeholders of each stage's entry in `dvc.yaml`."""

OWN_CODE = {
    ("merge", "experts"): "alloy/modality",
    ("merge", "models"): "tasks/models/stream.py",
    ("evaluate", "experts"): "alloy/modality",
    ("evaluate", "models"): "alloy/checkpoint",
}
"""The code that a stage runs for one family of recipes and not for the other."""


def _entry(recipe: Recipe, stage: str) -> dict[str, str]:
    """The recipe's family, and the paths and sections that not every recipe has."""
    workspace, is_models = recipe.workspace, isinstance(recipe, ModelsRecipe)
    prepared, finetuned = recipe.prepare is not None, _has(recipe, "finetune")
    calibrated = prepared and _has(recipe, "collect")
    given = read_yaml(workspace.params)
    path = str(workspace.checkpoints)  # that every stage with such a choice reads
    section = OWN_SECTION.get(stage, stage)
    members = section
    if is_models:
        members = "members" if "members" in given else "sets"
    raw = raw_folders(recipe)
    values = {
        **{key: raw[i] if i < len(raw) else path for i, key in enumerate(RAW_SETS)},
        "family": recipe.kind,
        "code": OWN_CODE.get((stage, recipe.kind), ""),
        "benchmarks": f"tasks/{recipe.kind}/{'benchmarks' if is_models else f'{stage}.py'}",
        "examples": "tasks/data",
        "symmetry": "alloy/symmetry" if is_models else "alloy/modality",
        "writing": f"alloy/checkpoint{'' if is_models else '/licence.py'}",
        "finetune_set": members if is_models else section,
        # of alloy, beside what both need
        "library": "alignment" if is_models and stage not in ("merge", "finetune") else "modality",
        "trunk": "trunk" if is_models else "modality",
        "data": str(workspace.data) if prepared else path,
        "statistics": str(workspace.statistics) if calibrated else path,
        "transforms": str(workspace.transforms) if calibrated else path,
        "finetuned": str(workspace.finetuned) if finetuned else path,
        "finetuned_arms": str(workspace.finetuned_arms) if finetuned else path,
        "result": str(workspace.result(recipe.registration.model)),
        "members": members,
        "kept": "kept" if is_models and "kept" in given else section,
        "names": "names" if is_models and "names" in given else section,
        "collect": "collect" if calibrated else section,
        "align": "align" if calibrated else section,
        "candidates": "merge.candidates" if "candidates" in given["merge"] else section,
        "dtype": "merge.dtype" if "dtype" in given["merge"] else section,
        "finetune": "finetune" if finetuned else section,
        "searched": "evaluate" if isinstance(recipe, ModelsRecipe) and recipe.searches else section,
    }
    return {key: values[key] for key in FILLS.get(stage, ("family",))}


def raw_folders(recipe: Recipe) -> list[str]:
    """The folders of the data sets that a recipe reads."""
    if isinstance(recipe, ModelsRecipe):
        return []
    sets = recipe.prepare.sets
    return [str(entry.folder(recipe.prepare.raw, name)) for name, entry in sets.items()]


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            load(name)  # refuses what is no recipe
        print(f"{GRAPH}: {'written anew' if write_graph(*sys.argv[1:]) else 'is up to date'}")
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.recipe.graph: {error}")
