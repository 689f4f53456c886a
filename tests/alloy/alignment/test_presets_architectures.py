"""Presets on architectures that nothing in alloy/ names: functions stay, merges have the right
shapes.
"""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import alloy
from alloy.alignment.presets import PRESETS
from alloy.symmetry import observe_outputs, random_transforms
from alloy.symmetry.spec import with_kind

pytestmark = pytest.mark.slow
SIZE = 16
TOKENS = {
    "input_ids": torch.randint(1, SIZE, (32, SIZE), generator=torch.Generator().manual_seed(0))
}
IMAGES = {
    "pixel_values": torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
}
SHAPE = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": SIZE,
}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, **ENDS, num_key_value_heads=2, tie_word_embeddings=False)
    )


def _gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=SIZE, n_embd=SIZE, n_positions=SIZE, n_layer=2, n_head=4, **ENDS)
    )


def _bloom():
    return BloomForCausalLM(
        BloomConfig(vocab_size=SIZE, hidden_size=SIZE, n_layer=2, n_head=4, **ENDS)
    )


def _resnet():
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, SIZE],
            depths=[2, 2],
            layer_type="basic",
            num_labels=5,
        )
    )


ARCHITECTURES = {
    "llama": (_llama, TOKENS),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SHAPE)), TOKENS),
    "gpt2": (_gpt2, TOKENS),
    "bloom": (_bloom, TOKENS),
    "resnet": (_resnet, IMAGES),
}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def case(request):
    build, inputs = ARCHITECTURES[request.param]
    models = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        models[name] = build().eval().double()
        for parameter in models[name].parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    spec = alloy.find_symmetries(models["a"], {k: v[:4] for k, v in inputs.items()})
    return models, inputs, spec, alloy.collect(models, [inputs], spec, joint=True)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_exact_presets_keep_functions_and_all_presets_merge(case, preset):
    models, inputs, spec, statistics = case
    weights = {n: {k: t.clone() for k, t in m.state_dict().items()} for n, m in models.items()}
    alignment = alloy.align_models(weights, spec, statistics, preset=preset)
    merged = alignment.merge(weights)["a"]
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in weights["a"].items()}
    assert all(torch.isfinite(t).all() for t in merged.values())
    if not alignment.exact:
        return
    aligned = alignment.apply(weights)
    for name, model in models.items():
        with torch.no_grad():
            before = observe_outputs(model(**inputs))
            model.load_state_dict(aligned[name])
            after = observe_outputs(model(**inputs))
            model.load_state_dict(weights[name])
        for ours, theirs in zip(before, after, strict=True):
            # Llama's norms compute in float32, whatever the weights are
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.std()))


def _vit():
    shape = {k: SHAPE[k] for k in SHAPE if k not in ("vocab_size", "max_position_embeddings")}
    return ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4, num_labels=5))


@pytest.mark.parametrize("weight_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_planted_rotations_signs_and_rotary_turns_are_undone(name, weight_share):
    """Streams around the ones (LayerNorm) or free (RMSNorm), heads within, pairs of rotary units,
    gated MLPs.
    """
    build = {"vit": _vit, "llama": _llama}[name]
    inputs = {"llama": TOKENS, "vit": {"pixel_values": torch.randn(32, 3, 16, 16)}}[name]
    torch.manual_seed(0)
    model, planted = build().eval(), build().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    spec = alloy.find_symmetries(model, {k: v[:4] for k, v in inputs.items()})
    source, folded = alloy.fold_norms(model.state_dict(), spec)
    drawn = random_transforms(with_kind(folded, "orthogonal"), torch.Generator().manual_seed(3))
    planted.load_state_dict(alloy.transport(source, folded, drawn))
    models = {"a": model, "b": planted}
    statistics = alloy.collect(models, [inputs], spec)
    weights = {n: m.state_dict() for n, m in models.items()}
    found = alloy.align_models(
        weights, spec, statistics, preset="orthogonal", weight_share=weight_share
    )
    moved = found.apply(weights)
    for key, tensor in moved["a"].items():
        torch.testing.assert_close(moved["b"][key], tensor, rtol=0, atol=1e-3, msg=key)
    kinds = {space.kind for space in folded.spaces.values()}
    assert kinds >= (
        {"rotary", "signed permutation"} if name == "llama" else {"orthogonal fixing ones"}
    )
    assert all(row.activation_after > 0.99 for row in found.report["b"] if row.activation_after)
