"""A recipe of kind "models", from two folders and some pictures to a registered model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests import tiny_models
from tests.flows.conftest import Workspace, git
from tests.flows.test_modality import STAGES
from tests.tasks.reports.browser import CHROMIUM, fits


@pytest.mark.slow
def test_one_file_makes_a_registered_model_of_any_two_checkpoints(
    new_small: Workspace, tmp_path: Path
) -> None:
    """Every stage runs once, two seeds side by side; nothing is stale until the pictures change."""
    folder = tmp_path / "alloy"
    shutil.copytree(new_small.folder, folder)
    workspace = Workspace(folder, new_small.environment)
    members = {0: ["a0", "b0"], 1: ["a1", "b1"]}
    for seed, name in enumerate(name for pair in members.values() for name in pair):
        model = tiny_models.model("ConvNextForImageClassification", seed)
        tiny_models.save(model, folder / "given" / name)
    tiny_models.pictures(folder / "photos")
    recipe = tiny_models.recipe({"images": "photos", "examples": 24}, members)
    (folder / "params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    with (folder / "params/recipes.yaml").open("a") as recipes:
        recipes.write("  - mine\n")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "mine")

    status, said = workspace.run("flows.pipeline", "mine")
    assert status == 0, said
    positions = [
        said.index(f"Running stage '{stage}@mine'") for stage in STAGES if stage != "finetune"
    ]
    assert sorted(positions) == positions
    assert "report.html" in said.splitlines()[-1]
    registered = json.loads(workspace.text("models/mine/registered.json"))
    assert registered["name"] == "mine"
    data = registered["lineage"]["data"]
    assert data["pair/calibration.safetensors"] == data["calibration/own.safetensors"]
    scores = json.loads(workspace.text("reports/mine/metrics.json"))["calibration"]
    assert scores["mudsc"]["pair"]["agreement_spread"] >= 0
    assert not list(folder.rglob("*.incomplete"))
    if CHROMIUM is not None:
        fits(folder / "reports/mine/report.html", tmp_path)
    status, said = workspace.run("flows.pipeline", "mine")
    assert said.startswith("Nothing to do: 8 stages of mine are up to date."), said

    (folder / "photos/0.png").write_bytes((folder / "photos/20.png").read_bytes())
    status, said = workspace.run("flows.pipeline", "mine", "--refresh", "--to", "collect")
    assert status == 0, said
    assert "Running stage 'collect@mine'" in said
