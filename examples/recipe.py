"""A recipe from Python: written, checked and run, without a server.

    python examples/recipe.py

Two fine-tunes of a small ViT become one. The recipe's file, the merged model and the report are in
examples/out/recipe/. In a clone `make merge RECIPE=mine` runs such a file with everything around
it: nothing runs twice, runs are remembered, the result is registered.
"""

import os
import shutil
from importlib import import_module
from pathlib import Path

import torch
import yaml
from transformers import ViTConfig, ViTForImageClassification

from tasks.command import home
from tasks.recipe.load import load

OUT = Path(__file__).parent / "out" / "recipe"
STAGES = ("fetch", "merge", "choose", "evaluate")
RECIPE = {
    "kind": "models",
    "fetch": {
        "checkpoints": {"base": "sources/base", "cats": "sources/cats", "dogs": "sources/dogs"}
    },
    "members": ["cats", "dogs"],  # become one
    "kept": ["classifier.*"],  # stays the first member's
    "merge": {
        "result": "ties",
        "arms": {
            "average": {"method": "linear"},
            "ties": {"method": "ties", "base": "base", "options": {"density": 0.3}},
        },
    },
    "evaluate": {"tssd_keep": 0.2},
    "register": {"name": "mine", "model": "merged"},
}


def make_members(folder: Path) -> None:
    """Save a base and two models that stand for fine-tunes of it."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    base = ViTForImageClassification(config)
    base.save_pretrained(folder / "base")
    for name in ("cats", "dogs"):
        member = ViTForImageClassification(config)
        member.load_state_dict(
            {k: w + 0.01 * torch.randn_like(w) for k, w in base.state_dict().items()}
        )
        member.save_pretrained(folder / name)


def main(out: Path = OUT) -> Path:
    """Run a recipe in a folder of its own; return the page that tells its story."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "params").mkdir(parents=True)
    (out / "params" / "recipes.yaml").write_text("recipes: [mine]\n")
    (out / "params" / "mine.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    before = Path.cwd()
    os.chdir(out)  # a workspace is the folder in which its commands run
    try:
        make_members(Path("sources"))
        recipe = load("mine")  # refuses what cannot be done, before anything is written
        for stage in STAGES:
            import_module(home(stage, recipe.kind)).main(recipe)
        return out / recipe.workspace.page
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
