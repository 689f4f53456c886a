"""Least squares, layer by layer: which sums are found, what is fitted to them, what stays as
it is.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from alloy.errors import MergeError
from alloy.merging import merge
from alloy.refit import Lesson, Teacher, fit_layers, fittable_layers, loaded
from alloy.refit.calls import CallRecorder
from alloy.refit.repair import fit_layers as repair_layers
from alloy.refit.repair import reestimate_norms


def _resnet(seed):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config).eval()


def _convnext(seed):
    torch.manual_seed(seed)
    config = ConvNextConfig(
        hidden_sizes=[6, 8], depths=[2, 2], num_stages=2, patch_size=2, num_labels=3
    )
    return _with_gains(ConvNextForImageClassification(config).eval())


def _dinov2(seed):
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8,
        mlp_ratio=2, num_labels=3,
    )  # fmt: skip
    return _with_gains(Dinov2ForImageClassification(config).eval())


def _with_gains(model):
    """LayerScale as training leaves it: of any size, not of one."""
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.data.uniform_(0.3, 1.5)
        elif parameter.ndim > 1:
            parameter.data.mul_(8)
    return model


def _gpt2(seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3, n_positions=8)
    return GPT2LMHeadModel(config).eval()


def _images(seed, num=24, size=16):
    pixels = torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return [{"pixel_values": part} for part in pixels.split([num // 3, num - num // 3])]


def _state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _mean(first, second):
    return {n: (t + second[n]) / 2 if t.is_floating_point() else t for n, t in first.items()}


class Block(nn.Module):
    """A layer, then what an architecture may put between it and the sum."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 4), kind
        self.gain = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 0.25]))
        self.positions = nn.Parameter(torch.randn(2, 3, 5, 4))

    def forward(self, x):  # [B, H, W, 4]
        y = self.layer(torch.tanh(x))
        if self.kind == "gain":
            return x + y * self.gain
        if self.kind == "number":
            return y.mul_(-3.0) + x
        if self.kind == "moved":  # ConvNeXt
            return x + (self.gain * y).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        if self.kind == "in place":
            return y.add_(x)
        if self.kind == "windows":
            return x + y.view(len(x), -1, 4).transpose(1, 2).transpose(1, 2).reshape(x.shape)
        if self.kind == "positions":
            return y + self.positions.permute(0, 1, 2, 3)
        if self.kind == "activation":
            return x + torch.relu(y)
        if self.kind == "activation in place":
            return x + y.relu_()
        assert self.kind == "of the data"
        return x + y * torch.sigmoid(x)


LINEAR = ["gain", "number", "moved", "in place", "windows"]


@pytest.mark.parametrize(
    "kind", [*LINEAR, "activation", "activation in place", "of the data", "positions"]
)
@torch.no_grad()
def test_a_sum_is_found_behind_moves_and_gains_alone(kind):
    """And a change of the stream is made by the change of the output that `made_of` names."""
    block, x = Block(kind), torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    layer = {"layer": block.layer}
    (call,) = CallRecorder(layer, layer).run(block, lambda: block(x)).calls["layer"]
    assert (call.sum is not None) == (kind in LINEAR)
    torch.testing.assert_close(call.output, block.layer(torch.tanh(x)))
    if kind in LINEAR:
        before = block(x)
        torch.testing.assert_close(call.stream(), before)
        block.layer.bias.add_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
        wanted = torch.tensor([1.0, -2.0, 3.0, 0.5]).expand_as(x)
        torch.testing.assert_close(call.made_of(block(x) - before), wanted)


class Stream(nn.Sequential):
    """Two blocks that write into one stream; "activation": into two sums with a function between
    them.
    """

    def __init__(self, kind, between=None):
        super().__init__(Block(kind), *([between] if between else []), Block(kind))


@pytest.mark.parametrize(
    ("between", "is_stream"), [(None, True), (nn.ReLU(), False), (nn.LayerNorm(4), False)]
)
@pytest.mark.parametrize("kind", LINEAR)
@torch.no_grad()
def test_a_stream_is_a_sum_that_is_added_to(kind, between, is_stream):
    model = Stream(kind, between)
    layers = {str(i): model[i].layer for i in (0, len(model) - 1)}
    recorder = CallRecorder(layers, layers).run(model, lambda: model(torch.randn(2, 3, 5, 4)))
    sums = {call.summed_as for calls in recorder.calls.values() for call in calls}
    assert len(sums) == 2
    assert recorder.streams == (sums if is_stream else set())


@pytest.mark.parametrize("kind", ["gain", "moved"])
@torch.no_grad()
def test_the_layer_before_a_gain_makes_the_stream_right(kind):
    """By hand: least squares of the teacher's stream, in which the layer's output counts gain
    times.
    """
    student, teacher = Stream(kind).double(), Stream(kind).double()
    x = torch.randn(4, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher[1].gain.mul_(0.7).add_(0.1)
    lesson = Lesson([Teacher(teacher)], [{"input": part} for part in x.split([1, 3])])
    fit_layers(student, [lesson], ridge=0.0)
    stream = student[0](x)
    samples = torch.tanh(stream).flatten(0, 2)
    affine = torch.cat([samples, torch.ones(len(samples), 1)], 1)
    wanted = (teacher(x) - stream).flatten(0, 2) / student[1].gain
    solution = torch.linalg.lstsq(affine, wanted).solution
    torch.testing.assert_close(student[1].layer.weight, solution[:4].T)
    torch.testing.assert_close(student[1].layer.bias, solution[4])


@torch.no_grad()
def test_of_two_layers_that_write_one_sum_the_last_corrects_it():
    """Both would correct the same error twice."""

    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            y = self.first(torch.tanh(x)) + self.second(torch.relu(x))
            return self.third(torch.tanh(y)) + y

    student, teacher = Parallel().double(), Parallel().double()
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = teacher.first(torch.tanh(x))
    fit_layers(student, [Lesson([Teacher(teacher)], [{"x": x}])], ridge=0.0)
    torch.testing.assert_close(student.first(torch.tanh(x)), other)
    torch.testing.assert_close(student(x), teacher(x))


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@torch.no_grad()
def test_a_convolution_of_any_groups_is_found_again(groups, padding_mode):
    """The teacher's own weights are the least-squares solution on its own inputs, whatever one
    starts from.
    """
    settings = {"kernel_size": 3, "stride": 2, "padding": "valid" if groups == 2 else (1, 2)}
    settings |= {
        "dilation": 2,
        "groups": groups,
        "padding_mode": padding_mode,
        "dtype": torch.float64,
    }
    student, teacher = (nn.Sequential(nn.Conv2d(6, 12, **settings)) for _ in range(2))
    x = torch.randn(40, 6, 9, 8, dtype=torch.float64)
    fit_layers(student, [Lesson([Teacher(teacher)], [{"input": x}])], ridge=0.0)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor)


@torch.no_grad()
def test_each_group_is_a_regression_of_its_own():
    """A grouped convolution is fitted as its groups are, one convolution each; the ridge of each is
    its own.
    """
    torch.manual_seed(0)
    student, teacher = (nn.Conv2d(6, 4, 3, groups=2, dtype=torch.float64) for _ in range(2))
    x = (
        torch.randn(5, 6, 6, 6, dtype=torch.float64)
        * torch.tensor([1.0] * 3 + [9.0] * 3)[:, None, None]
    )
    parts = []
    for group in range(2):
        halves = []
        for conv in (student, teacher):
            half = nn.Conv2d(3, 2, 3, dtype=torch.float64)
            half.weight.copy_(conv.weight[2 * group : 2 * group + 2])
            half.bias.copy_(conv.bias[2 * group : 2 * group + 2])
            halves.append(nn.Sequential(half))
        own = [{"input": x[:, 3 * group : 3 * group + 3]}]
        fit_layers(halves[0], [Lesson([Teacher(halves[1])], own)], ridge=0.5)
        parts.append(halves[0][0].weight)
    whole = nn.Sequential(student)
    fit_layers(whole, [Lesson([Teacher(nn.Sequential(teacher))], [{"input": x}])], ridge=0.5)
    torch.testing.assert_close(student.weight, torch.cat(parts))


@pytest.mark.parametrize("make", [_resnet, _convnext, _dinov2])
def test_equal_models_of_convolutions_stay_as_they_are(make):
    """Residual sums, LayerScale, depthwise convolutions and batch norms: nothing to repair, nothing
    changed.
    """
    model, data = make(0), _images(0)
    weights = reestimate_norms(model, _state(model), data)
    merged = merge(
        "sequential", [weights] * 2, module=model, batches=[data, _images(1)], ridge=1e-3
    )
    repaired = repair_layers(model, weights, {"a": weights, "b": weights}, data, residual=True)
    for name, tensor in weights.items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(repaired[name], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [_resnet, _convnext, _dinov2])
def test_models_of_convolutions_merge_sequentially(make):
    """Nearer to each model on its own data than their average with fresh batch norms, by far."""
    models, data = [make(0), make(1)], [_images(0, 48), _images(1, 48)]
    weights = [_state(m) for m in models]
    average = reestimate_norms(models[0], _mean(*weights), data[0] + data[1])
    merged = merge("sequential", weights, module=models[0], batches=data)

    @torch.no_grad()
    def distance(found):
        student = make(0)
        student.load_state_dict(found)
        return sum(
            float(F.mse_loss(student(**b).logits, m(**b).logits))
            for m, own in zip(models, data, strict=True)
            for b in own
        )

    assert distance(merged) < 0.7 * distance(average)


@pytest.mark.parametrize("make", [_convnext, _dinov2])
@torch.no_grad()
def test_layers_in_front_of_gains_follow_the_stream(make):
    """Every block's last layer is fitted to its sum: the stream ends nearer to the teacher's than
    without.
    """
    student, teacher, data = make(0), make(1), _images(0, 48)

    def distance(residual):
        found = repair_layers(
            student, _state(student), {"a": _state(teacher)}, data, residual=residual
        )
        fitted = make(0)
        fitted.load_state_dict(found)
        outputs = [
            (fitted(**b, output_hidden_states=True), teacher(**b, output_hidden_states=True))
            for b in data
        ]
        return sum(float(F.mse_loss(a.hidden_states[-1], b.hidden_states[-1])) for a, b in outputs)

    assert distance(residual=True) < 0.9 * distance(residual=False)


@pytest.mark.parametrize("residual", [True, False])
def test_repairing_on_shared_data_is_merging_sequentially(residual):
    """The mean of the parents' targets has the regression of all targets."""
    models, data = [_dinov2(0), _dinov2(1)], _images(0)
    weights = [_state(m) for m in models]
    merged = merge("sequential", weights, module=models[0], batches=[data] * 2, residual=residual)
    repaired = repair_layers(
        models[0], _mean(*weights), dict(zip("ab", weights, strict=True)), data, residual=residual
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(repaired[name], tensor, atol=2e-3, rtol=2e-3)


def test_tied_layers_stay_the_average():
    """A head that is the embedding: fitting it would change what every layer before it reads."""
    models = [_gpt2(0), _gpt2(1)]
    assert "lm_head" not in fittable_layers(models[0])
    data = [{"input_ids": torch.arange(16).view(2, 8)}]
    weights = [_state(m) for m in models]
    merged = merge("sequential", weights, module=models[0], batches=[data] * 2)
    torch.testing.assert_close(merged["lm_head.weight"], _mean(*weights)["lm_head.weight"])
    attention = "transformer.h.0.attn.c_attn.weight"
    assert (merged[attention] - _mean(*weights)[attention]).abs().max() > 1e-3


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_fitted_on_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x, y):
            return self.layer(x) * self.layer(y)

    student, teacher = Twice(), Twice()
    x, y = torch.randn(2, 2, 3, dtype=torch.float64)  # two of each: one call does not determine it
    fit_layers(student, [Lesson([Teacher(teacher)], [{"x": x, "y": y}])], ridge=0.0)
    torch.testing.assert_close(student.layer.weight, teacher.layer.weight)


def test_what_cannot_be_fitted_is_refused():
    model = _dinov2(0)
    weights = _state(model)
    with pytest.raises(MergeError, match="set residual to false, or inputs to 'merged'"):
        repair_layers(model, weights, {"a": weights}, _images(0), residual=True, inputs="parents")
    lesson = Lesson([Teacher(model, {"classifier": "classifier", "nothing": "x"})], _images(0))
    with pytest.raises(MergeError, match=r"no layers to fit called \['nothing'\]"):
        fit_layers(model, [lesson])
    pair = [Teacher(model, {"classifier": "classifier"}), Teacher(model, {})]
    with pytest.raises(MergeError, match="teachers of one lesson have different layers"):
        fit_layers(model, [Lesson(pair, _images(0))])


def test_weights_without_a_buffer_are_refused():
    """A batch norm whose statistics are not given would keep the module's own, without a word."""
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert loaded(module, module.state_dict()).training is False
    with pytest.raises(MergeError, match=r"they lack \['1.running_mean'"):
        loaded(module, dict(module.named_parameters()))
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False)] * 2)
    loaded(tied, {"0.weight": torch.eye(2)})
