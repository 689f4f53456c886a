"""Members with other names: a language model in the one of a vision-language model.

The models are transformers' own, tiny, with random weights, stored as transformers stores them.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import alloy
from alloy.checkpoint import MergeRequest, open_checkpoint, plan_merge
from alloy.checkpoint.checks.groups import GROUPS, named_so
from alloy.checkpoint.config import parts_of_model
from alloy.errors import MergeError
from tests import multimodal

NAMES = sorted(multimodal.ARCHITECTURES)


def kept(name: str) -> list[str]:
    """Everything but the matrices of the language model's layers."""
    return [multimodal.ARCHITECTURES[name][2], "projector", "embeddings", "head", "norms"]


@pytest.fixture(scope="module", params=NAMES)
def trio(request, tmp_path_factory):
    """A model of several modalities, a language model, and the base of both."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, {
        "vlm": multimodal.saved(multimodal.whole(request.param, 1), folder / "vlm"),
        "llm": multimodal.saved(multimodal.language_model(request.param, 2), folder / "llm"),
        "base": multimodal.saved(multimodal.language_model(request.param, 3), folder / "seed"),
    }


def request(trio, method="task_arithmetic", output=Path("out"), **settings) -> MergeRequest:
    name, folders = trio
    sources = {"vlm": folders["vlm"], "llm": folders["llm"]}
    return MergeRequest(method, sources, output, base=folders["base"], kept=kept(name), **settings)


def test_the_body_alone_is_merged(trio, tmp_path):
    """W = W_base + (W_vlm - W_base) + c (W_llm - W_base) in layers; all else is the first's."""
    name, folders = trio
    alloy.merge_checkpoints(
        "task_arithmetic",
        {"vlm": folders["vlm"], "llm": folders["llm"]},
        tmp_path / "out",
        base=folders["base"],
        kept=kept(name),
        coefficients=[1.0, 0.5],
    )
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    merged, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = multimodal.whole(name, 1)
    llm, base = multimodal.language_model(name, 2), multimodal.language_model(name, 3)
    body = expected.get_decoder().state_dict()
    ours, start = (model.get_decoder().state_dict() for model in (llm, base))
    changed = [n for n in body if "layers" in n and "norm" not in n]
    with torch.no_grad():
        for n in changed:
            body[n].copy_(body[n] + 0.5 * (ours[n] - start[n]))
    for n, tensor in expected.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[n], tensor, atol=1e-6, rtol=1e-5)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        answers = [model.eval()(input_ids=tokens).logits for model in (merged, expected)]
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


def test_names_and_architecture_agree_about_groups(trio):
    """By names and by the model itself, but for a projector that is a part of its tower."""
    name, folders = trio
    checkpoint = open_checkpoint(folders["vlm"])
    parts = parts_of_model(checkpoint.config, checkpoint.entries)
    encoder = multimodal.ARCHITECTURES[name][2]
    for group in GROUPS:
        ours, theirs = named_so(group, checkpoint), parts.get(group, set())
        if name.endswith("VL") and name.startswith("Qwen") and group in (encoder, "projector"):
            both = named_so(encoder, checkpoint) | named_so("projector", checkpoint)
            assert both == parts[encoder]
        else:
            assert ours == theirs, group


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("linear", {"base": None, "coefficients": {"*.layers.0.*": [1, 0], "*": [0.5, 0.5]}}),
        ("ties", {"options": {"density": {"*mlp*": 0.2, "*": 0.5}}}),
        ("dare_ties", {"options": {"density": 0.5}}),
    ],
)
def test_every_way_is_planned(trio, method, settings):
    """Interpolation, TIES and DARE, by layer groups in the first source's names."""
    name, folders = trio
    sources = {"vlm": folders["vlm"], "llm": folders["llm"]}
    given = {"base": folders["base"], "kept": kept(name), **settings}
    plan = plan_merge(MergeRequest(method, sources, "out", **given))
    merged = [t for t in plan.tensors if t.how == method]
    assert len(merged) == 2 * (7 if multimodal.ARCHITECTURES[name][0] == "llama" else 10)
    assert [t.name for t in plan.tensors] == list(open_checkpoint(folders["vlm"]).entries)


def test_what_only_the_first_has_is_kept_by_name_or_refused(trio):
    name, folders = trio
    sources = {"vlm": folders["vlm"], "llm": folders["llm"]}
    encoder = multimodal.ARCHITECTURES[name][2]
    with pytest.raises(MergeError, match=r"missing in 'llm'.*say kept=") as refused:
        plan_merge(MergeRequest("linear", sources, "out"))
    assert encoder in str(refused.value)
    assert "projector" in str(refused.value)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return {
        "vlm": multimodal.saved(multimodal.whole("LlavaNext", 1), folder / "vlm"),
        "llm": multimodal.saved(multimodal.language_model("LlavaNext", 2), folder / "llm"),
    }


def changed(folder: Path, copy: Path, **config) -> Path:
    """A copy of a checkpoint with another config."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(text | config))
    return copy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kept": ["vision"]}, r"kept='vision' matches no tensor.*did you mean 'vision_tower'"),
        ({"kept": ["*model.layer.0.mlp.*"]}, r"of \[('[^']+',? ?){7,9}\] or a pattern of names"),
        ({"kept": ["audio_tower"]}, "kept='audio_tower': the first source has no such tensors"),
        ({"kept": "vision_tower"}, r"kept='vision_tower': give a list"),
        ({"names": {"modle.": "x."}}, r"no tensor begins with 'modle.': did you mean 'model.'"),
        ({"names": {"vlm": {"a.": "b."}}}, "names of 'vlm': it is the first source"),
        ({"names": {"lllm": {"a.": "b."}}}, "names='lllm': did you mean 'llm'"),
        ({"names": ["model."]}, r"names=\['model.'\]: give a mapping"),
        ({"names": {"model.layers.0.": "a.", "model.layers.1.": "a."}}, "gives two tensors of"),
        ({"processor": "lllm"}, "processor='lllm': did you mean 'llm'"),
        ({"generation_config": "no"}, "generation_config='no'"),
        ({"processor": "llm"}, "processor='llm': that source has no preprocessor_config.json or"),
        ({"kept": ["head"], "copy": {"*lm_head*": "llm"}}, "kept and copy=.* both want"),
        ({"kept": ["head"], "drop": ["*lm_head*"]}, "kept and drop=.* both want"),
        ({"kept": ["*"]}, "leaves nothing to merge"),
        ({"stack": "model.layers."}, "says where slices lie, and there are none"),
    ],
)
def test_refused(llava, settings, message):
    with pytest.raises(MergeError, match=message):
        plan_merge(MergeRequest("linear", llava, "out", **settings))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in 'vlm' and 1e-06 in 'llm'"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta is"),
        ({"model_type": "qwen2"}, "different architectures: model_type"),
    ],
)
def test_the_language_models_must_compute_alike(llava, tmp_path, config, message):
    """At equal shapes too: epsilon, rotary base, kind."""
    other = {**llava, "llm": changed(llava["llm"], tmp_path / "other", **config)}
    with pytest.raises(MergeError, match=message):
        plan_merge(MergeRequest("linear", other, "out", kept=kept("LlavaNext")))


def test_two_places_are_asked_about(llava, tmp_path):
    """A model with two language models of one size: which one is meant must be said."""
    weights = alloy.checkpoint.load_weights(llava["llm"])
    folder = tmp_path / "two"
    folder.mkdir()
    both = {f"{part}.{n}": t.clone() for part in ("thinker", "talker") for n, t in weights.items()}
    save_file(both, folder / "model.safetensors")
    (folder / "config.json").write_bytes((llava["llm"] / "config.json").read_bytes())
    sources = {"two": folder, "llm": llava["llm"]}
    with pytest.raises(MergeError, match=r"2 changes of prefix would place them.*names="):
        plan_merge(MergeRequest("linear", sources, "out", kept=["talker.*"]))
    settings = {"kept": ["talker.*"], "names": {"": "thinker."}}
    plan = plan_merge(MergeRequest("linear", sources, "out", **settings))
    assert {t.how for t in plan.tensors if t.name.startswith("thinker.")} == {"linear"}


def versions():
    """Models whose stored names differ from their own: a tower, a text encoder of 2018."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24}
    vit = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    bert = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)
    return {
        "vit": transformers.ViTForImageClassification(vit),
        "bert": transformers.BertForMaskedLM(bert),
        "llava": multimodal.whole("LlavaNext"),
        "qwen": multimodal.whole("Qwen2_5_VL"),
    }


@pytest.mark.parametrize("name", ["vit", "bert", "llava", "qwen"])
def test_old_and_new_names_of_one_model_merge(name, tmp_path):
    """Half of a model and half of it under its other names is that model."""
    model = versions()[name]
    a = multimodal.saved(model, tmp_path / "a")
    b = tmp_path / "b"
    b.mkdir()
    renamed = {n: t.clone() for n, t in model.state_dict().items()}
    if name == "bert":
        renamed.pop("cls.predictions.decoder.weight")
        renamed.pop("cls.predictions.decoder.bias")
        renamed = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for n, t in renamed.items()
        }
    save_file(renamed, b / "model.safetensors")
    (b / "config.json").write_bytes((a / "config.json").read_bytes())
    for first, second in ((a, b), (b, a)):
        output = tmp_path / f"of_{first.name}"
        alloy.merge_checkpoints("linear", [first, second], output)
        ours, theirs = alloy.checkpoint.load_weights(output), alloy.checkpoint.load_weights(first)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_old_configs_hold_the_language_model_at_their_top(tmp_path):
    """Qwen2-VL's first configs: text settings beside vision_config."""
    vlm = multimodal.saved(multimodal.whole("Qwen2VL", 1), tmp_path / "vlm")
    llm = multimodal.saved(multimodal.language_model("Qwen2VL", 2), tmp_path / "llm")
    config = json.loads((vlm / "config.json").read_text())
    text = config.pop("text_config")
    config = {**text, **config, "model_type": "qwen2_vl"}
    (vlm / "config.json").write_text(json.dumps(config))
    sources = {"vlm": vlm, "llm": llm}
    plan = plan_merge(MergeRequest("linear", sources, "out", kept=kept("Qwen2VL")))
    assert sum(t.how == "linear" for t in plan.tensors) == 20
    config["rms_norm_eps"] = 1e-6
    (vlm / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="rms_norm_eps"):
        plan_merge(MergeRequest("linear", sources, "out", kept=kept("Qwen2VL")))


def test_processor_and_generation_config_are_the_named_ones(llava, tmp_path):
    folders = {n: changed(folder, tmp_path / n) for n, folder in llava.items()}
    for name, folder in folders.items():
        for file in ("preprocessor_config.json", "generation_config.json"):
            (folder / file).write_text(json.dumps({"max_length": len(name), "crop": name}))
    settings = {"kept": kept("LlavaNext"), "processor": "vlm", "generation_config": "llm"}
    plan = plan_merge(MergeRequest("linear", folders, "out", **settings))
    assert plan.files["preprocessor_config.json"] == folders["vlm"] / "preprocessor_config.json"
    assert plan.files["generation_config.json"] == folders["llm"] / "generation_config.json"
    settings |= {"processor": "llm"}
    plan = plan_merge(MergeRequest("linear", folders, "out", **settings))
    assert plan.files["preprocessor_config.json"] == folders["llm"] / "preprocessor_config.json"
    with pytest.raises(MergeError, match="see alike"):
        plan_merge(MergeRequest("linear", folders, "out", kept=kept("LlavaNext")))
