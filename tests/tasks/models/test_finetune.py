"""Any architecture learns from its parents or from the user's data, by the one training loop."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tasks.models import align, choose, collect, evaluate, finetune, merge, prepare
from tasks.recipe.load import load, load_models
from tasks.recipe.section import ParamsError
from tasks.sources import fetch
from tests import tiny_models
from tests.tasks.models.test_benchmarks import RECIPE, llama

PLAN = {
    "seed": 0,
    "batch_size": 8,
    "training": {
        "optimizer": "adamw", "num_steps": 12, "learning_rate": 3e-3, "final_share": 0.1,
        "warmup_steps": 2, "weight_decay": 0.0, "gradient_clip": 1.0, "log_every": 6,
        "save_every": 4,
    },
    "stopping": {"validate_every": 4, "validation_examples": 8, "patience": 3},
}  # fmt: skip
TEXT = {"measure": "perplexity", "texts": "letters", "tokens": 8, "examples": 40}


@pytest.fixture
def workspace(mlflow_workspace: Path) -> Path:
    (mlflow_workspace / "params").mkdir()
    (mlflow_workspace / "params/recipes.yaml").write_text("recipes: [mine]\n")
    tiny_models.letters(mlflow_workspace / "letters", num=12)
    return mlflow_workspace


def write(recipe: dict, change: Callable[[dict], object] = lambda recipe: None, **plan) -> None:
    recipe = {**json.loads(json.dumps(recipe)), "finetune": {**PLAN, **plan}}
    change(recipe)
    Path("params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture
def llamas(workspace: Path) -> Path:
    for seed, name in enumerate("ab"):
        llama(seed).save_pretrained(workspace / "given" / name)
        tiny_models.tokenizer().save_pretrained(workspace / "given" / name)
    return workspace


def losses(name: str = "merged") -> tuple[float, float]:
    """The held-out loss before and after."""
    training = finetune.plan(load_models("mine"))[name]
    held_out = training.lessons[""][1]
    parents = [*training.job.models().values()]
    values = []
    for folder in (training.source, Path("models/mine/finetuned")):
        model = finetune.load_any(folder)
        with torch.no_grad():
            own = held_out.losses(model, parents, held_out.examples, training.params)
        values.append(sum(loss.item() for loss in own.values()))
    return values[0], values[1]


@pytest.mark.slow
def test_a_language_model_learns_texts_and_its_parents(llamas: Path) -> None:
    """The held-out loss falls; a run that was killed ends with the same bits; reports name it."""
    benchmark = {"words": {**TEXT, "examples": 6}}
    write(RECIPE, lambda r: r["evaluate"].update(benchmarks=benchmark), data=TEXT)
    recipe = load_models("mine")
    for stage in (fetch, merge, choose, finetune, evaluate):
        stage.main(recipe)
    before, after = losses()
    assert after < before - 0.05
    metrics = json.loads(Path("reports/mine/metrics.json").read_text())["test"]
    assert metrics["finetuned"]["words"]["perplexity"] < metrics["merged"]["words"]["perplexity"]
    whole = load_file("models/mine/finetuned/model.safetensors")
    (training,) = finetune.plan(recipe).values()

    def stop(kind: str, *values: object) -> None:
        if kind == "curves" and values[1] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(training, stop)
    finetune.finetune(training, lambda *_: None)
    for key, tensor in load_file(training.work / "done/model.safetensors").items():
        assert torch.equal(tensor, whole[key])


@pytest.mark.slow
def test_a_classifier_learns_its_parents_answers_without_labels(workspace: Path) -> None:
    """Calibration data are enough: the model comes nearer to the surest parent's answers."""
    for seed, member in enumerate("ab"):
        model = tiny_models.model("ConvNextForImageClassification", seed)
        tiny_models.save(model, workspace / "given" / member)
    tiny_models.pictures(workspace / "photos")
    own = {"images": "photos", "examples": 24}
    write(tiny_models.recipe(own, {0: ["a", "b"]}), arms=["average"])
    recipe = load_models("mine")
    for stage in (fetch, prepare, collect, align, merge, choose, finetune, evaluate):
        stage.main(recipe)
    before, after = losses()
    assert after < before
    scores = json.loads(Path("reports/mine/metrics.json").read_text())["calibration"]
    assert {"finetuned", "finetuned_average"} <= scores.keys()
    assert Path("reports/mine/report.html").read_text().count("finetuned") > 1


def test_labels_are_the_users_own(workspace: Path) -> None:
    """Folders of pictures by class: the loss of the labels alone falls."""
    for seed, member in enumerate("ab"):
        model = tiny_models.model("ConvNextForImageClassification", seed)
        tiny_models.save(model, workspace / "given" / member)
    drawn = random.Random(0)
    for number in range(5):
        (workspace / f"photos/LABEL_{number}").mkdir(parents=True)
        for i in range(6):
            colour = (50 * number, drawn.randrange(40), 200 - 40 * number)
            image = Image.new("RGB", (32, 32), colour)
            image.save(workspace / f"photos/LABEL_{number}/{i}.png")
    data = {"measure": "labels", "images": "photos"}
    write(RECIPE, data=data, distillation={"weight": 0.0})
    for stage in (fetch, merge, choose, finetune):
        stage.main(load("mine"))
    before, after = losses()
    assert after < before


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "no calibration data to learn the parents' answers on"),
        ({"data": {**TEXT, "measure": "command", "command": "x {model}"}}, "has no 'texts'"),
        ({"data": {"measure": "command", "command": "x {model}"}}, "a training learns `labels`"),
        ({"data": TEXT, "task_weight": 0, "distillation": {"weight": 0}}, "nothing to learn"),
        ({"data": TEXT, "arms": ["avrage"]}, "arms: 'avrage'"),
        ({"data": TEXT, "arms": ["average"]}, "is the result, which is trained anyway"),
        ({"data": TEXT, "batch_size": 0}, "greater than 0"),
        ({"data": TEXT, "training": {**PLAN["training"], "optimizer": "muon",
                                     "matrix_learning_rate": 0.1}}, "write `optimizer: adamw`"),
        ({"data": TEXT, "training": {**PLAN["training"], "accumulation_steps": 3}},
         "cannot be split"),
        ({"data": TEXT, "batchsize": 3}, "did you mean 'batch_size'"),
    ],
)  # fmt: skip
def test_a_training_that_could_not_be_done_is_refused_at_once(workspace, plan, message) -> None:
    write(RECIPE, **plan)
    with pytest.raises(ParamsError, match=message):
        load("mine")


def test_examples_that_are_too_few_are_told(llamas: Path) -> None:
    write(RECIPE, data={**TEXT, "examples": 12})
    for stage in (fetch, merge, choose):
        stage.main(load("mine"))
    (training,) = finetune.plan(load_models("mine")).values()
    with pytest.raises(ParamsError, match="12 examples are fewer than a batch of 8 and the 8 held"):
        training.lessons  # noqa: B018
    shutil.rmtree("models")
    write(RECIPE, lambda r: r.pop("finetune") and r["register"].update(model="finetuned"))
    with pytest.raises(ParamsError, match="no section finetune"):
        load("mine")
