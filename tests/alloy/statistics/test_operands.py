"""Units are read wherever a weight is multiplied, also where no module does it, and found again
when moved.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import alloy
from alloy.symmetry import random_transforms, transport
from alloy.symmetry.spec import with_kind

SIZE = 12  # width = tokens = vocabulary


def _zoo():
    path = Path(__file__).parents[1] / "symmetry/zoo.py"
    spec = importlib.util.spec_from_file_location("zoo", path)
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


zoo = _zoo()


class Packed(nn.Module):
    """PyTorch's own encoder layer: `nn.MultiheadAttention` multiplies by parameters, and calls no
    module.
    """

    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Embedding(SIZE, SIZE)
        self.layer = nn.TransformerEncoderLayer(
            SIZE, 3, dim_feedforward=SIZE, dropout=0.0, batch_first=batch_first
        )
        self.head = nn.Linear(SIZE, SIZE)
        self.batch_first = batch_first

    def forward(self, input_ids, attention_mask=None):
        ids = input_ids if self.batch_first else input_ids.T
        hidden = None if attention_mask is None else attention_mask == 0
        y = self.head(self.layer(self.embed(ids), src_key_padding_mask=hidden))
        return y if self.batch_first else y.transpose(0, 1)


def _noisy(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _more(inputs, num_examples=24):
    """Inputs like these, of enough examples that pooled states tell units apart."""
    generator = torch.Generator().manual_seed(5)
    drawn = {}
    for name, tensor in inputs.items():
        shape = (num_examples, *tensor.shape[1:])
        if tensor.is_floating_point():
            drawn[name] = torch.randn(shape, generator=generator)
        elif name.endswith("mask") or name == "token_type_ids":
            drawn[name] = torch.ones(shape, dtype=tensor.dtype)
        else:
            high = max(int(tensor.max()) + 1, 4)
            drawn[name] = torch.randint(3, high, shape, generator=generator)
    return drawn


def _check_recovered(model, other, inputs):
    """Every space is observed, and matched by what its units compute alone."""
    spec = alloy.find_symmetries(model, {k: v[:2] for k, v in inputs.items()})
    alloy.validate(model, spec, {k: v[:2] for k, v in inputs.items()})
    planted = random_transforms(with_kind(spec, "permutation"), torch.Generator().manual_seed(1))
    other.load_state_dict(transport(model.state_dict(), spec, planted))
    models = {"a": model, "b": other.eval()}
    statistics = alloy.collect(models, [inputs], spec)
    assert "unobserved space" not in {warned.name for warned in statistics.warnings}
    weights = {name: m.state_dict() for name, m in models.items()}
    found = alloy.align_models(weights, spec, statistics, preset="activation_matching")
    moved = found.apply(weights)
    for name, tensor in moved["a"].items():
        torch.testing.assert_close(moved["b"][name], tensor, rtol=0, atol=1e-5, msg=name)
    return spec


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_packed_projections_of_attention_are_observed(batch_first):
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(SIZE, (8, SIZE + 1))}
    spec = _check_recovered(_noisy(Packed(batch_first)), Packed(batch_first), inputs)
    assert any("in_proj" in str(axis) for s in spec.spaces.values() for axis in s.axes)


SHARED = {
    "squeezebert": "a stream that is a product of two spaces, and widths below two parents",
    "mixtral": "experts in one tensor, and query heads that share keys",
    "xlnet": "projections with a dim for heads",
}


@pytest.mark.parametrize("name", sorted(SHARED))
def test_a_planted_permutation_is_found_by_activations_alone(name):
    model, inputs = zoo.build(name)
    _check_recovered(_noisy(model), zoo.build(name)[0], _more(inputs))


MORE = """vit bert gpt2 llama convnext whisper t5 siglip qwen2_moe qwen3_moe gpt_oss resnet bart
swin roberta distilbert deit dinov2 phi3 gpt_neox opt bloom albert electra gemma cohere wav2vec2
segformer"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE.split())
def test_a_planted_permutation_is_found_by_activations_alone_in(name):
    model, inputs = zoo.build(name)
    _check_recovered(_noisy(model), zoo.build(name)[0], _more(inputs))


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_does_not_count_where_tokens_come_first(batch_first):
    """`nn.MultiheadAttention` lays its tokens end to end, the first of every example first."""
    model = _noisy(Packed(batch_first))
    ids = torch.randint(SIZE, (3, 7), generator=torch.Generator().manual_seed(0))
    lengths = (7, 2, 4)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    spec = alloy.find_symmetries(model, {"input_ids": ids})
    padded = alloy.collect({"a": model}, [{"input_ids": ids, "attention_mask": mask}], spec)
    alone = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate(lengths)]
    whole = alloy.collect({"a": model}, alone, spec)
    assert padded.places.keys() == whole.places.keys()
    for space, places in whole.places.items():
        for ours, theirs in zip(padded.places[space], places, strict=True):
            assert ours.point == theirs.point
            assert ours.count == theirs.count == sum(lengths), ours.point
            torch.testing.assert_close(ours.sums["a"], theirs.sums["a"], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(ours.squares["a"], theirs.squares["a"], rtol=1e-4, atol=1e-3)


def test_statistics_of_operands_do_not_depend_on_how_the_data_are_split():
    models = {name: _noisy(Packed(), seed) for seed, name in enumerate("ab")}
    ids = torch.randint(SIZE, (6, 5), generator=torch.Generator().manual_seed(0))
    spec = alloy.find_symmetries(models["a"], {"input_ids": ids})
    whole = alloy.collect(models, [{"input_ids": ids}], spec, joint=True).to_tensors()
    split = [{"input_ids": part} for part in ids.split([1, 3, 2])]
    for key, tensor in alloy.collect(models, split, spec, joint=True).to_tensors().items():
        scale = max(1.0, float(whole[key].double().abs().max()))
        assert float((tensor.double() - whole[key]).abs().max()) < 1e-5 * scale, key


def test_experts_that_see_other_tokens_in_each_model_are_left_out_and_named():
    """Switch routes tokens to modules: equal numbers of tokens are not equal tokens, so no expert
    counts.
    """
    models = {}
    for seed, name in enumerate("ab"):
        models[name], inputs = zoo.build("switch")
        _noisy(models[name], seed)
    spec = alloy.find_symmetries(models["a"], inputs)
    statistics = alloy.collect(models, [inputs], spec)
    points = {place.point for places in statistics.places.values() for place in places}
    assert any("SelfAttention" in point for point in points)
    assert not any("expert_" in point for point in points)
    assert "routed tokens" in {warned.name for warned in statistics.warnings}
    weights = {name: m.state_dict() for name, m in models.items()}
    assert alloy.align_models(weights, spec, statistics, preset="mudsc").exact


def test_layers_whose_weights_are_normalised_are_observed():
    """Encodec's convolutions are parametrised: the directions of their weights have the units."""
    model, inputs = zoo.build("encodec")
    spec = alloy.find_symmetries(model, inputs)
    assert any("parametrizations" in str(a) for s in spec.spaces.values() for a in s.axes)
    found = alloy.collect({"a": model}, [inputs], spec)
    assert "unobserved space" not in {warned.name for warned in found.warnings}
