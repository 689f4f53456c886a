"""A shell computes what a float64 copy computes, with weights that exist one at a time."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import alloy
from alloy.symmetry.float64 import Float64Shell, widened
from alloy.symmetry.transforms import Mover, transport

IDS = {"input_ids": torch.randint(16, (3, 6), generator=torch.Generator().manual_seed(0))}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def _gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=16, n_embd=12, n_layer=2, n_head=3))


def _resnet():
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


class Checks(nn.Module):
    """Modules that look at their weights' dtype before they compute, and one that adds in place."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.prelu = nn.PReLU(4)
        self.norm = nn.BatchNorm1d(4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x):
        y = self.prelu(self.norm(self.lstm(x)[0].flatten(0, 1)))
        y += self.shift
        return y.mul_(self.shift)


VECTORS = {"x": torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))}
MODELS = {"gpt2": (_gpt2, IDS), "resnet": (_resnet, PIXELS), "checks": (Checks, VECTORS)}


def _first(output):
    return getattr(output, "logits", output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_shell_computes_what_a_copy_in_float64_does(name, dtype):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().to(dtype)
    weights = model.state_dict()
    double = copy.deepcopy(model).double()
    inputs = {key: widened(value) for key, value in inputs.items()}
    shell = Float64Shell(model)
    with shell.reading(weights.__getitem__):
        ours = _first(shell.module(**inputs))
    torch.testing.assert_close(ours, _first(double(**inputs)), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_weights_may_be_moved_as_they_are_read():
    torch.manual_seed(0)
    model = _gpt2().eval()
    spec = alloy.find_symmetries(model, IDS)
    transforms = alloy.random_transforms(spec, torch.Generator().manual_seed(1))
    weights = {name: widened(t) for name, t in model.state_dict(keep_vars=True).items()}
    mover, shell, asked = Mover(spec, transforms), Float64Shell(model), []

    def moved(name):
        asked.append(name)
        return mover.move(weights[name], name)

    with shell.reading(moved):
        ours = shell.module(**IDS).logits
    double = copy.deepcopy(model).double()
    double.load_state_dict(transport(weights, spec, transforms))
    torch.testing.assert_close(ours, double(**IDS).logits, rtol=1e-12, atol=1e-12)
    assert "lm_head.weight" not in asked  # tied to the embedding, which is asked for


def test_a_shell_shares_nothing_with_its_model_and_holds_no_values():
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))
    shell = Float64Shell(model)
    ours = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    theirs = [*shell.module.parameters(), *shell.module.buffers()]
    assert not ours & {t.data_ptr() for t in theirs}
    assert all(t.dtype == torch.float64 for t in theirs if t.is_floating_point())
    assert shell.module[0].bias.isnan().all()  # a read past the shell shows
