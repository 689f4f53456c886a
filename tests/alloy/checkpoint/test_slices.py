"""Slices: results whose layers are layers of any source, and what their configs say."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    CLIPConfig,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    ResNetConfig,
    T5Config,
)

import alloy
from alloy.checkpoint import MergeRequest, load_weights, plan_merge
from alloy.errors import MergeError
from tests import multimodal

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def model(seed: int, num_layers: int = 4, kind=LlamaConfig, **settings) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = kind(**SIZES, num_hidden_layers=num_layers, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: multimodal.saved(model(seed, layers), folder / name)
        for seed, (name, layers) in enumerate({"a": 4, "b": 4, "deep": 6}.items(), 1)
    }


def merged(folders, names, output, method="passthrough", **settings):
    sources = {name: folders[name] for name in names}
    return alloy.merge_checkpoints(method, sources, output, **settings)


def layers_of(weights, number):
    prefix = f"model.layers.{number}."
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_layers_of_any_source_in_any_order(folders, tmp_path):
    """Depth up-scaling: twice a's middle, then deep's end; what is around is the ends' own."""
    slices = [{"a": [0, 3]}, {"a": [1, 3]}, {"deep": [4, 6]}]
    merged(folders, ["a", "deep"], tmp_path / "out", slices=slices)
    ours = load_weights(tmp_path / "out")
    of = {name: load_weights(folders[name]) for name in ("a", "deep")}
    origin = [("a", 0), ("a", 1), ("a", 2), ("a", 1), ("a", 2), ("deep", 4), ("deep", 5)]
    for number, (source, layer) in enumerate(origin):
        assert same(layers_of(ours, number), layers_of(of[source], layer))
    assert not layers_of(ours, len(origin))
    name = "model.embed_tokens.weight"
    assert torch.equal(ours[name], of["a"][name])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(ours[name], of["deep"][name])
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert loaded.config.num_hidden_layers == 7
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.isfinite(loaded(torch.arange(3, 9)[None]).logits).all()


def test_the_whole_is_one_slice(folders, tmp_path):
    """Slices that name all layers in order give the merge without slices, to the bit."""
    whole = [{"a": [0, 4], "b": [0, 4]}]
    settings = {"method": "linear", "coefficients": [0.3, 0.7]}
    merged(folders, ["a", "b"], tmp_path / "plain", **settings)
    merged(folders, ["a", "b"], tmp_path / "sliced", slices=whole, **settings)
    halves = [{"a": [0, 2], "b": [0, 2]}, {"a": [2, 4], "b": [2, 4]}]
    merged(folders, ["a", "b"], tmp_path / "halves", slices=halves, **settings)
    plain, *others = (load_weights(tmp_path / n) for n in ("plain", "sliced", "halves"))
    assert all(same(plain, other) for other in others)


def test_slices_of_some_sources_have_those_sources_weights(folders, tmp_path):
    """Weights of a mean are of the sources in the slice; layers of other numbers meet."""
    slices = [{"a": [0, 1], "b": [2, 3]}, {"a": [1, 2], "deep": [5, 6]}]
    merged(
        folders,
        ["a", "b", "deep"],
        tmp_path / "out",
        method="linear",
        slices=slices,
        coefficients={"a": 1, "b": 1, "deep": 3},
    )
    ours = load_weights(tmp_path / "out")
    of = {name: load_weights(folders[name]) for name in folders}
    for name, tensor in layers_of(ours, 0).items():
        mean = (layers_of(of["a"], 0)[name] + layers_of(of["b"], 2)[name]) / 2
        torch.testing.assert_close(tensor, mean)
    for name, tensor in layers_of(ours, 1).items():
        mean = (layers_of(of["a"], 1)[name] + 3 * layers_of(of["deep"], 5)[name]) / 4
        torch.testing.assert_close(tensor, mean)


def test_task_vectors_of_a_slice_are_from_its_own_layers(folders, tmp_path):
    """Base layers are the first source's numbers, or those that are given."""
    slices = [{"a": [0, 2], "b": [0, 2]}, {"base": [4, 5], "a": [3, 4], "b": [3, 4]}]
    merged(
        folders, ["a", "b"], tmp_path / "out", method="task_arithmetic", slices=slices,
        base=folders["deep"], coefficients=[0.5, 0.25],
    )  # fmt: skip
    ours = load_weights(tmp_path / "out")
    of = {name: load_weights(folders[name]) for name in folders}
    for number, (layer, of_base) in enumerate([(0, 0), (1, 1), (3, 4)]):
        a, b = layers_of(of["a"], layer), layers_of(of["b"], layer)
        for name, start in layers_of(of["deep"], of_base).items():
            expected = start + 0.5 * (a[name] - start) + 0.25 * (b[name] - start)
            torch.testing.assert_close(layers_of(ours, number)[name], expected)


def test_lists_of_a_config_follow_their_layers(tmp_path):
    """Each layer keeps its kind of attention."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = multimodal.saved(model(0, 4, Gemma3TextConfig, layer_types=kinds), tmp_path / "gemma")
    slices = [{"gemma": [1, 3]}, {"gemma": [2, 4]}, {"gemma": [0, 1]}]
    alloy.merge_checkpoints("passthrough", {"gemma": folder}, tmp_path / "out", slices=slices)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [kinds[i] for i in (1, 2, 2, 3, 0)]


def test_scaled_copies_start_as_nothing(folders, tmp_path):
    """The copies' outputs at 0 leave the function as it was: the usual start of up-scaling."""
    slices = [{"a": [0, 4]}, {"a": [3, 4]}]
    scale = {"*.layers.4.*o_proj*": 0.0, "*.layers.4.*down_proj*": 0.0, "*": 1.0}
    merged(folders, ["a"], tmp_path / "out", slices=slices, scale=scale)
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(deeper(tokens).logits, model(1)(tokens).logits)


def test_the_language_model_of_a_larger_model_is_sliced(tmp_path):
    folder = multimodal.saved(multimodal.whole("Idefics3", num_layers=3), tmp_path / "vlm")
    alloy.merge_checkpoints("passthrough", {"v": folder}, tmp_path / "out", slices=[{"v": [1, 3]}])
    ours, theirs = load_weights(tmp_path / "out"), load_weights(folder)
    prefix = "model.text_model.layers"
    assert {n: t for n, t in ours.items() if prefix not in n}.keys() == {
        n for n in theirs if prefix not in n
    }
    assert torch.equal(
        ours[f"{prefix}.0.mlp.up_proj.weight"], theirs[f"{prefix}.1.mlp.up_proj.weight"]
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([{"a": [0, 5]}], "'a' has 4 layers called model.layers"),
        ([{"c": [0, 1]}], r"slices.0.: 'c': choose one of \['a', 'b'\]"),
        ([{"a": [2, 2]}], "give the first layer and the one after the last"),
        ([{"a": "0:2"}], "give the first layer and the one after the last"),
        ([{"a": [0, 2], "b": [0, 3]}], "different numbers of layers: {'a': 2, 'b': 3}"),
        ([{}], "give layers by source"),
        ({"a": [0, 2]}, "give a list"),
        ([{"a": [0, 2], "b": [0, 2]}], "merges 1 models .* got 2"),
    ],
)
def test_refused(folders, slices, message):
    sources = {name: folders[name] for name in ("a", "b")}
    with pytest.raises(MergeError, match=message):
        plan_merge(MergeRequest("passthrough", sources, "out", slices=slices))


def test_a_stack_must_be_one(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    from safetensors.torch import save_file

    names = [f"{side}.block.{i}.weight" for side in ("encoder", "decoder") for i in range(2)]
    save_file({n: torch.randn(4, 4) for n in names}, folder / "model.safetensors")
    settings = {"slices": [{"t5": [1, 2]}]}
    with pytest.raises(MergeError, match=r"layers lie in \['decoder.block.', 'encoder.block.'\]"):
        plan_merge(MergeRequest("passthrough", {"t5": folder}, "out", **settings))
    with pytest.raises(MergeError, match=r"stack='decoder' holds no layers: did you mean"):
        plan_merge(MergeRequest("passthrough", {"t5": folder}, "out", stack="decoder", **settings))
    settings["stack"] = "decoder.block."
    plan = plan_merge(MergeRequest("passthrough", {"t5": folder}, "out", **settings))
    assert {t.name for t in plan.tensors} == {
        "decoder.block.0.weight", "encoder.block.0.weight", "encoder.block.1.weight"
    }  # fmt: skip


ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
TOWER |= {"num_hidden_layers": 2}
MIXTURE = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
STACKS = {
    "encoder.layers.": BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=32, **ENDS,
    ),
    "vision_model.encoder.layers.": CLIPConfig(
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        text_config={**TOWER, "vocab_size": 32, **ENDS},
    ),
    "decoder.block.": T5Config(
        d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2, num_decoder_layers=2,
        vocab_size=32, decoder_start_token_id=0, **ENDS,
    ),
    "encoder.stages.": ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]),
    "layers.": Qwen2MoeConfig(**SIZES, **MIXTURE, num_hidden_layers=2, mlp_only_layers=[0]),
}  # fmt: skip


def sliced_anew(stack, folder, slices, **settings):
    """A copy of a model with these slices of one of its stacks, loaded."""
    saved = multimodal.saved(AutoModel.from_config(STACKS[stack]), folder / "model")
    settings |= {"slices": [{"model": layers} for layers in slices], "stack": stack}
    alloy.merge_checkpoints("passthrough", {"model": saved}, folder / "out", **settings)
    return AutoModel.from_pretrained(folder / "out", output_loading_info=True)


@pytest.mark.parametrize("stack", ["encoder.layers.", "vision_model.encoder.layers."])
def test_the_config_counts_the_layers_of_the_stack_that_is_sliced(stack, tmp_path):
    """Encoders, decoders and towers have counts of their own, under names of their own."""
    _, report = sliced_anew(stack, tmp_path, [[0, 2], [1, 2]])
    assert not any(report.values())


@pytest.mark.parametrize(
    ("stack", "slices", "message"),
    [
        ("decoder.block.", [[0, 2], [0, 1]], "no place for 'decoder.block.2.*relative_attention"),
        ("layers.", [[1, 2], [0, 1]], "no place for 'layers.0.*drop"),
        ("encoder.stages.", [[0, 2], [1, 2]], "no key of the config counts the 2 layers"),
    ],
)
def test_layers_that_no_config_describes_are_refused(stack, slices, message, tmp_path):
    """A first block's own table, layers named by number, stages of sizes of their own."""
    with pytest.raises(MergeError, match=message):
        sliced_anew(stack, tmp_path, slices)
    assert not (tmp_path / "out").exists()


def test_what_one_place_alone_has_may_be_left_out(tmp_path):
    drop = ["decoder.block.2.*relative_attention_bias.weight"]
    _, report = sliced_anew("decoder.block.", tmp_path, [[0, 2], [0, 1]], drop=drop)
    assert not any(report.values())
