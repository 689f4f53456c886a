"""The real pipeline from end to end, on a small configuration of the modality recipe."""

import json
import time
from pathlib import Path

from tests.flows.conftest import Workspace

STAGES = ["fetch", "prepare", "collect", "align", "merge", "finetune", "evaluate", "register"]


def results(folder: Path) -> dict[str, bytes]:
    """What a run makes that must not differ from machine to machine or from run to run."""
    models = [folder / "models" / "modality" / name for name in ("merged", "finetuned")]
    files = [folder / "reports" / "modality" / "metrics.json"]
    files += [path for model in models for path in model.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def test_one_command_makes_a_registered_model_and_its_report(
    small_run: tuple[Workspace, str],
) -> None:
    """Every stage runs once; the merged and the fine-tuned model, the report and the registration are on disk."""
    workspace, said = small_run
    positions = [said.index(f"Running stage '{stage}@modality'") for stage in STAGES]
    assert sorted(positions) == positions
    folder = workspace.folder
    for path in (
        "models/modality/merged/model.safetensors",
        "reports/modality/metrics.json",
        "reports/modality/report.html",
        "reports/modality/table.md",
        "models/modality/registered.json",
        "mlflow.db",
    ):
        assert (folder / path).is_file(), path
    assert list((folder / "models/modality/finetuned").rglob("*.safetensors"))
    registered = json.loads(workspace.text("models/modality/registered.json"))
    assert registered["name"] == "alloy-modality"
    assert str(registered["version"]) == "1"
    assert "report.html" in said.splitlines()[-1]
    assert not list(folder.rglob("*.incomplete"))


def test_the_second_command_has_nothing_to_do(small_run: tuple[Workspace, str]) -> None:
    """Right after a run nothing is stale; the command says so, shows the table again, and takes seconds."""
    workspace, _ = small_run
    before = results(workspace.folder)
    start = time.monotonic()
    status, said = workspace.run("flows.pipeline", "modality")
    assert status == 0, said
    assert said.startswith("Nothing to do: 8 stages of modality are up to date.")
    assert time.monotonic() - start < 15
    assert results(workspace.folder) == before
