"""Scales have a canonical form: with it the whole group is undone, exactly and without data."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import alloy
from alloy.alignment.diagonal import canonical_scales
from alloy.alignment.result import Alignment
from alloy.alignment.search import align
from alloy.symmetry import random_transforms, transport
from alloy.symmetry.validate import Prober

VOCABULARY = 60
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _random(model, seed):
    """Random weights of which none is zero or one; gains of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        size = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data += 1
    return model.eval().double()


def _ids(vocabulary=60, length=8):
    return torch.randint(1, vocabulary, (2, length), generator=torch.Generator().manual_seed(5))


def _bert(width=24, heads=3, inner=40, layers=2, seed=0):
    config = BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=16,
    )  # fmt: skip
    return _random(BertForMaskedLM(config), seed), {"input_ids": _ids()}


def _whisper(width=24, heads=3, inner=40, layers=2, seed=0):
    config = WhisperConfig(
        vocab_size=60, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner,
        decoder_ffn_dim=inner, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        decoder_start_token_id=1, **TOKENS,
    )  # fmt: skip
    sounds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5)).double()
    model = _random(WhisperForConditionalGeneration(config), seed)
    return model, {"input_features": sounds, "decoder_input_ids": _ids()}


def _opt(seed=0, *, tied=True):
    config = OPTConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=40,
        word_embed_proj_dim=24, max_position_embeddings=16, tie_word_embeddings=tied, **TOKENS,
    )  # fmt: skip
    return _random(OPTForCausalLM(config), seed), {"input_ids": _ids()}


GATED = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16, **TOKENS,
}  # fmt: skip


def _llama(seed=0):
    config = LlamaConfig(**GATED, num_key_value_heads=4, tie_word_embeddings=False)
    return _random(LlamaForCausalLM(config), seed), {"input_ids": _ids()}


def _gemma(seed=0):
    config = GemmaConfig(**GATED, num_key_value_heads=4, head_dim=6)
    return _random(GemmaForCausalLM(config), seed), {"input_ids": _ids()}


def _t5(feed_forward_proj, seed=0):
    config = T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
        feed_forward_proj=feed_forward_proj, decoder_start_token_id=1, **TOKENS,
    )  # fmt: skip
    model = _random(T5ForConditionalGeneration(config), seed)
    return model, {"input_ids": _ids(), "decoder_input_ids": _ids()}


def _t5_relu():
    return _t5("relu")


def _t5_gated_gelu():
    return _t5("gated-gelu")


def _resnet(seed=0):
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[2, 2], layer_type="basic", num_labels=5
    )
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)).double()
    return _random(ResNetForImageClassification(config), seed), {"pixel_values": images}


def _mlp(*widths, seed=0):
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    images = torch.randn(6, widths[0], generator=torch.Generator().manual_seed(5)).double()
    return _random(nn.Sequential(*layers[:-1]), seed), {"input": images}


def _deep():
    """Scales of neighbouring layers depend on each other."""
    return _mlp(6, 30, 20, 30, 20, 5)


def _planted(model, inputs, seed):
    spec = alloy.find_symmetries(model, inputs)
    weights = dict(model.state_dict())
    drawn = random_transforms(spec, torch.Generator().manual_seed(seed))
    return spec, weights, transport(weights, spec, drawn)


def _distance(weights, other):
    return max(
        float((weights[n] - other[n]).abs().max())
        for n in weights
        if weights[n].is_floating_point()
    )


SIGNED = (_llama, _gemma, _t5_relu, _t5_gated_gelu)
WHOLE = {"space": "weight", "canonical": True, "diagonal": True}


@pytest.mark.parametrize(
    "build",
    [_bert, _whisper, _opt, _llama, _gemma, _t5_relu, _t5_gated_gelu, _resnet, _deep],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_element_of_the_whole_group_is_undone_to_rounding(build, seed):
    """Streams, heads, neurons, matrices within every head, and scales; weights alone."""
    spec, weights, planted = _planted(*build(), seed)
    assert spec.diagonals
    method = "signed" if build in SIGNED else "permute"
    found = align(weights, planted, spec, **WHOLE, method=method)
    assert _distance(weights, transport(planted, spec, found)) < 1e-9
    without = align(weights, planted, spec, space="weight", method=method, canonical=True)
    assert _distance(weights, transport(planted, spec, without)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape"),
    [(_bert, (384, 12, 1536, 6)), (_whisper, (384, 6, 1536, 4))],
    ids=["MiniLM", "Whisper tiny"],
)
def test_in_the_shapes_of_real_models_too(build, shape):
    spec, weights, planted = _planted(*build(*shape), 0)
    found = align(weights, planted, spec, **WHOLE)
    assert _distance(weights, transport(planted, spec, found)) < 1e-8


@pytest.mark.parametrize("build", [_whisper, _opt, _gemma, _resnet, _deep])
def test_the_canonical_form_is_reached_from_anywhere_and_keeps_the_function(build):
    model, inputs = build()
    spec = alloy.find_symmetries(model, inputs)
    weights = dict(model.state_dict())
    drawn = random_transforms(spec, torch.Generator().manual_seed(3))
    for name, diagonal in spec.diagonals.items():
        if not any(f.is_gain for f in diagonal.factors):  # signs of others are the matching's
            drawn[name] = replace(drawn[name], scale=drawn[name].scale.abs())
    moved = transport(weights, spec, {name: drawn[name] for name in spec.diagonals})
    ends = [transport(w, spec, canonical_scales(w, spec)) for w in (weights, moved)]
    assert _distance(*ends) < 1e-9
    again = canonical_scales(ends[0], spec)
    assert max(float((t.scale - 1).abs().max()) for t in again.values()) < 1e-9
    prober = Prober(model, spec, inputs)
    assert prober.change(canonical_scales(prober.weights, spec)) < 1e-9
    for diagonal in spec.diagonals.values():
        gains = [f for f in diagonal.factors if f.is_gain]
        if len(gains) == 1:
            name = gains[0].axis.parameter
            gain = diagonal.view(ends[0][name], spec.layout[name], gains[0]) + gains[0].offset
            gain = gain if diagonal.any_sign else gain.abs()
            torch.testing.assert_close(gain, torch.ones_like(gain))


def test_a_neuron_alone_has_as_long_weights_in_front_as_behind():
    model, inputs = _mlp(6, 30, 5)
    spec = alloy.find_symmetries(model, inputs)
    moved = transport(model.state_dict(), spec, canonical_scales(model.state_dict(), spec))
    front = moved["0.weight"].square().sum(1) + moved["0.bias"].square()
    torch.testing.assert_close(front, moved["2.weight"].square().sum(0))


def test_units_that_a_zero_leaves_without_a_length_keep_theirs():
    model, inputs = _opt()
    spec = alloy.find_symmetries(model, inputs)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = "model.decoder.layers.0."
    weights[layer + "fc2.weight"][:, 3] = 0  # a dead neuron
    weights[layer + "final_layer_norm.weight"][5] = 0
    scales = canonical_scales(weights, spec)
    assert all(t.scale.isfinite().all() for t in scales.values())
    assert scales[f"scale of {layer}fc1.weight[0]"].scale[3] == 1
    assert scales[f"scale of {layer}final_layer_norm.weight[0]"].scale[5] == 1


def test_lengths_that_a_matrix_within_heads_stretches_are_not_measured():
    """Values pass a ReLU, are multiplied by any matrix, and mixed: its rows say nothing of them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 7)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu()))

    inputs = {"x": torch.randn(6, 4).double()}
    spec, weights, planted = _planted(_random(Net(), 0), inputs, 0)
    assert spec.spaces["b.weight[0]"].kind == "general linear"
    scales = canonical_scales(weights, spec)["scale of a.weight[0]"].scale
    moved = transport(weights, spec, canonical_scales(weights, spec))
    length = moved["a.weight"].square().sum(1) + moved["a.bias"].square()
    torch.testing.assert_close(length, torch.ones(8).double())
    assert scales.std() > 0.1
    found = align(weights, planted, spec, **WHOLE)
    assert _distance(weights, transport(planted, spec, found)) < 1e-9


def test_spaces_that_are_kept_keep_their_scales():
    spec, weights, planted = _planted(*_opt(), 0)
    kept = "model.decoder.layers.0.fc1.weight[0]"
    found = align(weights, planted, spec, **WHOLE, keep=[kept])
    assert f"scale of {kept}" not in found
    assert "scale of model.decoder.layers.1.fc1.weight[0]" in found


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("dual", {}),
        ("dual", {"num_orders": 2, "start": "best"}),
        ("git_rebasin", {}),
        ("mudsc", {}),
    ],
)
def test_presets_take_it_and_their_alignments_survive_files(preset, settings):
    """Grams follow; sums of spaces whose units are scaled are left out, with a warning."""
    model, inputs = _opt()
    spec, weights, planted = _planted(model, inputs, 0)
    other = _opt()[0]
    other.load_state_dict(planted)
    statistics = alloy.collect({"a": model, "b": other}, [inputs], spec, grams=True)
    both = {"a": weights, "b": planted}
    settings = {"canonical": True, "diagonal": True, **settings}
    alignment = alloy.align_models(both, spec, statistics, preset=preset, **settings)
    assert alignment.exact
    aligned = alignment.apply(both)
    assert _distance(weights, aligned["b"]) < 1e-5  # correlations are of float32 products
    again = Alignment.from_tensors(alignment.to_tensors())
    assert again.units == alignment.units != ""
    assert _distance(again.apply(both)["b"], aligned["b"]) == 0
    moved = alignment.move(statistics)
    for name, gram in moved.grams["b"].items():
        torch.testing.assert_close(gram.sum_DD, moved.grams["a"][name].sum_DD, rtol=1e-4, atol=1e-3)
    stretched = {spec.diagonals[name].depends_on[-1] for name in spec.diagonals}
    assert not stretched & set(moved.places)
    assert "stretches the units" in " ".join(w.message for w in moved.warnings)
    alloy.merge("regmean", [aligned["a"], aligned["b"]], statistics=[*moved.grams.values()])


def test_without_the_option_nothing_is_scaled():
    spec, weights, planted = _planted(*_opt(), 0)
    found = align(weights, planted, spec, space="weight", canonical=True)
    assert set(found) == set(spec.spaces)


def test_neurons_of_models_with_folded_norms_are_scaled():
    """Streams turn, gains are folded, and the function stays."""
    model, inputs = _opt(tied=False)
    spec, weights, planted = _planted(model, inputs, 0)
    both = {"a": weights, "b": planted}
    settings = {"weight_share": 1.0, "start": "identity", "canonical": True, "diagonal": True}
    alignment = alloy.align_models(both, spec, preset="orthogonal", **settings)
    scaled = set(alignment.transforms["b"]) - set(alignment.spec.spaces)
    assert scaled == {f"scale of model.decoder.layers.{i}.fc1.weight[0]" for i in range(2)}
    before = model(**inputs).logits
    aligned = alignment.apply(both)["b"]
    model.load_state_dict(aligned)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-9, atol=1e-9)
    again = Alignment.from_tensors(alignment.to_tensors())
    assert _distance(again.apply(both)["b"], aligned) == 0
