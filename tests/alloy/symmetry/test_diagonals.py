"""Units may be scaled where every operation lets a number pass, and nowhere else."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import alloy
from alloy.errors import SymmetryError
from alloy.symmetry import (
    SymmetrySpec,
    Transform,
    compose,
    differences,
    fold_norms,
    invert,
    random_transforms,
    transforms_from_tensors,
    transforms_to_tensors,
    transport,
    with_kind,
)
from alloy.symmetry.parts import restrict
from alloy.symmetry.tracing.scales import basis
from alloy.symmetry.validate import TOLERANCE, Prober

_spec = importlib.util.spec_from_file_location("zoo", Path(__file__).with_name("zoo.py"))
zoo = importlib.util.module_from_spec(_spec)
sys.modules["zoo"] = zoo
_spec.loader.exec_module(zoo)
N = zoo.N


def scalings(spec):
    """What each diagonal multiplies and divides -> whether by numbers of any sign."""
    return {
        " ".join(
            f"{'*' if f.exponent > 0 else '/'}{f.axis}" * abs(f.exponent) for f in d.factors
        ): d.any_sign
        for d in spec.diagonals.values()
    }


def traced(model, inputs):
    spec = alloy.find_symmetries(model, inputs)
    alloy.validate(model, spec, inputs)
    return spec


# Architectures: (diagonals of norms or other gains, others with any sign, others positive)

COUNTS = {
    "bert": (1, 0, 0),  # post-norm: the last norm alone is read by a linear layer only
    "bert_classifier": (1, 0, 0),
    "roberta": (1, 0, 0),
    "vit": (5, 0, 0),  # two norms a layer and the last one; GELU takes no scale
    "dinov2": (5 + 4, 0, 0),  # and LayerScale
    "dinov2_swiglu": (5 + 4, 2, 0),
    "gpt2": (4, 0, 0),  # the last norm is read by the tied embedding
    "opt": (4, 0, 2),  # ReLU
    "llama": (5, 2, 0),  # gated
    "qwen3": (5, 2, 0),  # norms of queries and keys before the rotation keep their gains
    "gemma": (5, 2, 0),  # gains are stored less one
    "t5": (5 + 6, 0, 4),  # the decoder's last norm is read by the tied embedding
    "whisper": (5 + 6, 0, 0),
    "bart": (1, 0, 0),  # post-norm: the encoder's last norm is read by cross-attention alone
    "mixtral": (5, 2, 0),  # neurons of each expert
    "resnet": (5, 0, 0),  # gains of batch norms, behind which ReLUs, pools and sums are
    "mamba": (2, 2, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_diagonals_of_architectures_are_those_of_theory(name):
    """And the model confirms them."""
    model, inputs = zoo.build(name)
    spec = alloy.find_symmetries(model, inputs)
    gained = [any(f.is_gain for f in d.factors) for d in spec.diagonals.values()]
    others = [d for d, g in zip(spec.diagonals.values(), gained, strict=True) if not g]
    signed = sum(d.any_sign for d in others)
    assert (sum(gained), signed, len(others) - signed) == COUNTS[name]
    prober = Prober(model, spec, inputs)
    assert prober.change(random_transforms(spec, prober.generator)) <= TOLERANCE


@pytest.mark.parametrize("name", ["opt", "llama", "t5", "resnet", "gemma", "mixtral", "mamba"])
def test_leaving_out_one_weight_of_a_diagonal_is_detected(name):
    """Power: every factor is needed; a scale of its own would be another function."""
    model, inputs = zoo.build(name)
    spec = alloy.find_symmetries(model, inputs)
    prober = Prober(model, spec, inputs)
    drawn = random_transforms(spec, prober.generator)
    assert spec.diagonals
    for diagonal in spec.diagonals.values():
        moved = transport(prober.weights, spec, {diagonal.name: drawn[diagonal.name]})
        for factor in diagonal.factors:
            left = factor.axis.parameter
            stale = {
                n: prober.weights[n] for n in (left, *spec.tied) if spec.tied.get(n, n) == left
            }
            if not factor.axis.parameter.endswith("k_proj.bias"):
                assert prober.change({}, {**moved, **stale}) > TOLERANCE, factor


# Single operations


class Net(nn.Module):
    """A linear layer, a function of its units, and another linear layer."""

    def __init__(self, between, **more):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(4, 8), nn.Linear(8, 3), between
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.down(self.between(self, self.up(x)))


X = {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
UP_DOWN = "*up.weight[0] *up.bias[0] /down.weight[1]"
FUNCTIONS = {
    "relu": (lambda m, h: F.relu(h), {UP_DOWN: False}),
    "relu in place": (lambda m, h: F.relu_(h), {UP_DOWN: False}),
    "leaky": (lambda m, h: F.leaky_relu(h, 0.1), {UP_DOWN: False}),
    "clamp": (lambda m, h: h.clamp(min=0), {UP_DOWN: False}),
    "threshold": (lambda m, h: F.threshold(h, 0.0, 0.0), {UP_DOWN: False}),
    "squared relu": (
        lambda m, h: F.relu(h).square(),
        {UP_DOWN + "/down.weight[1]": False},
    ),
    "cube": (lambda m, h: h * h * h, {UP_DOWN + 2 * "/down.weight[1]": True}),
    "masked": (
        lambda m, h: h.relu().masked_fill(torch.arange(6)[:, None] > 3, 0.0),
        {UP_DOWN: False},
    ),
    "scaled": (lambda m, h: 2 * h.relu() / 3, {UP_DOWN: False}),
    "gelu": (lambda m, h: F.gelu(h), {}),
    "tanh": (lambda m, h: h.tanh(), {}),
    "silu": (lambda m, h: F.silu(h), {}),
    "relu6": (lambda m, h: F.relu6(h), {}),
    "clamp above": (lambda m, h: h.clamp(min=0, max=1), {}),
    "clamp below one": (lambda m, h: h.clamp(min=-1), {}),
    "threshold at one": (lambda m, h: F.threshold(h, 1.0, 0.0), {}),
    "softplus": (lambda m, h: F.softplus(h), {}),
    "shifted": (lambda m, h: F.relu(h + 1), {}),
    "softmax": (lambda m, h: h.relu().softmax(-1), {}),
    "normalised": (lambda m, h: F.normalize(h.relu(), dim=-1), {}),
    "standardised": (lambda m, h: F.layer_norm(h.relu(), (8,)), {}),
    "read as numbers": (lambda m, h: h.relu() if float(h.sum()) > 0 else h.relu() * 2, {}),
    "an even function as well": (lambda m, h: h.relu() + h.cos(), {}),
    "compared": (lambda m, h: torch.where(h > 1, h, h * 0.5), {}),
    "added to what has its own scale": (lambda m, h: h.relu() + m.table, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_pass_numbers_scale_their_units(name):
    function, expected = FUNCTIONS[name]
    model = Net(function)
    model.register_buffer("table", torch.linspace(0, 1, 8))
    assert scalings(traced(model, X)) == expected


class Bias(nn.Module):
    """A weight that is added."""

    def __init__(self, size):
        super().__init__()
        self.value = nn.Parameter(torch.randn(size))


MODULES = {
    "PReLU": (
        Net(lambda m, h: m.act(h), act=nn.PReLU(8)), {UP_DOWN: False},
    ),
    "a weight added": (
        Net(lambda m, h: F.relu(h + m.shift.value), shift=Bias(8)),
        {UP_DOWN + " *shift.value[0]": False},
    ),
    "a gain": (
        Net(lambda m, h: F.gelu(h) * m.gain.value, gain=Bias(8)),
        {"/down.weight[1] *gain.value[0]": True},
    ),
    "a gain of a ReLU": (
        Net(lambda m, h: F.relu(h) * m.gain.value, gain=Bias(8)),
        {UP_DOWN: False, "/down.weight[1] *gain.value[0]": True},
    ),
    "one plus a gain": (
        Net(lambda m, h: F.gelu(h) * (1 + m.gain.value), gain=Bias(8)),
        {"/down.weight[1] *gain.value[0]": True},
    ),
    "one plus a gain that is read otherwise, too": (
        Net(lambda m, h: F.gelu(h) * (1 + m.gain.value) * m.gain.value.exp(), gain=Bias(8)), {},
    ),
    "divided": (
        Net(lambda m, h: F.gelu(h) / m.other(h), other=nn.Linear(8, 8)),
        {"*down.weight[1] *other.weight[0] *other.bias[0]": True},
    ),
    "both sides of a product": (
        Net(lambda m, h: F.relu(h) * m.other(h), other=nn.Linear(8, 8)),
        {
            UP_DOWN + " /other.weight[1]": False,
            "/down.weight[1] *other.weight[0] *other.bias[0]": True,
        },
    ),
    "the larger of two": (
        Net(lambda m, h: torch.maximum(h, m.other(F.gelu(h))), other=nn.Linear(8, 8)), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_weights_between_two_layers_take_their_part(name):
    model, expected = MODULES[name]
    assert scalings(traced(model, X)) == expected


def test_channels_of_convolutions_are_scaled_through_windows_and_pools():
    """A depthwise kernel may take back the numbers of the layer before it, negative ones too."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.MaxPool2d(2),
        nn.AvgPool2d(2), nn.Conv2d(6, 4, 1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    images = {"input": torch.randn(2, 3, 12, 12)}
    assert scalings(traced(model, images)) == {
        "*0.weight[0] *0.bias[0] /1.weight[0]": True,
        "*0.weight[0] *0.bias[0] *1.bias[0] /5.weight[1]": False,
        "*6.weight[0]*1 *6.bias[0]*1 /10.weight[1]*1": False,
    }


def test_layers_without_biases_and_several_readers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 8, bias=False)
            self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            h = self.up(x).relu()
            return self.a(h), self.b(h).tanh()

    assert scalings(traced(Two(), X)) == {"*up.weight[0] /a.weight[1] /b.weight[1]": False}


def test_a_weight_that_writes_and_reads_the_same_units_keeps_its_scale():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 8)

        def forward(self, x):
            return self.up(x).relu() @ self.up.weight

    assert scalings(traced(Tied(), X)) == {}


class Normed(nn.Module):
    """A residual block before or behind a norm; the stream is the output."""

    def __init__(self, *, pre):
        super().__init__()
        self.norm, self.up, self.down, self.pre = (
            nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4), pre,
        )  # fmt: skip

    def forward(self, x):
        h = self.norm(x)
        return (x if self.pre else h) + self.down(self.up(h).tanh())


def test_a_norm_whose_output_is_added_to_the_stream_keeps_its_gain():
    """And one that linear layers alone read does not, though the stream itself is pinned."""
    gain = "*norm.weight[0] *norm.bias[0] /up.weight[1]"
    assert scalings(traced(Normed(pre=True), X)) == {gain: True}
    assert scalings(traced(Normed(pre=False), X)) == {}


def test_post_norm_bert_has_none_and_a_bare_llama_has_them_on_its_pinned_stream():
    config = BertConfig(**{k: v for k, v in zoo.TEXT.items() if k != "num_labels"})
    bert = BertModel(config, add_pooling_layer=False).eval()
    assert not alloy.find_symmetries(bert, zoo.text()).diagonals
    llama = LlamaModel(LlamaConfig(**zoo.DECODER)).eval()
    spec = traced(llama, zoo.text())
    assert "embed_tokens.weight[1]" not in spec.spaces
    pinned = [d for d in spec.diagonals.values() if d.depends_on[-1] not in spec.spaces]
    assert [d.depends_on for d in pinned] == 4 * [("embed_tokens.weight[1]",)]
    assert len(spec.diagonals) == 6


# The group


@pytest.mark.parametrize("name", ["opt", "mixtral", "gemma"])
def test_transport_of_scales_is_a_group_action(name):
    """Scales follow the units that permutations of both factors of a product move."""
    model, inputs = zoo.build(name)
    spec = alloy.find_symmetries(model, inputs)
    weights = {n: t.double() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    first, second = random_transforms(spec, generator), random_transforms(spec, generator)
    moved = transport(weights, spec, first)
    one_by_one, at_once = (
        transport(moved, spec, second), transport(weights, spec, compose(first, second)),
    )  # fmt: skip
    back = transport(moved, spec, invert(first))
    for key, tensor in weights.items():
        torch.testing.assert_close(one_by_one[key], at_once[key], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back[key], tensor, rtol=1e-9, atol=1e-9)
    again = transforms_from_tensors(transforms_to_tensors(first), spec)
    for key, tensor in transport(weights, spec, again).items():
        assert torch.equal(tensor, moved[key])


def test_a_spec_keeps_its_diagonals_as_data_and_shows_them():
    model, inputs = zoo.build("opt")
    spec = alloy.find_symmetries(model, inputs)
    assert SymmetrySpec.from_json(spec.to_json()) == spec
    assert "6 diagonals" in repr(spec)
    for part in ("any number but 0", "a positive number", "model.decoder.layers.0.fc2.weight[1]"):
        assert part in str(spec)
    without = dataclasses.replace(spec, diagonals={})
    assert "diagonals" not in without.to_json()
    name = "scale of model.decoder.layers.0.fc1.weight[0]"
    assert f"diagonal {name!r} is only in the first spec" in [*differences(spec, without)]
    other = dataclasses.replace(spec.diagonals[name], any_sign=True)
    changed = dataclasses.replace(spec, diagonals={**spec.diagonals, name: other})
    assert [*differences(spec, changed)] == [
        f"diagonal {name!r} lies on other weights in the first spec than in the second"
    ]


def test_smaller_groups_and_parts_have_the_diagonals_that_are_left():
    model, inputs = zoo.build("t5")
    spec = alloy.find_symmetries(model, inputs)
    assert not with_kind(spec, "permutation").diagonals
    assert with_kind(spec, "general linear").diagonals == spec.diagonals
    part = restrict(spec, [n for n in spec.layout if "encoder.block.0" in n])
    assert len(part.diagonals) == 3  # two norms' gains, and the neurons
    llama, words = zoo.build("llama")
    spec = alloy.find_symmetries(llama, words)
    folded = fold_norms(llama.state_dict(), spec)[1]
    left = {d.depends_on[-1] for d in folded.diagonals.values()}
    assert len(folded.diagonals) == 2  # of neurons: the gains are folded
    assert "model.embed_tokens.weight[1]" not in left


def test_scales_that_do_not_fit_are_refused():
    model = Net(FUNCTIONS["relu"][0])
    spec = alloy.find_symmetries(model, X)
    name = "scale of up.weight[0]"
    fits = {"depends_on": ("up.weight[0]",)}
    ones = torch.ones(8)
    for transform, message in (
        (Transform(scale=torch.ones(7), **fits), r"has shape \(7,\) .* has \(8,\)"),
        (Transform(scale=ones), r"over \(\); the diagonal has"),
        (Transform(scale=-ones, **fits), "it must be positive"),
        (Transform(scale=0 * ones, **fits), "a zero, NaN or Inf"),
        (Transform(permutation=torch.arange(8), **fits), "a diagonal, has no scale"),
    ):
        with pytest.raises(SymmetryError, match=message):
            transport(model.state_dict(), spec, {name: transform})
    with pytest.raises(SymmetryError, match="is a scale; only diagonals have one"):
        transport(model.state_dict(), spec, {"up.weight[0]": Transform(scale=ones)})


def test_a_wrong_diagonal_is_refused_by_name():
    """GELU is no ReLU."""
    spec = alloy.find_symmetries(Net(FUNCTIONS["relu"][0]), X)
    with pytest.raises(SymmetryError, match=r"diagonal 'scale of up.weight\[0\]' is no symmetry"):
        alloy.validate(Net(FUNCTIONS["gelu"][0]), spec, X)


def test_a_basis_solves_every_equation_and_each_solution_has_a_variable_of_its_own():
    rows = [{5: 1, 0: -1, 1: -1}, {6: 1, 2: -2}, {6: 1, 3: -1}, {4: 1}]
    solutions = [*basis(rows, [4], [0, 1, 2, 3])]
    assert solutions == [{0: 1, 5: 1}, {1: 1, 5: 1}, {3: 2, 6: 2, 2: 1}]
    for solution in solutions:
        assert all(sum(f * solution.get(v, 0) for v, f in row.items()) == 0 for row in rows)


def test_numbers_read_bit_by_bit_stay():
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.down(self.up(x).view(torch.int32).view(torch.float32))

    spec = alloy.find_symmetries(Bits(), X)
    assert not spec.spaces
    assert not spec.diagonals
