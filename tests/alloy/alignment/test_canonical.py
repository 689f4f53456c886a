"""Matrices within heads have a canonical form: the whole group is undone, exactly and without
data.
"""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import alloy
from alloy.alignment.canonical import canonical_spaces, canonical_transforms
from alloy.alignment.matching import operators
from alloy.alignment.search import Search, align
from alloy.alignment.similarity import Similarity
from alloy.errors import AlignmentError
from alloy.symmetry import random_transforms, transport
from alloy.symmetry.spec import unit_view


def _random(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        size = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.data += 1
    return model.eval().double()


def _ids(vocabulary, length):
    return torch.randint(1, vocabulary, (2, length), generator=torch.Generator().manual_seed(5))


def _bert(width=24, heads=3, inner=40, layers=2, seed=0):
    config = BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=16,
    )  # fmt: skip
    return _random(BertModel(config), seed), {"input_ids": _ids(60, 16)}


def _whisper(width=24, heads=3, inner=40, layers=1, seed=0):
    config = WhisperConfig(
        vocab_size=60, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner,
        decoder_ffn_dim=inner, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    sounds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(5)).double()
    model = _random(WhisperForConditionalGeneration(config), seed)
    return model, {"input_features": sounds, "decoder_input_ids": _ids(60, 8)}


def _llama(kv_heads=4, seed=0):
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=16,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return _random(LlamaForCausalLM(config), seed), {"input_ids": _ids(60, 8)}


def _planted(model, inputs, seed, *, scales=False):
    """Plant a random element of the whole group, of its diagonals only with `scales`."""
    spec = alloy.find_symmetries(model, inputs)
    weights = dict(model.state_dict())
    drawn = random_transforms(spec, torch.Generator().manual_seed(seed))
    kept = {name: t for name, t in drawn.items() if scales or name in spec.spaces}
    return spec, weights, transport(weights, spec, kept)


def _distance(weights, other):
    return max(
        float((weights[n] - other[n]).abs().max())
        for n in weights
        if weights[n].is_floating_point()
    )


def _grouped():
    return _llama(kv_heads=2)


@pytest.mark.parametrize("build", [_bert, _whisper, _llama, _grouped])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_element_of_the_whole_group_is_undone_to_rounding(build, seed):
    """Streams, heads, neurons, and any invertible matrix within every head; weights alone."""
    spec, weights, planted = _planted(*build(), seed)
    method = "permute" if build in (_bert, _whisper) else "signed"
    found = align(weights, planted, spec, space="weight", method=method, canonical=True)
    assert _distance(weights, transport(planted, spec, found)) < 1e-9
    without = align(weights, planted, spec, space="weight", method=method)
    assert _distance(weights, transport(planted, spec, without)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape"),
    [(_bert, (384, 12, 1536, 6)), (_whisper, (384, 6, 1536, 4))],
    ids=["MiniLM", "Whisper tiny"],
)
def test_in_the_shapes_of_real_models_too(build, shape):
    spec, weights, planted = _planted(*build(*shape), 0)
    found = align(weights, planted, spec, space="weight", canonical=True)
    assert _distance(weights, transport(planted, spec, found)) < 1e-8


@pytest.mark.parametrize("build", [_bert, _whisper])
def test_both_sides_have_orthogonal_rows_of_equal_lengths(build):
    model, inputs = build()
    spec = alloy.find_symmetries(model, inputs)
    moved = transport(model.state_dict(), spec, canonical_transforms(model.state_dict(), spec))
    for space in canonical_spaces(spec):
        grams = []
        for variance in (1, -1):
            rows = torch.cat(
                [
                    unit_view(moved[axis.parameter], spec, space, axis).reshape(3, 8, -1)
                    for axis in spec.spaces[space].axes
                    if axis.variance == variance
                ],
                -1,
            )
            grams.append(rows @ rows.mT)
        torch.testing.assert_close(grams[0], grams[1])
        torch.testing.assert_close(grams[0], torch.diag_embed(grams[0].diagonal(0, -2, -1)))
    again = canonical_transforms(moved, spec)
    for transform in again.values():  # signs are left
        torch.testing.assert_close(transform.matrix.abs(), torch.eye(8).double().expand(3, 8, 8))


def test_the_function_stays():
    model, inputs = _whisper()
    before = model(**inputs).logits
    spec = alloy.find_symmetries(model, inputs)
    canonical = canonical_transforms(model.state_dict(), spec)
    model.load_state_dict(transport(model.state_dict(), spec, canonical))
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-9, atol=1e-9)


def test_heads_with_units_without_effect_stay_as_they_are():
    model, inputs = _bert()
    spec = alloy.find_symmetries(model, inputs)
    query = model.encoder.layer[0].attention.self.query
    query.weight.data[:8], query.bias.data[:8] = 0, 0
    weights = model.state_dict()
    for name, transform in canonical_transforms(weights, spec).items():
        assert torch.isfinite(transform.matrix).all()
        identities = (transform.matrix == torch.eye(8)).all((-1, -2)).tolist()
        assert identities == [name.startswith("encoder.layer.0.attention.self.query"), False, False]


def test_spaces_that_are_kept_stay():
    spec, weights, planted = _planted(*_bert(), 0)
    name = canonical_spaces(spec)[0]
    found = align(weights, planted, spec, space="weight", canonical=True, keep=[name])
    assert torch.equal(found[name].as_matrix(), torch.eye(8).double().expand(3, 8, 8))


def test_a_preset_finds_it_with_data_and_its_grams_follow():
    model, inputs = _bert()
    spec, weights, planted = _planted(model, inputs, 0)
    other = _bert()[0]
    other.load_state_dict(planted)
    statistics = alloy.collect({"a": model, "b": other}, [inputs], spec, grams=True)
    both = {"a": weights, "b": planted}
    alignment = alloy.align_models(both, spec, statistics, preset="dual", canonical=True)
    assert _distance(weights, alignment.apply(both)["b"]) < 1e-5  # sums are of float32 products
    moved = alignment.move(statistics)
    for name, gram in moved.grams["b"].items():
        torch.testing.assert_close(gram.sum_DD, moved.grams["a"][name].sum_DD, rtol=1e-4, atol=1e-3)
    assert not set(canonical_spaces(spec)) & set(moved.places)
    assert "stretches the units" in " ".join(w.message for w in moved.warnings)
    stretched = {row.space: row for row in alignment.report["b"] if row.kind == "general linear"}
    assert set(stretched) == set(canonical_spaces(spec))
    assert {row.activation_after for row in stretched.values()} == {None}


@pytest.mark.parametrize("scale", ["tensor", "unit"])
def test_more_orders_never_end_lower(scale):
    models = {name: _bert(seed=seed)[0].state_dict() for seed, name in enumerate("ab")}
    spec = alloy.find_symmetries(*_bert())
    heights = []
    for num in (1, 3):
        found = alloy.align_models(
            models, spec, preset="dual", weight_share=1.0, scale=scale, num_orders=num
        ).transforms["b"]
        search = Search(
            Similarity.to(models["a"], spec, {}, 1.0, scale=scale), models["b"], {}, found
        )
        search.sweep()
        heights.append(search.values[-1])
    assert heights[1] >= heights[0]


def test_a_search_that_shares_weights_within_a_family_settles_only_at_its_end():
    """Query heads beside others that share their keys: warm or cold, the end is the same."""
    models = [_llama(2, seed)[0].state_dict() for seed in (0, 1)]
    spec = alloy.find_symmetries(*_llama(2))
    similarity = Similarity.to(models[0], spec, {}, 1.0)
    ends = [
        Search(similarity, models[1], operators(spec, "orthogonal"), warm=warm).run(None, 100)
        for warm in (True, False)
    ]
    for name, transform in ends[0].items():
        torch.testing.assert_close(transform.as_matrix(), ends[1][name].as_matrix())


def test_settings_that_make_no_sense_are_refused():
    models = {name: _bert(seed=seed)[0].state_dict() for seed, name in enumerate("ab")}
    spec = alloy.find_symmetries(*_bert())
    for settings, message in (
        ({"canonical": True, "weight_share": 0.0}, "take a weight_share above 0"),
        ({"num_orders": 0}, "try at least one"),
    ):
        with pytest.raises(AlignmentError, match=message):
            alloy.align_models(models, spec, preset="dual", **settings)


@pytest.mark.slow
def test_rotations_of_a_folded_stream_are_undone_as_far_as_the_tolerance_says():
    """J is quadratic near its optimum, so a tolerance of 1e-9 leaves an error of its root."""
    model, inputs = _llama()
    spec = alloy.find_symmetries(model, inputs)
    weights, folded = alloy.fold_norms(dict(model.state_dict()), spec)
    drawn = random_transforms(folded, torch.Generator().manual_seed(0))
    planted = transport(weights, folded, {name: drawn[name] for name in folded.spaces})
    settings = {"space": "weight", "method": "orthogonal"}
    found = align(weights, planted, folded, **settings, canonical=True)
    assert _distance(weights, transport(planted, folded, found)) < 1e-3
    without = align(weights, planted, folded, **settings)
    assert _distance(weights, transport(planted, folded, without)) > 0.1
