"""Laws of the pre-training flow."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.flows.conftest import REPOSITORY, Workspace, _environment, updated

TINY = {
    "seed_steps": 2,
    "batch_size": 4,
    "model": {"hidden_size": 16, "intermediate_size": 24, "embedding_size": 8},
    "training": {"num_steps": 4, "warmup_steps": 1, "log_every": 1, "save_every": 2},
}


@pytest.fixture
def workspace(tmp_path: Path, prefect_server: str) -> Workspace:
    """A folder with the recipes and a pre-training of four steps."""
    shutil.copytree(REPOSITORY / "params", tmp_path / "params")
    for name, changes in {
        "pretrain": TINY,
        "modality": {"prepare": {"scenes": {"train_cells": 8, "cells": 4}}},
    }.items():
        path = tmp_path / "params" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(updated(yaml.safe_load(path.read_text()), changes)))
    return Workspace(tmp_path, _environment(PREFECT_API_URL=prefect_server))


@pytest.mark.slow
def test_the_flow_makes_the_four_checkpoints_once(workspace: Workspace) -> None:
    """Their progress is in the flow's log; a second run finds nothing to do."""
    status, said = workspace.run("flows.pretrain")
    assert status == 0, said
    released = workspace.folder / "released" / "modality"
    arms = ["agnostic", "seed", "specific", "specific_unseeded"]
    assert sorted(path.name for path in released.iterdir()) == arms
    assert "specific_unseeded: step 3/4 contrastive" in said
    status, said = workspace.run("flows.pretrain")
    assert status == 0, said
    assert said.count("nothing to do") == len(arms)


@pytest.mark.slow
def test_what_cannot_be_trained_fails_with_its_reason(workspace: Workspace) -> None:
    status, said = workspace.run("flows.pretrain", "agnostik")
    assert status == 1
    assert "'agnostik' is no checkpoint: did you mean 'agnostic'?" in said
    assert not (workspace.folder / "released").exists()
