"""A recipe of kind "weights": any architecture, from folders to a merged model and its distances."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel, ViTConfig, ViTModel

import alloy
from alloy.checkpoint import save_statistics
from tasks import command
from tasks.experts import evaluate
from tasks.models import stream as merge
from tasks.recipe import params
from tasks.recipe.section import ParamsError
from tasks.registry import register, tracking
from tasks.sources import fetch

RECIPE = {
    "kind": "weights",
    "fetch": {"model_type": "vit", "checkpoints": {"a": "given/a", "b": "given/b"}},
    "prepare": None,
    "collect": None,
    "align": None,
    "merge": {
        "method": "linear",
        "sources": ["a", "b"],
        "base": None,
        "coefficients": [0.25, 0.75],
        "options": {},
        "dtype": None,
        "tokenizer": "same",
    },
    "finetune": None,
    "evaluate": {"tssd_keep": 0.2},
    "register": {"name": "mine", "model": "merged"},
    "ship": {"target": None, "model": "merged"},
}


def _vit(seed: int) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    return ViTModel(config).eval()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        _vit(seed).save_pretrained(tmp_path / "given" / name)
    (tmp_path / "params").mkdir()
    (tmp_path / "params/recipes.yaml").write_text("recipes: [mine]\n")
    (tmp_path / "params/mine.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return tmp_path


def _change(workspace, change):
    recipe = yaml.safe_load((workspace / "params/mine.yaml").read_text())
    change(recipe)
    (workspace / "params/mine.yaml").write_text(yaml.safe_dump(recipe))


def test_two_checkpoints_become_one_that_transformers_loads(workspace, capsys):
    params.check("mine")
    fetch.main("mine")
    merge.main("mine")
    evaluate.main("mine")
    merged, info = AutoModel.from_pretrained("models/mine/merged", output_loading_info=True)
    assert not any(info.values())
    a, b = (load_file(f"given/{name}/model.safetensors") for name in "ab")
    for name, tensor in load_file("models/mine/merged/model.safetensors").items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name])
    assert isinstance(merged, ViTModel)
    metrics = json.loads((workspace / "reports/mine/metrics.json").read_text())
    # On the straight line from a to b, the merged model lies three times nearer to b.
    assert f"{metrics['a - merged']['l2']:.4f}" in capsys.readouterr().out
    assert metrics["a - merged"]["l2"] == pytest.approx(3 * metrics["b - merged"]["l2"], rel=1e-3)
    assert (workspace / "reports/mine/plots/distances.png").is_file()
    assert not list((workspace / "models").rglob("*.incomplete"))


def test_regmean_reads_the_grams_that_collect_measured(workspace):
    """collect's Grams, saved by source, stream through the recipe: the merge is that in memory."""
    fetch.main("mine")
    models = {name: _vit(seed) for seed, name in enumerate("ab")}
    generator = torch.Generator().manual_seed(0)
    batches = [{"pixel_values": torch.randn(20, 3, 8, 8, generator=generator)} for _ in range(3)]
    spec = alloy.find_symmetries(models["a"], batches[0])
    grams = alloy.collect(models, batches, spec, grams=True).grams
    for name, of_model in grams.items():
        weights = models[name].state_dict()
        save_statistics(
            of_model, f"{name}.safetensors", weights=weights, checkpoint=f"given/{name}"
        )
    files = {name: f"{name}.safetensors" for name in "ab"}
    _change(
        workspace,
        lambda r: r["merge"].update(method="regmean", statistics=files, coefficients=None),
    )
    merge.main("mine")
    expected = alloy.merge(
        "regmean",
        [models[name].state_dict() for name in "ab"],
        statistics=[grams[name] for name in "ab"],
    )
    assert len(grams["a"]) == 13
    merged = AutoModel.from_pretrained("models/mine/merged").state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor)
    account = json.loads(Path("models/mine/merged/alloy_merge.json").read_text())
    assert account["settings"]["statistics"] == files


def test_a_merge_without_alignment_is_registered_too(workspace, mlflow_workspace):
    """The merged checkpoint is a version in MLflow, with the hashes of what it was made of."""
    fetch.main("mine")
    merge.main("mine")
    evaluate.main("mine")
    register.main("mine")
    version = tracking.aliased("mine", "challenger")
    assert version is not None
    found = tracking.finished_run(version.run_id)
    assert found.tags["parent/a/digest"] != found.tags["parent/b/digest"]
    assert found.metrics["a - merged/l2"] > 0
    assert any(name.endswith("model.safetensors") for name in tracking.model_files("mine", "1"))


def test_the_readmes_recipe_is_one(workspace):
    """What a newcomer copies is accepted, to the key."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (recipe,) = re.findall(r"```yaml\n(kind: weights.*?)```", text, flags=re.DOTALL)
    (workspace / "params/mine.yaml").write_text(recipe)
    params.check("mine")


def test_merging_again_replaces_the_result_whole(workspace):
    fetch.main("mine")
    merge.main("mine")
    before = load_file("models/mine/merged/model.safetensors")
    _change(workspace, lambda recipe: recipe["merge"].update(coefficients=[1.0, 0.0]))
    merge.main("mine")
    after = load_file("models/mine/merged/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    (workspace / "models/mine/checkpoints/b/model.safetensors").unlink()
    with pytest.raises(ValueError, match="b"):
        merge.main("mine")
    still = load_file("models/mine/merged/model.safetensors")
    assert all(torch.equal(after[name], still[name]) for name in after)


def test_a_stage_that_the_kind_lacks_says_so_and_keeps_the_graph_whole(
    workspace, monkeypatch, capsys
):
    command.leave_out("collect", "mine")
    command.leave_out("finetune", "mine")
    manifest = json.loads((workspace / "models/mine/statistics/manifest.json").read_text())
    assert "has no stage 'collect'" in manifest["note"]
    assert (workspace / "models/mine/finetuned/manifest.json").is_file()
    assert "has no stage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(kind="wieghts"), "kind 'wieghts': did you mean 'weights'"),
        (lambda r: r.update(collct=None), "section 'collct' is unknown"),
        (lambda r: r.pop("collect"), "write `collect: null`"),
        (lambda r: r.update(align={"space": "dual"}), "write `align: null`"),
        (lambda r: r["merge"].update(metod="x"), "did you mean 'method'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_before_the_first_stage(workspace, change, message):
    _change(workspace, change)
    with pytest.raises(ParamsError, match=message):
        params.check("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["merge"].update(sources=["a", "c"]), "merge: 'c'"),
        (lambda r: r["merge"].update(method="lineer"), "did you mean 'linear'"),
        (lambda r: r["merge"].update(options={"densty": 1}), "densty"),
    ],
)
def test_a_merge_that_cannot_be_done_writes_nothing(workspace, change, message):
    fetch.main("mine")
    _change(workspace, change)
    with pytest.raises(ValueError, match=message):
        merge.main("mine")
    assert not (workspace / "models/mine/merged").exists()
