"""Laws of the report of sets: means over seeds, members in their order, layers in the model's."""

import shutil

import pytest
import torch
import transformers

from alloy.measures.distances import distance
from tasks.models.report import distances, grids
from tasks.models.report.results import ScoreRow
from tasks.recipe.models import ModelsRecipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ViT of eleven layers, whose names do not sort as it runs."""
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=4, num_hidden_layers=11, num_attention_heads=1, intermediate_size=4,
        image_size=4, patch_size=2,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    """What the report keeps for its next run lies in the folder where it runs."""
    monkeypatch.chdir(tmp_path)


def test_layers_stand_as_the_model_has_them(checkpoint):
    weights = transformers.ViTModel.from_pretrained(checkpoint).state_dict()
    by_name = distance(*[{n: weights[n] for n in sorted(weights)}] * 2).layers
    layers = distances.in_order(by_name, checkpoint)
    assert sorted(layers) == sorted(by_name)
    assert layers[0].startswith("embeddings")
    numbered = [layer for layer in layers if layer.split(".")[-1].isdigit()]
    assert [int(layer.split(".")[-1]) for layer in numbered] == list(range(11))
    assert layers.index("layernorm.weight") > layers.index(numbered[-1])


def test_the_order_of_layers_is_kept_for_the_same_config(checkpoint, tmp_path, monkeypatch):
    names = [f"encoder.layer.{i}" for i in range(10, -1, -1)] + ["layernorm.weight"]
    first = distances.in_order(names, checkpoint)

    def refuse(folder):
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(distances, "model_class", refuse)
    assert distances.in_order(names, checkpoint) == first
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"image_size": 4', '"image_size": 8'))
    with pytest.raises(AssertionError, match="was asked"):
        distances.in_order(names, other)


def test_layers_of_an_unknown_architecture_are_counted(tmp_path):
    names = ["b.10", "b.2", "a.1", "head"]
    assert distances.in_order(names, tmp_path) == ["a.1", "b.2", "b.10", "head"]


def test_distances_by_layer_are_in_the_page_and_as_rows(checkpoint):
    ones = {f"b.{i}.weight": torch.ones(2, 2) for i in (10, 2)}
    twos = {name: 2 * tensor for name, tensor in ones.items()}
    report = distances.build(
        "toy", {"x - y": distance(ones, twos)}, checkpoint, {"arm": "mine", "reason": "named"}
    )
    assert report.metrics["x - y"]["l2"] == pytest.approx(8**0.5)
    assert [row.layer for row in report.rows["distances"]] == ["b.10", "b.2"]
    assert "b.2, b.10" in report.sections[2].parts[1]
    assert report.tables[0].rows[0][:2] == ["x - y", f"{8**0.5:.4f}"]


@pytest.fixture(scope="module")
def recipe() -> ModelsRecipe:
    """Two sets of two seeds, one seed; the result is `ours` of the first set's second seed."""
    return ModelsRecipe.model_validate(
        {
            "name": "toy",
            "kind": "models",
            "fetch": {"checkpoints": {name: f"given/{name}" for name in "abcdef"}},
            "sets": {
                "one": {"title": "One", "members": {0: ["a", "b"], 1: ["c", "d"]}},
                "two": {"members": {0: ["e", "f"]}},
            },
            "merge": {
                "result": {"set": "one", "seed": 1, "arm": "ours"},
                "arms": {"average": {"method": "linear"}, "ours": {"method": "linear"}},
            },
            "evaluate": {"tssd_keep": 0.2},
            "register": {"name": "toy", "model": "merged"},
        }
    )


@pytest.fixture(scope="module")
def scores() -> list[ScoreRow]:
    """Joint accuracies of the arms and one parent: 10 and 30 for `ours` of set one."""
    values = {("one", 0): 10.0, ("one", 1): 30.0, ("two", 0): 50.0}
    models = (("average", "arm", 1.0), ("ours", "arm", 0.0), ("parent_0", "parent", 2.0))
    return [
        ScoreRow(split, place, seed, model, kind, metric, value + more, 0.5)
        for (place, seed), value in values.items()
        for model, kind, more in models
        for split in ("validation", "test")
        for metric in ("joint_accuracy", "average_accuracy", "loss")
    ]


def test_metrics_are_means_over_seeds_and_the_result_is_itself(recipe, scores):
    test = grids.metrics(recipe, scores)["test"]
    assert test["ours"]["one"]["joint_accuracy"] == 20.0
    assert test["ours"]["one"]["joint_accuracy_spread"] == pytest.approx(200**0.5, abs=1e-6)
    assert test["ours"]["one"]["joint_accuracy_standard_error"] == pytest.approx(10.0)
    assert "joint_accuracy_spread" not in test["ours"]["two"]
    assert test["ours"]["two"]["joint_accuracy_standard_error"] == 0.5
    assert test["merged"] == {
        "one": {f"{m}{end}": value for m in ("joint_accuracy", "average_accuracy", "loss")
                for end, value in (("", 30.0), ("_standard_error", 0.5))}
    }  # fmt: skip


def test_an_overview_has_parents_first_and_the_results_arm_marked(recipe, scores):
    joint, average = grids.overview_grids(recipe, scores)
    assert joint.header == ["", "One", "two"]
    assert [row[0] for row in joint.rows] == ["parent 0", "average", "ours"]
    assert joint.rows[2] == ["ours", "20.0 ± 14.1", "50.0 ± 0.5"]
    assert joint.ours == average.ours == "ours"


def test_a_set_without_test_scores_has_no_overview(recipe, scores):
    assert grids.overview_grids(recipe, [row for row in scores if row.set == "one"]) == []


def test_losses_have_three_decimals(recipe, scores):
    first, _ = grids.score_grids(recipe, scores)
    assert first.header[-1] == "loss"
    assert first.rows[1][-1] == "20.000 ± 14.142"
    assert "2 seeds, mean ± standard deviation" in first.caption
