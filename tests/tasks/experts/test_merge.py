"""Collect, align, merge and choose on a real (tiny) modality transformer, in a workspace."""

import contextlib
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import alloy
from alloy.modality import (
    ModalityConfig,
    ModalityModel,
    copy_to_experts,
    join,
    shared_weights,
    split_experts,
)
from alloy.modality.observe import collect_experts, expert_spec
from alloy.symmetry import random_transforms
from alloy.symmetry.spec import with_kind
from tasks.data.scenes import words
from tasks.experts import align, choose, collect, merge
from tasks.experts.shared.statistics import load_statistics, save_statistics
from tasks.experts.shared.streams import hide_words
from tasks.recipe.experts import ArmParams
from tasks.recipe.load import load, load_experts
from tasks.recipe.section import ParamsError
from tasks.storage import folder_digest
from tests import recipes

CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_joint_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 12,
    "layer_scale": None,
    "image_size": 8,
    "patch_size": 4,
    "vocab_size": 12,
    "max_position_embeddings": 6,
    "embedding_size": 12,
    "num_answers": 4,
    "num_segment_classes": 4,
}
RECIPE = recipes.experts(
    collect={"checkpoints": ["specific"], "calibration_examples": 10, "batch_size": 4},
    merge={
        "result": "regmean",
        "arms": {
            "interpolation": {
                "checkpoint": "specific",
                "method": "interpolation",
                "options": {"ratio": 0.25},
            },
            "arithmetic": {
                "checkpoint": "specific",
                "method": "modality_arithmetic",
                "base": "seed",
                "options": {"scale": 0.5},
            },
            "regmean": {"checkpoint": "specific", "method": "regmean"},
            "aligned": {"checkpoint": "specific", "method": "regmean", "align": True},
            "only_vl": {
                "checkpoint": "specific",
                "method": "linear",
                "joint_experts": ["vl"],
            },
        },
    },
)


def _model(sharing: str, seed: int) -> ModalityModel:
    torch.manual_seed(seed)
    model = ModalityModel(ModalityConfig(sharing=sharing, **CONFIG)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def _calibration(num: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(2, 7, (num, 1), generator=generator)
    return {
        "pixel_values": torch.randint(256, (num, 3, 8, 8), generator=generator, dtype=torch.uint8),
        "input_ids": torch.randint(1, 12, (num, 6), generator=generator),
        "attention_mask": (torch.arange(6) < lengths).long(),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a recipe `tiny`, its checkpoints and data, collected, aligned, merged."""
    folder = tmp_path_factory.mktemp("finished")
    recipes.write(folder, tiny=RECIPE)
    checkpoints = folder / "models/tiny/checkpoints"
    _model("none", 0).save_pretrained(checkpoints / "specific")
    words.tokenizer().save_pretrained(checkpoints / "specific")
    _model("all", 1).save_pretrained(checkpoints / "seed")
    (folder / "data/tiny").mkdir(parents=True)
    save_file(_calibration(), folder / "data/tiny/calibration.safetensors")
    with contextlib.chdir(folder):
        _run()
    return folder


@pytest.fixture
def workspace(finished, tmp_path, monkeypatch):
    """A copy of the finished workspace of one's own; the working directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _change(workspace, change):
    recipe = yaml.safe_load((workspace / "params/tiny.yaml").read_text())
    change(recipe)
    (workspace / "params/tiny.yaml").write_text(yaml.safe_dump(recipe))


def _run():
    for stage in (collect, align, merge, choose):
        stage.main(load("tiny"))


@pytest.fixture(scope="module")
def spec():
    return collect.agnostic_symmetries(ModalityConfig(sharing="none", **CONFIG))


def test_statistics_are_the_moments_of_what_the_experts_see_in_any_batching(spec):
    model, data = _model("none", 0), _calibration()
    whole = collect_experts(model, [data], spec)
    parts = collect_experts(
        model, [{k: v[:3] for k, v in data.items()}, {k: v[3:] for k, v in data.items()}], spec
    )
    first = "blocks.0.attention.qkv.weight"
    block = model.blocks[0]
    with torch.no_grad():
        x_BTD = model.text_embeddings(data["input_ids"]) + model.type_embeddings.weight[0]
        x_ND = block.norm1["l"](x_BTD)[data["attention_mask"].bool()].double()
    torch.testing.assert_close(whole.grams["l"][first].sum_DD, x_ND.T @ x_ND)
    assert whole.grams["l"][first].count == int(data["attention_mask"].sum())
    assert whole.grams["v"][first].count == 10 * 5
    assert set(whole.grams["vl"]) == {
        f"blocks.2.{part}.weight"
        for part in ("attention.qkv", "attention.proj", "ffn.fc1", "ffn.fc2")
    }
    for modality, grams in whole.grams.items():
        for name, gram in grams.items():
            torch.testing.assert_close(gram.sum_DD, parts.grams[modality][name].sum_DD)
    for modality, spaces in whole.moments.items():
        for space, moments in spaces.items():
            other = parts.moments[modality][space]
            for one, two in zip(moments, other, strict=True):
                torch.testing.assert_close(one.product_DE, two.product_DE)


def test_experts_may_move_their_units_and_heads_but_not_the_stream(spec):
    experts = split_experts(
        _model("none", 0).state_dict(), ModalityConfig(sharing="none", **CONFIG)
    )
    inner = expert_spec(spec, experts["l"])
    # a block: MLP units, heads, and within each head query-key and value units
    assert sorted(s.size for s in inner.spaces.values()) == sorted(3 * [12, 3, 4, 4])
    assert len(expert_spec(spec, experts["vl"]).spaces) == 4


def test_statistics_survive_the_disk(workspace, spec):
    statistics = collect_experts(_model("none", 0), [_calibration()], spec)
    save_statistics(statistics, workspace)
    read = load_statistics(workspace)
    assert read.grams.keys() == statistics.grams.keys()
    for modality, grams in statistics.grams.items():
        assert grams.keys() == read.grams[modality].keys()
        for name, gram in grams.items():
            assert torch.equal(gram.sum_DD, read.grams[modality][name].sum_DD)
            assert gram.count == read.grams[modality][name].count
    for modality, spaces in statistics.moments.items():
        for space, moments in spaces.items():
            for one, two in zip(moments, read.moments[modality][space], strict=True):
                assert torch.equal(one.product_DE, two.product_DE)
                assert one.count == two.count


def test_every_arm_loads_and_the_result_is_one_of_them(workspace):
    arms = sorted(p.name for p in (workspace / "models/tiny/arms").iterdir())
    assert arms == sorted(RECIPE["merge"]["arms"])
    for folder in [*(workspace / "models/tiny/arms").iterdir(), workspace / "models/tiny/merged"]:
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert model.config.sharing == "all"
    merged = load_file(workspace / "models/tiny/merged/model.safetensors")
    regmean = load_file(workspace / "models/tiny/arms/regmean/model.safetensors")
    assert all(torch.equal(merged[name], regmean[name]) for name in regmean)


def test_settings_by_pattern_hold_in_the_blocks_they_match(workspace):
    """Options and coefficients by pattern: each block is merged as with its value alone."""
    recipe = load_experts("tiny")

    def merged(**settings):
        arm = ArmParams.model_validate({"checkpoint": "specific", **settings})
        return merge.merge_arm(arm, recipe).state_dict()

    for settings in (
        {"method": "interpolation", "options": {"ratio": {"blocks.2.*": 0.9, "*": 0.1}}},
        {
            "method": "linear",
            "coefficients": {
                "blocks.0.*": {"v": 1, "l": 2, "vl": 3},
                "*": {"v": 3, "l": 1, "vl": 1},
            },
        },
    ):
        key = "options" if "options" in settings else "coefficients"
        pattern = "blocks.2." if key == "options" else "blocks.0."
        values = settings[key]["ratio"] if key == "options" else settings[key]
        found = merged(**settings)
        whole = {
            value_of: merged(**settings | {key: {"ratio": v} if key == "options" else v})
            for value_of, v in values.items()
        }
        for name, tensor in found.items():
            expected = whole[f"{pattern}*" if name.startswith(pattern) else "*"][name]
            assert torch.equal(tensor, expected), name
    with pytest.raises(ValueError, match=r"\['block.2.\*'\] decide nothing"):
        merged(method="interpolation", options={"ratio": {"block.2.*": 0.9, "*": 0.1}})


@pytest.mark.slow
def test_an_arm_in_a_gauge_loads_with_its_adapters_and_says_what_was_found(workspace):
    """Sequential least squares and RegMean in a gauge, as recipes ask for them."""
    gauge = {"streams": True, "steps": 2, "max_rounds": 1}
    arms = {
        "turned": {
            "method": "sequential",
            "gauge": gauge,
            "answers": "heads",
            "masked_share": 0.5,
            "options": {"ridge": 0.1},
        },
        "units": {"method": "regmean", "gauge": gauge | {"streams": False}, "answers": "states"},
        "plain": {"method": "sequential"},
        "kept": {"method": "sequential", "answers": "heads"},
    }

    def change(recipe):
        recipe["merge"]["arms"] |= {n: {"checkpoint": "specific", **a} for n, a in arms.items()}

    _change(workspace, change)
    merge.main(load("tiny"))
    for name in arms:
        folder = workspace / "models/tiny/arms" / name
        model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert model.config.joint_adapters == (name == "turned")
        assert (folder / "gauge.json").exists() == (name in ("turned", "units"))
    plain, kept = (
        load_file(workspace / f"models/tiny/arms/{name}/model.safetensors")
        for name in ("plain", "kept")
    )
    assert any(not torch.equal(plain[name], kept[name]) for name in plain)
    report = json.loads((workspace / "models/tiny/arms/turned/gauge.json").read_text())
    assert report["error_after"] < report["error_before"]
    assert report["streams"][0]["width"] == model.config.hidden_size


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_an_arm_says_how_many_words_are_hidden(probability):
    """In its share of the texts, each word with its probability; none in the others."""
    ids = torch.randint(10, 20, (40, 50), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = hide_words(batch, 0.5, 3, torch.Generator().manual_seed(1), probability)
    hidden = (seen["input_ids"] == 3).double().mean(1)
    assert (hidden > 0).sum() == 20
    assert hidden[hidden > 0].mean().item() == pytest.approx(probability, abs=0.05)
    assert ArmParams(checkpoint="a", method="sequential").mask_probability == 0.4


def test_interpolation_has_the_papers_coefficients_in_lower_and_joint_blocks(workspace):
    merged = load_file(workspace / "models/tiny/arms/interpolation/model.safetensors")
    source = _model("none", 0)
    experts = split_experts(source.state_dict(), source.config)
    a, lower, joint = 0.25, "blocks.0.ffn.fc1.weight", "blocks.2.ffn.fc1.weight"
    image, text, both = (experts[m] for m in ("v", "l", "vl"))
    torch.testing.assert_close(merged[lower], a * image[lower] + (1 - a) * text[lower])
    expected = 2 / 3 * (a * image[joint] + (1 - a) * text[joint]) + both[joint] / 3
    torch.testing.assert_close(merged[joint], expected)
    only_vl = load_file(workspace / "models/tiny/arms/only_vl/model.safetensors")
    torch.testing.assert_close(only_vl[joint], both[joint])
    for name, tensor in shared_weights(source.state_dict(), source.config).items():
        assert torch.equal(merged[name], tensor)


def test_experts_that_all_equal_the_seed_merge_into_the_seed(workspace):
    seed = _model("all", 1)
    specific = _model("none", 0)
    specific.load_state_dict(copy_to_experts(seed.state_dict(), specific.config))
    specific.save_pretrained(workspace / "models/tiny/checkpoints/specific")
    _run()
    for arm in RECIPE["merge"]["arms"]:
        merged = load_file(workspace / f"models/tiny/arms/{arm}/model.safetensors")
        for name, tensor in seed.state_dict().items():
            torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)


def test_planted_orders_of_units_and_heads_do_not_change_the_aligned_merge(workspace, spec):
    """Close experts, as from a seed: without alignment the planted orders would ruin the merge."""
    specific = _model("none", 0)
    near = copy_to_experts(_model("all", 1).state_dict(), specific.config)
    generator = torch.Generator().manual_seed(4)
    near = {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in near.items()}
    specific.load_state_dict(near)
    folder = workspace / "models/tiny/checkpoints/specific"
    specific.save_pretrained(folder)
    _run()
    arms = ("aligned", "regmean")
    before = {
        arm: load_file(workspace / f"models/tiny/arms/{arm}/model.safetensors") for arm in arms
    }
    experts = split_experts(near, specific.config)
    for modality in ("l", "vl"):
        inner = expert_spec(spec, experts[modality])
        drawn = random_transforms(with_kind(inner, "permutation"), generator)
        experts[modality] = alloy.transport(experts[modality], inner, drawn)
    specific.load_state_dict(join(experts, shared_weights(near, specific.config), specific.config))
    specific.save_pretrained(folder)
    _run()
    after = {
        arm: load_file(workspace / f"models/tiny/arms/{arm}/model.safetensors") for arm in arms
    }

    def change(arm):
        return max(float((before[arm][n] - after[arm][n]).abs().max()) for n in before[arm])

    assert change("aligned") < 1e-4
    assert change("regmean") > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["merge"]["arms"]["regmean"].update(method="regmeen"),
            "arms.regmean.method: 'regmeen': did you mean 'regmean'",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(checkpoint="spcific"),
            "arms.regmean.checkpoint: 'spcific': did you mean 'specific'",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(base="sead"),
            "arms.regmean.base: 'sead': did you mean 'seed'",
        ),
        (lambda r: r["merge"].update(result="regmeen"), "did you mean 'regmean'"),
        (
            lambda r: r["merge"]["arms"]["aligned"].update(checkpoint="unseeded"),
            "arms.aligned: it needs statistics of 'unseeded', which collect.checkpoints does not",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(checkpoint="unseeded"),
            "arms.regmean: it needs statistics of 'unseeded', which collect.checkpoints does not",
        ),
        (
            lambda r: r["merge"]["arms"]["arithmetic"].pop("base"),
            "arms.arithmetic: method .modality_arithmetic. needs base=",
        ),
        (
            lambda r: r["merge"]["arms"]["only_vl"].update(coefficients={"v": 1}),
            "arms.only_vl: coefficients {'v': 1.0} lack",
        ),
        (lambda r: r["merge"]["arms"]["regmean"].update(methd="x"), "did you mean 'method'"),
        (
            lambda r: r["merge"]["arms"]["interpolation"].update(options={"ratoi": 0.5}),
            "did you mean 'ratio'",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(
                align=True,
                gauge={"streams": True, "steps": 1, "max_rounds": 1},
            ),
            "arms.regmean: align moves units before the search of the gauge undoes it",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(
                method="sequential", options={}, coefficients={"v": 1, "l": 2, "vl": 1}
            ),
            "arms.regmean: sequential weighs all experts alike",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(answers="heads"),
            "arms.regmean.answers is of method sequential and of a gauge's search",
        ),
        (
            lambda r: r["merge"]["arms"]["regmean"].update(masked_share=0.5),
            "arms.regmean.masked_share is of method sequential and of a gauge's search",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_stage(workspace, change, message):
    _change(workspace, change)
    with pytest.raises(ParamsError, match=f"^params/tiny.yaml: .*{message}"):
        load("tiny")


def test_a_merge_that_dies_leaves_the_old_arms(workspace, monkeypatch):
    """If the second arm cannot be written, all arms are as before, and nothing is half-written."""
    before = folder_digest(workspace / "models/tiny/arms")
    write, written = merge.write_checkpoint, []

    def full_disk(*arguments):
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(*arguments))

    monkeypatch.setattr(merge, "write_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        merge.main(load("tiny"))
    assert folder_digest(workspace / "models/tiny/arms") == before
    assert not list((workspace / "models").rglob("*.incomplete"))


def test_checkpoints_that_do_not_fit_are_refused_by_name(workspace):
    checkpoints = workspace / "models/tiny/checkpoints"
    _change(workspace, lambda r: r["collect"].update(checkpoints=["specific", "seed"]))
    with pytest.raises(ValueError, match="has no experts to observe"):
        collect.main(load("tiny"))
    _change(workspace, lambda r: r["collect"].update(checkpoints=["specific", "agnostic"]))
    with pytest.raises(ValueError, match=r"agnostic has no config\.json"):
        collect.main(load("tiny"))
    weights = load_file(checkpoints / "specific/model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, checkpoints / "specific/model.safetensors", metadata={"format": "pt"})
    _change(workspace, lambda r: r["collect"].update(checkpoints=["specific"]))
    with pytest.raises(ValueError, match=r"does not fit its own config\.json.*norm\.weight"):
        collect.main(load("tiny"))


def test_too_little_calibration_data_is_refused(workspace):
    """Refused before any stage if the recipe tells, or if the data on disk are too few."""
    _change(workspace, lambda r: r["collect"].update(calibration_examples=13))
    with pytest.raises(
        ParamsError, match=r"examples is 13, yet prepare\.calibration_examples is only 12"
    ):
        load("tiny")
    _change(workspace, lambda r: r["collect"].update(calibration_examples=11))
    with pytest.raises(ValueError, match=r"is 11, .* has only 10"):
        collect.main(load("tiny"))


def test_an_unknown_recipe_is_refused(workspace):
    with pytest.raises(ParamsError, match="recipe 'tinyy' is unknown: did you mean 'tiny'"):
        load("tinyy")
