"""Laws of evaluation: every model on every benchmark and split, equal bytes, whole files."""

import shutil
from pathlib import Path

import pytest
import torch

from alloy.modality import ModalityConfig, ModalityModel, agnostic_config, copy_to_experts
from tasks.data.examples import EXAMPLES
from tasks.data.scenes.words import ANSWERS, MAX_TOKENS, SEGMENTATION_CLASSES, VOCABULARY
from tasks.experts import evaluate as stage
from tasks.experts.evaluate import distances, evaluate
from tasks.experts.measures.benchmarks import FINETUNED_ON_SCENES as FINETUNED
from tasks.experts.measures.benchmarks import FREE_ON_SCENES as TRAINING_FREE
from tasks.experts.prepare import prepare
from tasks.experts.report.build import build
from tasks.recipe.experts import EvaluateParams, ExpertsRecipe
from tasks.recipe.load import load, load_experts
from tasks.recipe.section import ParamsError
from tasks.reports import writer
from tasks.storage import folder_digest, read_json, write_json
from tests import recipes

PREPARE = {
    "scenes": {
        "seed": 3,
        "cell_pixels": 12,
        "label_pixels": 6,
        "train_cells": 2,
        "cells": 2,
        "duplicates": 0.25,
        "drop": 0.3,
        "noise": 8,
    },
    "seed": 1,
    "calibration_examples": 4,
    "benchmarks": {name: {"train": 0, "validation": 12, "test": 24} for name in EXAMPLES},
}
MERGE = {
    "result": "interpolation",
    "arms": {
        "interpolation": {"checkpoint": "specific", "method": "interpolation"},
        "naive": {"checkpoint": "unseeded", "method": "interpolation"},
    },
}
EVALUATE = {
    "batch_size": 16,
    "checkpoints": {
        "specific": "specific, <b>from the seed</b>",
        "unseeded": "specific, no seed",
        "agnostic": "agnostic baseline",
    },
    "ensembles": {"ensemble": ["specific", "unseeded"], "twice": ["agnostic", "agnostic"]},
    "naive": "naive",
    "baseline": "agnostic",
    "tssd_keep": 0.2,
}
SECTIONS = {
    "prepare": PREPARE,
    "merge": MERGE,
    "evaluate": EVALUATE,
    "finetune": recipes.FINETUNE | {"arms": ["naive"]},
}
SPECIFIC = ModalityConfig(
    sharing="none",
    hidden_size=12,
    num_hidden_layers=2,
    num_joint_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=24,
    patch_size=12,
    vocab_size=len(VOCABULARY),
    max_position_embeddings=MAX_TOKENS,
    embedding_size=12,
    num_answers=len(ANSWERS),
    num_segment_classes=len(SEGMENTATION_CLASSES),
    segment_cells=2,
)
AGNOSTIC = agnostic_config(SPECIFIC)


def save(model: ModalityModel, folder: str, learned: tuple[str, ...] = FINETUNED) -> None:
    model.save_pretrained(Path("models/toy") / folder)
    if folder.startswith("finetuned"):
        write_json(Path("models/toy") / folder / "finetuning.json", {"benchmarks": learned})


def new_model(config: ModalityConfig, seed: int) -> ModalityModel:
    torch.manual_seed(seed)
    return ModalityModel(config)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Data and models of the recipe `toy`, as the stages before evaluate leave them."""
    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        recipes.write(root, toy=recipes.experts(**SECTIONS))
        prepare(load_experts("toy"))
        agnostic = new_model(AGNOSTIC, 0)
        specific = ModalityModel(SPECIFIC)
        specific.load_state_dict(copy_to_experts(agnostic.state_dict(), SPECIFIC))
        save(specific, "checkpoints/specific")
        save(new_model(SPECIFIC, 1), "checkpoints/unseeded")
        save(agnostic, "checkpoints/agnostic")
        save(agnostic, "merged")
        for seed, folder in enumerate(("arms/naive", "finetuned", "finetuned_arms/naive"), 2):
            save(new_model(AGNOSTIC, seed), folder)
        account = {"arm": "interpolation", "reason": "the recipe names it"}
        write_json(load_experts("toy").workspace.choice, account)
        for name in EVALUATE["checkpoints"]:
            manifest = {"source": f"released/{name}", "revision": "sha256:abc"}
            write_json(Path("models/toy/checkpoints") / name / "manifest.json", manifest)
    return root


@pytest.fixture(scope="module")
def evaluated(built):
    """`built` after its evaluation; tests read it, or change a copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(built)
        stage.main(load("toy"))
    return built


@pytest.fixture
def metrics(evaluated):
    return read_json(evaluated / "reports/toy/metrics.json")


@pytest.fixture
def recipe(workspace, built, write_recipe) -> ExpertsRecipe:
    """The recipe `toy` in a copy of `built` of one's own."""
    for name in ("data", "models"):
        shutil.copytree(built / name, workspace / name)
    return load_experts(write_recipe(**SECTIONS))


TRAINING_FREE_MODELS = {
    "specific",
    "unseeded",
    "agnostic",
    "merged",
    "naive",
    "ensemble",
    "twice",
}
FINETUNED_MODELS = {"finetuned", "finetuned_naive"}


def test_every_model_has_its_metric_and_error_on_every_benchmark_and_split(metrics):
    assert set(metrics) == {"validation", "test"}
    for models in metrics.values():
        assert set(models) == TRAINING_FREE_MODELS | FINETUNED_MODELS
        for model, benchmarks in models.items():
            assert set(benchmarks) == set(FINETUNED if model in FINETUNED_MODELS else TRAINING_FREE)
            for found in benchmarks.values():
                (metric,) = (name for name in found if not name.endswith("_standard_error"))
                assert 0 <= found[metric] <= 100
                assert 0 <= found[f"{metric}_standard_error"] <= 50


def test_equal_models_score_alike_and_an_ensemble_of_equals_is_one_of_them(metrics):
    test = metrics["test"]
    assert test["agnostic"] == test["specific"] == test["merged"] == test["twice"]
    assert test["agnostic"] != test["unseeded"]


def test_equal_inputs_give_equal_bytes_on_any_number_of_cores(recipe, evaluated, monkeypatch):
    first = folder_digest(evaluated / "reports/toy")
    monkeypatch.setattr(stage, "num_cores", lambda: 1)
    stage.main(recipe)
    assert folder_digest(Path("reports/toy")) == first


def test_validation_and_test_are_different_data(metrics):
    assert metrics["validation"] != metrics["test"]


def test_a_model_per_benchmark_is_measured_on_its_own_benchmark(recipe):
    models = Path("models/toy")
    shutil.rmtree(models / "finetuned")
    for seed, name in enumerate(FINETUNED, 10):
        save(new_model(AGNOSTIC, seed), f"finetuned/{name}", (name,))
    results = evaluate(recipe)
    alone = new_model(AGNOSTIC, 10 + FINETUNED.index("segmentation"))
    shutil.rmtree(models / "finetuned")
    save(alone, "finetuned")
    again = evaluate(recipe)

    def segmentation(found):
        return [r for r in found.scores if (r.model, r.benchmark) == ("finetuned", "segmentation")]

    assert segmentation(results) == segmentation(again)
    assert {r.benchmark for r in results.scores if r.model == "finetuned"} == set(FINETUNED)


def test_a_model_is_measured_only_on_what_it_learned_and_the_report_copes(recipe):
    for folder in ("finetuned", "finetuned_arms/naive"):
        save(new_model(AGNOSTIC, 3), folder, ("vqa",))
    results = evaluate(recipe)
    assert {row.benchmark for row in results.scores if row.finetuned} == {"vqa"}
    writer.write(build(results), Path("reports/toy"))
    page = Path("reports/toy/report.html").read_text()
    assert "Questions about an image" in page
    assert "What is where" not in page
    assert "Segmentation" not in Path("reports/toy/table.md").read_text()


def test_experts_copied_from_a_seed_are_at_no_distance_and_others_are_apart(recipe):
    rows = distances(recipe)
    assert {(row.model, row.experts) for row in rows} == {
        (model, experts) for model in ("merged", "naive") for experts in ("v-l", "v-vl", "l-vl")
    }
    for row in rows:
        if row.model == "merged":
            assert row.value == pytest.approx(0, abs=1e-6)
        elif row.measure == "cosine":
            assert row.value == pytest.approx(1, abs=0.2)
        else:
            assert row.value > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"naive": "naiv"}, r"evaluate\.naive: 'naiv': did you mean 'naive'\?"),
        ({"baseline": "agnostik"}, r"'agnostik': did you mean 'agnostic'\?"),
        (
            {"ensembles": {"both": ["specific", "sead"]}},
            r"evaluate\.ensembles\.both: 'sead': did you mean 'seed'\?",
        ),
        ({"checkpoints": {"specifik": "x"}}, r"'specifik': did you mean 'specific'\?"),
        ({"baseline": "unseeded", "checkpoints": {"agnostic": "x"}}, r"baseline: 'unseeded'"),
        ({"ensembles": {"naive": ["agnostic"]}}, r"'naive' names two models"),
    ],
)
def test_unknown_names_are_refused_before_any_stage(write_recipe, wrong, message):
    write_recipe(**SECTIONS | {"evaluate": EVALUATE | wrong})
    with pytest.raises(ParamsError, match=message):
        load("toy")


def test_an_arm_that_is_fine_tuned_must_be_named(write_recipe):
    """Fine-tuning shows what it changed only beside what the model was before."""
    arms = ["naive", "agnostic", "seed"]
    write_recipe(**SECTIONS | {"finetune": recipes.FINETUNE | {"arms": arms}})
    with pytest.raises(
        ParamsError, match=r"finetune\.arms: evaluate\.checkpoints does not name 'seed'"
    ):
        load("toy")


def test_a_report_that_cannot_be_written_leaves_the_old_one(recipe, evaluated, monkeypatch):
    shutil.copytree(evaluated / "reports", "reports")
    before = folder_digest(Path("reports/toy"))

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.reports.writer.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        writer.write(build(evaluate(recipe)), Path("reports/toy"))
    assert folder_digest(Path("reports/toy")) == before


def test_params_say_what_is_wrong_with_them():
    with pytest.raises(ValueError, match=r"unknown key 'basline': did you mean 'baseline'\?"):
        EvaluateParams.model_validate(EVALUATE | {"basline": "x"})
