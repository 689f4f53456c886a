"""Sequential least squares: what it leaves alone, what it minimises, what it refuses."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from alloy.errors import MergeError
from alloy.merging import merge
from alloy.refit import Lesson, Teacher, fit_layers

SIZES = {"vocab_size": 40, "num_labels": 3}


def bert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        **SIZES,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).eval()


def gpt2(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


class Residual(nn.Module):
    """Two residual layers behind a fixed start: small enough to solve by hand."""

    def __init__(self, *, in_place: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.in_place = in_place

    def forward(self, x):
        stream = x
        for layer in (self.first, self.second):
            update = layer(torch.tanh(stream))
            stream = update.add_(stream) if self.in_place else stream + update
        return stream


def data(seed: int, size: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (size, 10), generator=generator)
    mask = (torch.arange(10) < torch.randint(4, 11, (size, 1), generator=generator)).long()
    half = size // 2
    return [
        {"input_ids": ids[part], "attention_mask": mask[part]}
        for part in (slice(half), slice(half, None))
    ]


def vectors(seed: int, num: int = 60) -> list[dict]:
    torch.manual_seed(seed)
    return [{"x": torch.randn(num, 4, dtype=torch.float64)} for _ in range(2)]


def state(module: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("make", [bert, gpt2])
def test_equal_models_stay_as_they_are(make):
    """Merging a model with itself returns it: post-norm and pre-norm, Linear and Conv1D, tied
    heads.
    """
    model = make(0)
    merged = merge(
        "sequential", [state(model)] * 2, module=model, batches=[data(1), data(2)], ridge=1e-3
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_first_layer_is_the_least_squares_fit_of_all_outputs():
    """By hand: normal equations over both models' tokens, affine; the ridge leans to the average,
    bias free.
    """
    models = [Residual().double() for _ in range(2)]
    batches = [vectors(1), vectors(2)]
    for ridge in (0.0, 0.5):
        merged = merge(
            "sequential",
            [state(m) for m in models],
            module=models[0],
            batches=batches,
            ridge=ridge,
        )
        x = torch.cat([torch.tanh(b["x"]) for part in batches for b in part])
        y = torch.cat(
            [m.first(torch.tanh(b["x"])) for m, p in zip(models, batches, strict=True) for b in p]
        )
        start = (models[0].first.weight + models[1].first.weight) / 2
        z = x - x.mean(0)
        second = z.T @ z / len(x)
        floor = ridge * second.diagonal().mean() * torch.eye(4, dtype=torch.float64)
        wanted = (y.T @ z / len(x) + start @ floor) @ torch.linalg.inv(second + floor)
        torch.testing.assert_close(merged["first.weight"], wanted)
        torch.testing.assert_close(merged["first.bias"], y.mean(0) - wanted @ x.mean(0))


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_a_residual_layer_fits_the_stream_with_its_error_so_far(in_place):
    """The second layer's target is each model's stream minus the merged model's own, by hand."""
    torch.manual_seed(3)
    models = [Residual(in_place=in_place).double() for _ in range(2)]
    batches = [vectors(1), vectors(2)]
    arguments = {"module": models[0], "batches": batches, "ridge": 0.0}
    merged = merge("sequential", [state(m) for m in models], **arguments)
    plain = merge("sequential", [state(m) for m in models], residual=False, **arguments)
    inputs, targets = [], []
    for model, part in zip(models, batches, strict=True):
        for batch in part:
            stream = batch["x"] + torch.nn.functional.linear(
                torch.tanh(batch["x"]), merged["first.weight"], merged["first.bias"]
            )
            inputs.append(torch.tanh(stream))
            targets.append(model(batch["x"]) - stream)
    wanted = torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution.T
    torch.testing.assert_close(merged["second.weight"], wanted)
    assert (plain["second.weight"] - wanted).abs().max() > 1e-3


def test_padding_does_not_count():
    models = [bert(0), bert(1)]
    weights = [state(m) for m in models]
    batches = [data(1), data(2)]
    other = [
        [
            {**b, "input_ids": torch.where(b["attention_mask"].bool(), b["input_ids"], 7)}
            for b in part
        ]
        for part in batches
    ]
    before = state(models[0])
    merged = merge("sequential", weights, module=models[0], batches=batches)
    again = merge("sequential", weights, module=models[0], batches=other)
    for name, tensor in merged.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in models[0].state_dict().items())


def test_it_beats_regmean_plus_plus_on_the_models_own_outputs():
    """What it is for: hidden states of the merged model near those of each model on its data."""
    models = [bert(0), bert(1)]
    weights = [state(m) for m in models]
    batches = [data(1, 60), data(2, 60)]
    blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    arguments = {"module": models[0], "batches": batches}

    @torch.no_grad()
    def distance(merged):
        student = bert(0)
        student.load_state_dict(merged)
        return sum(
            (m.bert(**b).last_hidden_state - student.bert(**b).last_hidden_state)[
                b["attention_mask"].bool()
            ]
            .square()
            .mean()
            for m, part in zip(models, batches, strict=True)
            for b in part
        )

    sequential = distance(merge("sequential", weights, **arguments))
    stepwise = distance(merge("regmean_plus_plus", weights, blocks=blocks, **arguments))
    assert sequential < 0.9 * stepwise


def test_layers_that_read_one_tensor_are_fitted_in_one_pass():
    """Queries, keys and values share a pass; the order is that of the forward."""
    student, teachers = bert(0), [bert(1), bert(2)]
    passes = []

    class Counted(list):
        def __iter__(self):
            passes.append(None)
            return super().__iter__()

    order = fit_layers(student, [Lesson([Teacher(t)], Counted(data(1))) for t in teachers])
    assert [n.rpartition(".")[2] for n in order[:6]] == ["query", "key", "value"] + ["dense"] * 3
    layers = 2 * 6 + 2  # pooler and classifier behind two blocks
    groups = layers - 2 * 2
    assert len(passes) == 2 * (groups + 1)  # one more for the trace


def test_refusals():
    weights = [state(bert(0)), state(bert(1))]
    module = bert(0)
    with pytest.raises(MergeError, match="1 iterables for 2 models"):
        merge("sequential", weights, module=module, batches=[data(1)])
    with pytest.raises(MergeError, match="has no batches"):
        merge("sequential", weights, module=module, batches=[data(1), []])
    with pytest.raises(MergeError, match=r"not the architecture.*lack \['second.weight'\]"):
        merge(
            "sequential",
            [{"first.weight": torch.ones(4, 4), "first.bias": torch.ones(4)}] * 2,
            module=Residual(),
            batches=[vectors(1)] * 2,
        )
    broken = Residual().double()
    with torch.no_grad():
        broken.first.weight.fill_(float("inf"))
    with pytest.raises(MergeError, match="NaN or Inf"):
        merge("sequential", [state(broken)] * 2, module=broken, batches=[vectors(1)] * 2)
    alone = [{"x": torch.ones(3, 4, dtype=torch.float64)}]
    model = Residual().double()
    with pytest.raises(MergeError, match="set a ridge above 0"):
        merge("sequential", [state(model)] * 2, module=model, batches=[alone] * 2, ridge=0.0)
    uneven = {"*.bias": [1.0, 3.0], "*": [1.0, 1.0]}
    with pytest.raises(MergeError, match="give one for both"):
        merge("sequential", weights, module=module, batches=[data(1), data(2)], coefficients=uneven)
