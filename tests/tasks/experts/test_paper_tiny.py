"""The recipe of the paper from end to end, on 12 examples a set in the official formats."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from alloy.modality import ModalityModel
from alloy.modality.masking import masking_of
from alloy.modality.pretraining import caption_losses
from tasks.data.drawn import write_sets, write_start
from tasks.experts import align, choose, collect, evaluate, finetune, merge, prepare
from tasks.experts import pretrain_captions as pretraining
from tasks.experts.measures.sets import SETS
from tasks.experts.shared.loading import load_model
from tasks.experts.start import tokenizer_of
from tasks.recipe.load import load, load_file
from tasks.recipe.pretraining import CaptionPretrainParams
from tasks.recipe.section import ParamsError
from tasks.sources import fetch
from tasks.storage import read_json

PARAMS = Path(__file__).parents[3] / "params"


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty_database):
    """A workspace after pre-training and every stage up to evaluate, as `make merge` runs them."""
    folder = tmp_path_factory.mktemp("paper")
    (folder / "params").mkdir()
    for name in ("paper_tiny", "pretrain_paper_tiny"):
        shutil.copy(PARAMS / f"{name}.yaml", folder / "params")
    (folder / "params/recipes.yaml").write_text("recipes: [paper_tiny]\n")
    shutil.copy(empty_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("MLFLOW_REGISTRY_URI", "")
        write_sets(Path("data/tiny"))
        write_start(Path("models/tiny/beit"))
        pretraining.run("paper_tiny")
        recipe = load("paper_tiny")
        fetch.main(recipe)
        prepare.main(recipe, check=True)
        for stage in (prepare, collect, align, merge, choose, finetune, evaluate):
            stage.main(recipe)
    return folder


@pytest.fixture
def workspace(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def loss_of(model: ModalityModel) -> float:
    """How well a model guesses hidden words of the captions that it was pre-trained on."""
    params = load_file("pretrain_paper_tiny", CaptionPretrainParams)
    data = pretraining.rows_of("paper_tiny", params, "captions")
    masking = masking_of(tokenizer_of(Path(params.tokenizer)), params.masked_words)
    with torch.no_grad():
        losses = caption_losses(
            model, data.take(range(len(data))), masking, torch.Generator().manual_seed(0)
        )
    return losses["masked_words"].item()


def a_merge_keeps_what_its_parent_learned_and_noise_does_not():
    """Hidden words: the merge is as good as its parent; neither the merge of experts without a
    common seed is, nor the merge's own weights in another order."""
    parent = loss_of(load_model(Path("models/paper_tiny/checkpoints/specific")))
    merged = load_model(Path("models/paper_tiny/merged"))
    loss = loss_of(merged)
    assert loss < parent + 0.05
    assert loss_of(load_model(Path("models/paper_tiny/arms/naive"))) > loss + 0.1
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)
        if name.startswith("blocks.")
        else tensor
        for name, tensor in merged.state_dict().items()
    }
    merged.load_state_dict(noise)
    assert loss_of(merged) > parent + 0.2


def every_benchmark_is_measured_and_reported():
    """Five benchmarks after fine-tuning, retrieval before; the page and EvalAI's file are there."""
    metrics = read_json(Path("reports/paper_tiny/metrics.json"))["test"]
    assert set(metrics["finetuned"]) == set(SETS)
    assert set(metrics["merged"]) == {"coco", "flickr30k"}
    rows = json.loads(Path("reports/paper_tiny/plots/scores.json").read_text())
    names = {row["metric"] for row in rows if row["benchmark"] in ("coco", "nlvr2", "ade20k")}
    assert {"text_recall_at_10", "reranked_recall_at_1", "consistency", "pixel_accuracy"} <= names
    assert Path("reports/paper_tiny/report.html").is_file()
    answers = json.loads(Path("reports/paper_tiny/evalai/finetuned.json").read_text())
    assert len(answers) == 12
    assert set(answers[0]) == {"question_id", "answer"}


def heads_and_images_are_those_of_the_data():
    """Answers, classes and sizes come from the data; the parents had no such heads."""
    before, after = (
        load_model(Path("models/paper_tiny") / name).config for name in ("merged", "finetuned")
    )
    assert (before.num_answers, before.num_segment_classes, before.image_size) == (0, 0, 32)
    described = {n: read_json(Path(f"data/paper_tiny/{n}/description.json")) for n in SETS}
    assert after.num_answers == len(described["vqav2"]["answers"])
    assert after.num_segment_classes == len(described["ade20k"]["classes"])
    assert (after.image_size, after.num_image_types) == (48, 2)


def pre_training_that_is_done_is_not_done_again(capsys):
    pretraining.run("paper_tiny", ["specific"])
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_the_twin_runs_from_end_to_end(workspace, capsys):
    """One test, since test processes that share the four would each make a workspace."""
    a_merge_keeps_what_its_parent_learned_and_noise_does_not()
    every_benchmark_is_measured_and_reported()
    heads_and_images_are_those_of_the_data()
    pre_training_that_is_done_is_not_done_again(capsys)


def test_the_paper_and_its_twin_differ_in_numbers_alone():
    """Both have the same stages and arms, so no line of code serves the twin alone."""
    import yaml

    big, tiny = (
        yaml.safe_load((PARAMS / f"{n}.yaml").read_text()) for n in ("paper", "paper_tiny")
    )
    assert big.keys() == tiny.keys()
    assert big["merge"]["arms"] == tiny["merge"]["arms"]
    assert big["prepare"]["sets"].keys() == tiny["prepare"]["sets"].keys()
    for name in ("paper", "paper_tiny"):
        load_file_of(f"pretrain_{name}")


def load_file_of(name: str) -> CaptionPretrainParams:
    import yaml

    return CaptionPretrainParams.model_validate(
        yaml.safe_load((PARAMS / f"{name}.yaml").read_text())
    )


def test_an_unknown_arm_is_refused(tmp_path, monkeypatch):
    shutil.copytree(PARAMS, tmp_path / "params")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match="'agnostik' is no arm: did you mean 'agnostic'"):
        pretraining.run("paper_tiny", ["agnostik"])
