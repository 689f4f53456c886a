"""`validate` proves what it says: no signal dies on the way, and no error comes out raw."""

import pytest
import torch
import transformers as hf
from torch import nn

import alloy
from alloy.errors import NotProvenError, SymmetryError
from alloy.symmetry.validate import Prober

N, H = 16, 4


def pixels(side):
    return {
        "pixel_values": torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    }


def words():
    return {"input_ids": torch.randint(3, N, (2, N), generator=torch.Generator().manual_seed(0))}


FAINT = {
    "mobilevitv2": (
        "MobileViTV2ForImageClassification",
        hf.MobileViTV2Config(
            image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], num_labels=N
        ),
        pixels(64),
    ),
    "efficientnet": (
        "EfficientNetForImageClassification",
        hf.EfficientNetConfig(
            image_size=32,
            width_coefficient=0.25,
            depth_coefficient=0.3,
            hidden_dim=320,
            num_labels=N,
        ),
        pixels(32),
    ),
    "xglm, whose masks overflow float32": (
        "XGLMForCausalLM",
        hf.XGLMConfig(
            vocab_size=N,
            d_model=N,
            ffn_dim=N,
            num_layers=2,
            attention_heads=H,
            max_position_embeddings=64,
        ),
        words(),
    ),
}


@pytest.mark.filterwarnings("ignore:the example inputs reach")
@pytest.mark.parametrize("name", FAINT)
def test_every_output_varies_as_much_as_one_unit(name):
    """Drawn without care, the spread of the first two is 1e-8 of what it should be."""
    model_class, config, inputs = FAINT[name]
    torch.manual_seed(0)
    model = getattr(hf, model_class)(config).eval()
    spec = alloy.find_symmetries(model, inputs)
    validation = alloy.validate(model, spec, inputs)
    assert validation.worst_change < 1e-11
    assert all(0.1 < spread < 10 for spread in validation.spreads)


class Fading(nn.Module):
    """A deep chain that shrinks what passes, squashes it, or blows it up."""

    def __init__(self, between):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(40))
        self.out = nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        for layer in self.layers:
            x = self.between(layer(x))
        return self.out(x)


@pytest.mark.parametrize("between", [lambda h: h / 9, torch.sigmoid, lambda h: 7 * h, nn.SiLU()])
def test_deep_stacks_neither_starve_nor_explode(between):
    model, inputs = Fading(between), {"x": torch.randn(4, 8)}
    spec = alloy.find_symmetries(model, inputs)
    assert len(spec.spaces) == 40
    validation = alloy.validate(model, spec, inputs)
    assert 0.1 < validation.spreads[0] < 10


class Narrow(nn.Module):
    """Runs in float32 only."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found Double")
        return self.down(torch.relu(self.up(x)))


def test_a_forward_that_float64_breaks_is_not_proven_and_says_so():
    inputs = {"x": torch.randn(2, 4)}
    spec = alloy.find_symmetries(Narrow(), inputs)
    with pytest.raises(NotProvenError, match=r"fails in float64 \(RuntimeError: expected scalar"):
        alloy.validate(Narrow(), spec, inputs)


@pytest.mark.parametrize("inputs", [torch.randn(2, 4), 3, [], [torch.randn(2, 4)], "x"])
def test_examples_that_are_no_dicts_are_refused(inputs):
    spec = alloy.find_symmetries(Fading(torch.relu), {"x": torch.randn(4, 8)})
    with pytest.raises(SymmetryError, match="must be a dict of the model's keyword arguments"):
        alloy.validate(Fading(torch.relu), spec, inputs)


def test_a_spec_of_another_model_is_refused():
    inputs = {"x": torch.randn(2, 4)}
    spec = alloy.find_symmetries(Narrow(), inputs)
    with pytest.raises(SymmetryError, match=r"'up\.weight' of the spec is missing"):
        alloy.validate(Fading(torch.relu), spec, {"x": torch.randn(4, 8)})


def test_outputs_that_no_weight_moves_prove_nothing():
    class Both(Narrow):
        def forward(self, x):
            return self.down(torch.relu(self.up(x))), 2 * x

    inputs = {"x": torch.randn(2, 4)}
    spec = alloy.find_symmetries(Both(), inputs)
    assert Prober(Both(), spec, inputs).not_proven == (1,)
    with pytest.raises(NotProvenError, match=r"varies over the batch .* and with the weights"):
        alloy.validate(Both(), spec, inputs, observe=lambda output: output[1])
    assert torch.get_default_dtype() == torch.float32
