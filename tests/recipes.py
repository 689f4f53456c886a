"""Complete recipes of kind "experts", as small as possible; tests override sections."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import yaml

CHECKPOINTS = {name: f"given/{name}" for name in ("specific", "unseeded", "seed", "agnostic")}
SCENES = {
    "seed": 3,
    "cell_pixels": 12,
    "label_pixels": 6,
    "train_cells": 2,
    "cells": 2,
    "duplicates": 0.25,
    "drop": 0.3,
    "noise": 8,
}

FINETUNE = {
    "arms": [],
    "joint": True,
    "batch_sizes": {"retrieval": 4},
    "seed": 3,
    "task_weight": 1.0,
    "distillation": {"weight": 0.0},
    "training": {
        "num_steps": 6,
        "learning_rate": 0.01,
        "matrix_learning_rate": 0.01,
        "head_learning_rate": 0.02,
        "final_share": 0.0,
        "warmup_steps": 1,
        "weight_decay": 0.01,
        "gradient_clip": 1.0,
        "log_every": 2,
        "save_every": 2,
    },
    "stopping": {"validate_every": 3, "validation_examples": 8, "patience": 5},
}


def experts(**sections: object) -> dict[str, object]:
    """A recipe with one arm, the average of the experts of its first checkpoint.

    The sections that are not given agree with those that are: they name the first of `fetch`'s
    checkpoints and the result of `merge`, and there is a section finetune if the model registered
    or shipped is `finetuned`. A section given as None is left out.
    """
    fetch = _mapping(sections.get("fetch", {"checkpoints": CHECKPOINTS}))
    first = next(iter(_mapping(fetch["checkpoints"])))
    merge = _mapping(
        sections.get(
            "merge",
            {"result": "average", "arms": {"average": {"checkpoint": first, "method": "linear"}}},
        )
    )
    complete = {
        "kind": "experts",
        "fetch": fetch,
        "prepare": {
            "scenes": SCENES,
            "seed": 1,
            "calibration_examples": 12,
            "benchmarks": {"retrieval": {"train": 0, "validation": 4, "test": 4}},
        },
        "collect": {"checkpoints": [first], "calibration_examples": 4, "batch_size": 4},
        "align": {"space": "dual", "weight_share": 0.9, "method": "permute", "max_sweeps": 10},
        "merge": merge,
        "evaluate": {
            "batch_size": 16,
            "checkpoints": {name: f"checkpoint {name}" for name in fetch["checkpoints"]},
            "ensembles": {},
            "naive": merge["result"],
            "baseline": first,
            "tssd_keep": 0.2,
        },
        "register": {"name": "toy", "model": "merged"},
    }
    if any(
        "finetuned" in _mapping(sections.get(key) or {}).values() for key in ("register", "ship")
    ):
        complete["finetune"] = FINETUNE
    return {key: value for key, value in (complete | sections).items() if value is not None}


def _mapping(section: object) -> Mapping:
    assert isinstance(section, Mapping)
    return section


def write(folder: Path, **recipes: Mapping[str, object]) -> None:
    """Write recipes by name, and the list of them, into a workspace."""
    params = folder / "params"
    params.mkdir(exist_ok=True)
    (params / "recipes.yaml").write_text(yaml.safe_dump({"recipes": list(recipes)}))
    for name, sections in recipes.items():
        (params / f"{name}.yaml").write_text(yaml.safe_dump(dict(sections), sort_keys=False))


def with_whole_graph(folder: Path) -> Path:
    """A folder with this repository's params and its `dvc.yaml`, all recipes of it in use."""
    repository = Path(__file__).parents[1]
    shutil.copytree(repository / "params", folder / "params")
    shutil.copy(repository / "dvc.yaml", folder)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    return folder
