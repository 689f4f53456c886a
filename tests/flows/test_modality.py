"""The real pipeline from end to end, on a small configuration of the modality recipe."""

import json
import shutil
import socket
import sqlite3
from pathlib import Path

import pytest

from tasks.reports.publish import publish
from tests.flows.conftest import Workspace, cpu_seconds
from tests.tasks.reports.browser import CHROMIUM, fits

pytestmark = pytest.mark.slow  # every stage is a process, which imports torch: a minute

STAGES = [
    "fetch", "prepare", "collect", "align", "merge", "choose", "finetune", "evaluate", "register",
]  # fmt: skip


def results(folder: Path) -> dict[str, bytes]:
    """What a run makes that must not differ from machine to machine or from run to run."""
    models = [folder / "models" / "modality" / name for name in ("merged", "finetuned")]
    files = [folder / "reports" / "modality" / "metrics.json"]
    files += [path for model in models for path in model.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def test_one_command_makes_a_registered_model_and_its_report(
    small_run: tuple[Workspace, str],
) -> None:
    """Every stage runs once; models, report and registration are on disk."""
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
        "models/modality/registered.html",
        "mlflow.db",
    ):
        assert (folder / path).is_file(), path
    assert list((folder / "models/modality/finetuned").rglob("*.safetensors"))
    registered = json.loads(workspace.text("models/modality/registered.json"))
    assert registered["name"] == "alloy-modality"
    assert str(registered["version"]) == "1"
    assert "report.html" in said.splitlines()[-1]
    assert not list(folder.rglob("*.incomplete"))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_the_page_of_experts_fits(small_run: tuple[Workspace, str], tmp_path: Path) -> None:
    """The page of the run, in a browser as wide as a phone and as wide as a desk."""
    fits(small_run[0].folder / "reports/modality/report.html", tmp_path)


def test_the_second_command_has_nothing_to_do(small_run: tuple[Workspace, str]) -> None:
    """Right after a run nothing is stale; the command says so, shows the table, takes seconds."""
    workspace, _ = small_run
    before = results(workspace.folder)
    start = cpu_seconds()
    status, said = workspace.run("flows.pipeline", "modality")
    assert status == 0, said
    assert said.startswith("Nothing to do: 9 stages of modality are up to date.")
    assert cpu_seconds() - start < 30
    assert results(workspace.folder) == before


@pytest.mark.parametrize("server", ["away", "hanging"])
def test_a_result_is_registered_once_mlflow_answers(
    small_run: tuple[Workspace, str], tmp_path: Path, server: str
) -> None:
    """Without MLflow register fails after retries and the model stands; the next run registers.

    So does a server that takes connections and never answers: each try gives up by itself.
    """
    done, _ = small_run
    shutil.copytree(done.folder, tmp_path / "alloy")
    workspace = Workspace(tmp_path / "alloy", done.environment)
    (workspace.folder / "models/modality/registered.json").unlink()
    before = results(workspace.folder)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "hanging":
            listening.listen()
        nowhere = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{listening.getsockname()[1]}"}
        cut_off = Workspace(workspace.folder, workspace.environment | nowhere)
        status, said = cut_off.run("flows.pipeline", "modality")
    assert status == 1
    assert "nothing answers" in said
    assert "Retries are exhausted" in said
    assert "stage register@modality failed: register: " in said
    assert "Traceback" not in said
    assert results(workspace.folder) == before
    assert not (workspace.folder / "models/modality/registered.json").exists()
    status, said = workspace.run("flows.pipeline", "modality")
    assert status == 0, said
    assert (workspace.folder / "models/modality/registered.json").is_file()
    # Another database holds no such version, whatever files lie around.
    other = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'other.db'}"}
    elsewhere = Workspace(workspace.folder, workspace.environment | other)
    status, said = elsewhere.run("flows.pipeline", "modality")
    assert status == 0, said
    assert "Running stage 'register@modality'" in said
    assert said.count("Running stage") == 1
    status, said = elsewhere.run("flows.pipeline", "modality")
    assert said.startswith("Nothing to do")


def test_two_processes_share_the_stages(small_run: tuple[Workspace, str], tmp_path: Path) -> None:
    """`make merge PROCESSES=2`: statistics to the bit, one MLflow run for each training."""
    done, _ = small_run
    shutil.copytree(done.folder, tmp_path / "alloy")
    workspace = Workspace(tmp_path / "alloy", done.environment | {"ALLOY_PROCESSES": "2"})
    for made in ("models", "reports", ".dvc/cache"):
        shutil.rmtree(workspace.folder / made)
    (workspace.folder / "dvc.lock").unlink()
    (workspace.folder / "mlflow.db").unlink()
    status, said = workspace.run("flows.pipeline", "modality")
    assert status == 0, said
    for stage in ("collect", "finetune", "evaluate"):
        assert said.count(f"{stage}: on cpu, in 2 processes") == 1, stage
    for name in ("grams", "moments"):
        for file in (done.folder / "models/modality/statistics").rglob(f"{name}.safetensors"):
            shared = workspace.folder / file.relative_to(done.folder)
            assert shared.read_bytes() == file.read_bytes()
    with sqlite3.connect(workspace.folder / "mlflow.db") as database:
        names = [name for (name,) in database.execute("select name from runs")]
    trained = [name for name in names if name.startswith("finetune ")]
    assert len(trained) == len(set(trained)) > 0


def test_the_page_of_results_takes_them(
    small_run: tuple[Workspace, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tasks.reports --publish` puts the table between its marks, twice alike, or refuses."""
    workspace, _ = small_run
    monkeypatch.chdir(workspace.folder)
    page = tmp_path / "results.md"
    page.write_text((Path(__file__).parents[2] / "docs/results.md").read_text())
    publish("modality", page, tmp_path)
    once = page.read_text()
    assert workspace.text("reports/modality/table.md") in once
    publish("modality", page, tmp_path)
    assert page.read_text() == once
    page.write_text("nothing")
    with pytest.raises(ValueError, match="expected the lines"):
        publish("modality", page, tmp_path)
    assert page.read_text() == "nothing"
