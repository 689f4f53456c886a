"""A result becomes a version that anybody can load, with the lineage that says what it is."""

import hashlib
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from alloy.modality import ModalityModel
from tasks import storage, usage
from tasks.data.scenes.words import ANSWERS, tokenizer
from tasks.recipe.load import Recipe
from tasks.recipe.load import load as load_recipe
from tasks.registry import champions, register, tracking
from tasks.registry.champions import RefusedError
from tasks.sources.fetch import main as fetch
from tasks.sources.resolve import resolve
from tests import servers
from tests.tasks.registry.served import claim, picture, save_model

SCORES = {
    "test": {
        "finetuned": {
            "vqa": {"accuracy": 50.0, "accuracy_standard_error": 1.0},
            "retrieval": {"recall_at_1": 40.0, "recall_at_1_standard_error": 2.0},
        }
    }
}


def write_result(scores: dict = SCORES, seed: int = 0, data: str = "a") -> ModalityModel:
    """Leave in a workspace the outputs of the stages before register."""
    model = save_model(Path("models/toy/finetuned"), seed)
    manifest = {"source": "up", "revision": "r1", "digest": "d1", "files": {}, "left_out": []}
    for name in ("seed", "specific"):
        storage.write_json(Path("models/toy/checkpoints") / name / "manifest.json", manifest)
    files = {
        f"{benchmark}/{split}.safetensors": hashlib.sha256(
            f"{data}{benchmark}".encode()
        ).hexdigest()
        for benchmark in ("vqa", "retrieval")
        for split in ("validation", "test")
    }
    storage.write_json(Path("data/toy/manifest.json"), {"files": files})
    storage.write_json(Path("data/toy/vqa/description.json"), {"answers": list(ANSWERS)})
    storage.write_json(Path("reports/toy/metrics.json"), scores)
    return model


@pytest.fixture
def recipe(mlflow_workspace: Path, write_recipe) -> Recipe:
    training = {
        "num_steps": 4,
        "learning_rate": 1e-3,
        "head_learning_rate": 1e-2,
        "matrix_learning_rate": 1e-3,
        "final_share": 0.0,
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "gradient_clip": 1.0,
        "log_every": 1,
        "save_every": 2,
    }
    finetune = {
        "arms": [],
        "joint": True,
        "batch_sizes": {"vqa": 4},
        "seed": 0,
        "task_weight": 1.0,
        "distillation": {"weight": 0.0},
        "training": training,
        "stopping": {"validate_every": 2, "validation_examples": 4, "patience": 1},
    }
    name = write_recipe(
        register={"name": "toy-model", "model": "finetuned"},
        finetune=finetune,
    )
    return load_recipe(name)


def load(address: str):
    import mlflow

    mlflow.set_tracking_uri(tracking.uri())
    return mlflow.pyfunc.load_model(address)


def test_a_result_is_registered_with_its_lineage_and_answers(recipe, write_recipe) -> None:
    """The challenger that MLflow loads says what the model on disk says, in all three ways."""
    subprocess.run(["git", "init", "-q"], check=True)
    commit = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one"]
    subprocess.run(["git", "add", "params"], check=True)
    subprocess.run(commit, check=True)
    Path("dvc.lock").write_text("schema: '2.0'\n")
    model = write_result()
    with usage.measured("toy", "merge"):
        pass
    register.main(recipe)

    version = tracking.aliased("toy-model", "challenger")
    assert version is not None
    assert version.number == "1"
    assert storage.read_json(Path("models/toy/registered.json"))["version"] == "1"
    page = Path("models/toy/registered.html").read_text()
    assert 'content="0; url=http://127.0.0.1:5000/#/models/toy-model/versions/1"' in page
    run = tracking.finished_run(version.run_id)
    assert run.metrics["test/finetuned/vqa/accuracy"] == 50.0
    assert run.metrics["stage/merge/peak_memory"] > 0
    assert run.metrics["test/finetuned/retrieval/recall_at_1_standard_error"] == 2.0
    lineage = tracking.lineage(version.run_id)
    assert lineage["parents"]["specific"] == {"source": "up", "revision": "r1", "digest": "d1"}
    data = storage.read_json(Path("data/toy/manifest.json"))["files"]
    assert lineage["data"] == data
    assert run.tags["digest"] == storage.folder_digest(Path("models/toy/finetuned"))
    assert lineage["dvc_lock"] == storage.sha256(Path("dvc.lock"))
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert lineage["git"] == head.strip()
    assert run.tags["mlflow.source.git.commit"] == head.strip()
    assert run.tags["mlflow.user"]
    assert run.tags["version"] == "models:/toy-model/1"
    ours = [tag for tag in run.tags if not tag.startswith("mlflow.")]
    assert sorted(ours) == ["alloy.result", "alloy.writer", "digest", "recipe", "stage", "version"]
    page = tracking.connect().get_model_version("toy-model", "1").description
    assert version.run_id in page
    assert "seed (up), specific (up)" in page
    found = tracking.connect().get_run(version.run_id)
    assert found.data.params["merge.arms.average.method"] == "linear"
    assert {entry.dataset.name for entry in found.inputs.dataset_inputs} >= {
        "toy/vqa/test.safetensors"
    }
    requirements = tracking.model_files("toy-model", "1")
    assert "requirements.txt" in requirements
    with tracking.model_file("toy-model", "1", "requirements.txt") as path:
        lines = path.read_text().splitlines()
    assert all("==" in line and "+" not in line and "/" not in line for line in lines)

    served = load("models:/toy-model@challenger")
    (first, first_pixels), (second, second_pixels) = picture(0), picture(1)
    texts = ["where is cat", "what is top-left"]
    import pandas as pd

    rows = pd.DataFrame({"image": [first, second], "text": texts})
    tokens = tokenizer()(texts, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.stack([first_pixels, second_pixels])).permute(0, 3, 1, 2)
    with torch.no_grad():
        image = model.encode_image(pixels)
        text = model.encode_text(tokens["input_ids"], tokens["attention_mask"])
        joint = model.encode_joint(pixels, tokens["input_ids"], tokens["attention_mask"])
        answers = model.answer_logits(joint).argmax(-1)
    embedded = served.predict(rows, params={"output": "embeddings"})
    np.testing.assert_allclose([r["image_embedding"] for r in embedded], image, atol=1e-5)
    np.testing.assert_allclose([r["text_embedding"] for r in embedded], text, atol=1e-5)
    scored = served.predict(rows, params={"output": "scores"})
    np.testing.assert_allclose([r["scores"] for r in scored], text @ image.T, atol=1e-5)
    answered = served.predict(rows)
    assert [r["answer"] for r in answered] == [ANSWERS[i] for i in answers]
    only_texts = served.predict(rows[["text"]], params={"output": "embeddings"})
    assert [set(row) for row in only_texts] == [{"text_embedding"}] * 2

    for bad, params, message in [
        (rows[["text"]], {}, "row 0 has no image"),
        (rows.assign(image="no base64!"), {}, "row 0: image is not base64"),
        (rows, {"output": "poems"}, "'poems' is unknown; choose one of"),
        (rows.assign(text="cat " * 20), {}, "row 0: text has 21 tokens, the model takes 1 to 9"),
    ]:
        with pytest.raises(Exception, match=message):
            served.predict(bad, params=params)

    # The registry is a source of checkpoints as well.
    write_recipe(
        fetch={"model_type": "modality", "checkpoints": {"a": "mlflow:models/toy-model@challenger"}}
    )
    fetch(load_recipe("toy"))
    fetched = Path("models/toy/checkpoints/a")
    assert storage.read_json(fetched / "manifest.json")["revision"] == "1"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (fetched / name).read_bytes() == (Path("models/toy/finetuned") / name).read_bytes()
    with pytest.raises(ValueError, match="has no version 'champion'"):
        resolve("mlflow:models/toy-model@champion")


def test_arms_are_runs_below_the_results_and_so_are_those_of_finetuning(recipe) -> None:
    """Their metrics have the same names, their params are the arm's; nothing is adopted twice."""
    with tracking.run("toy", "finetune merged", {"stage": "finetune"}):
        pass
    with tracking.run("pretraining", "seed", {"stage": "pretrain"}) as log:
        log.tags({tracking.MADE: 64 * "a"})
        for step, loss in enumerate((3.0, 2.0)):
            log.metrics({"loss": loss, "system/memory": 1.0}, step)
    arm = {"vqa": {"accuracy": 30.0, "accuracy_standard_error": 1.0}}
    write_result({"test": {**SCORES["test"], "average": arm, "seed": arm}})
    manifest = next(Path("models/toy/checkpoints").glob("*/manifest.json"))
    weights = {"files": {"model.safetensors": {"sha256": 64 * "a", "size": 1}}}
    storage.write_json(manifest, storage.read_json(manifest) | weights)
    register.main(recipe)
    version = tracking.aliased("toy-model", "challenger")
    assert version is not None
    client = tracking.connect()
    experiment = client.get_experiment_by_name("toy").experiment_id
    below = f"tags.`mlflow.parentRunId` = '{version.run_id}'"
    found = {run.info.run_name: run for run in client.search_runs([experiment], below)}
    pretrained = f"pretrain {manifest.parent.name}"
    assert set(found) == {"average", "seed", "finetuned", "finetune merged", pretrained}
    curve = client.get_metric_history(found[pretrained].info.run_id, "loss")
    assert [(point.step, point.value) for point in curve] == [(0, 3.0), (1, 2.0)]
    assert set(found[pretrained].data.metrics) == {"loss"}
    assert found["average"].data.metrics["test/vqa/accuracy"] == 30.0
    assert found["average"].data.params["method"] == "linear"
    assert found["finetuned"].data.metrics["test/vqa/accuracy"] == 50.0
    parent = tracking.finished_run(version.run_id).metrics
    assert "test/finetuned/vqa/accuracy" in parent
    assert "test/average/vqa/accuracy" not in parent
    write_result(seed=1)
    register.main(recipe)
    assert len(client.search_runs([experiment], below)) == 5


@pytest.mark.slow
def test_a_champion_is_copied_to_another_registry_once(recipe, tmp_path) -> None:
    """Files, page and result go along; a second copy of the same result is the same version."""
    write_result()
    register.main(recipe)
    with pytest.raises(RefusedError, match="toy-model has no champion: promote a version first"):
        champions.copy("toy", f"sqlite:///{tmp_path}/other/mlflow.db")
    tracking.move_alias("toy-model", "champion", "1")
    there = f"sqlite:///{tmp_path}/other/mlflow.db"
    for _ in range(2):
        said = champions.copy("toy", there).message
        assert said == f"toy-model version 1 is version 1, champion, at {there}"
    os.environ["MLFLOW_TRACKING_URI"] = there
    try:
        assert tracking.versions("toy-model")[0].tags["alloy.copied_from"].endswith("toy-model/1")
        assert any("model.safetensors" in name for name in tracking.model_files("toy-model", "1"))
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    with pytest.raises(tracking.TrackingError, match="nothing answers"):
        champions.copy("toy", "http://127.0.0.1:9")


def test_the_same_result_is_one_version_another_is_the_next(recipe) -> None:
    write_result()
    register.main(recipe)
    register.main(recipe)
    assert len(tracking.versions("toy-model")) == 1
    write_result(seed=1)
    register.main(recipe)
    newest = tracking.aliased("toy-model", "challenger")
    assert newest is not None
    assert newest.number == "2"


def test_without_mlflow_the_model_stands_and_a_rerun_registers(recipe, monkeypatch) -> None:
    write_result()
    before = storage.folder_digest(Path("models"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(tracking.TrackingError, match=r"nothing answers.*run the stage again"):
        register.main(recipe)
    assert storage.folder_digest(Path("models")) == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    register.main(recipe)
    assert Path("models/toy/registered.json").is_file()


@pytest.mark.slow
def test_registrations_write_no_secret(recipe, planted, monkeypatch) -> None:
    """Neither those that MLflow refuses nor those that it takes, in its database or beside it."""
    write_result()
    for address in (
        f"http://user:{planted.PASSWORD}@127.0.0.1:9",
        f"postgresql://user:{planted.PASSWORD}@127.0.0.1:9/db",
        f"unheard-of://user:{planted.PASSWORD}@host/db",
        f"user:{planted.PASSWORD}@host/db",
        f"databricks://{planted.TOKEN}",
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert "MLflow at " in planted.run("register", monkeypatch), address
    for address in ("", f"sqlite:///other.db?token={planted.PASSWORD}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert "registered toy-model version 1" in planted.run("register", monkeypatch)
    assert Path("other.db").is_file()
    assert planted.leaks() == []


def test_one_model_a_benchmark_is_refused_with_what_would_be_right(recipe) -> None:
    write_result()
    for file in Path("models/toy/finetuned").iterdir():
        file.unlink()
    save_model(Path("models/toy/finetuned/vqa"))
    with pytest.raises(ValueError, match=r"holds no model but .'vqa'.*register the merged one"):
        register.main(recipe)


@pytest.mark.slow
def test_mlflow_serves_the_model_over_http(recipe, tmp_path) -> None:
    """A real request to `mlflow models serve`, in a folder without this repository on its path."""
    write_result()
    register.main(recipe)
    port = servers.free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", "models:/toy-model@challenger", "-p", str(port), "-h", "127.0.0.1"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # `mlflow models serve` looks for uvicorn on the path, as an activated environment has it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": tracking.uri(), "PATH": path}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=elsewhere, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        servers.wait_for_port(port, process, seconds=300)  # seconds on a quiet machine
        image, _ = picture()
        body = {"dataframe_records": [{"image": image, "text": "where is cat"}]}
        answer = servers.post(port, body)
        assert answer["predictions"][0]["answer"] in ANSWERS
        answer = servers.post(port, {**body, "params": {"output": "scores"}})
        assert len(answer["predictions"][0]["scores"]) == 1
        bomb, _ = picture(side=1)
        for bad, message in [
            ({**body, "params": {"output": "poems"}}, "choose one of"),
            ({"inputs": [[1, 2], [3, 4]]}, "columns"),
            ({"inputs": {"image": [], "text": []}}, "none"),
            ({"dataframe_records": [{"picture": image}]}, "columns"),
            ({"dataframe_records": [{"image": 5, "text": "where is cat"}]}, "image"),
            ({"dataframe_records": [{"image": None, "text": "where is cat"}]}, "image"),
            ({"dataframe_records": [{"image": claim(bomb, 20000, 20000), "text": "a"}]}, "large"),
            ({"dataframe_records": [{"image": image, "text": "cat"}] * 1025}, "1 to 1024 rows"),
        ]:
            with pytest.raises(urllib.error.HTTPError) as refused:
                servers.post(port, bad)
            assert refused.value.code == 400, bad
            assert message in refused.value.read().decode(), bad
            refused.value.close()
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)
