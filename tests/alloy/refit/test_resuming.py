"""Passes that go on behind fitted blocks fit the very same bits as passes from the start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from alloy.refit import Lesson, Teacher, fit_layers, least_squares, resuming
from alloy.refit.resuming import Resuming

GENERATOR = torch.Generator().manual_seed(5)


def _words(num, length=7):
    ids = torch.randint(20, (num, length), generator=GENERATOR)
    lengths = torch.randint(3, length + 1, (num, 1), generator=GENERATOR)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


def _pairs(num):
    return {**_words(num), "decoder_input_ids": torch.randint(20, (num, 5), generator=GENERATOR)}


def _pixels(num):
    return {"pixel_values": torch.randn(num, 3, 16, 16, generator=GENERATOR)}


def _bert(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 3}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=3)).eval()


def _gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=12, n_layer=3, n_head=3)).eval()


def _t5(seed):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=20, d_model=12, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=3
    )
    return T5ForConditionalGeneration(config).eval()


def _resnet(seed):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[2, 2], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config).eval()


class Backward(nn.Module):
    """A chain whose last layer reads the first block's output, too, past a list of blocks."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(3))
        self.mid, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        first = self.blocks[0](x)
        return self.out(self.mid(self.blocks[2](self.blocks[1](first))) * first)


def _vectors(num):
    return {"x": torch.randn(num, 6, generator=GENERATOR)}


MODELS = {
    "bert": (_bert, _words),
    "gpt2": (_gpt2, _words),
    "t5": (_t5, _pairs),
    "resnet": (_resnet, _pixels),
    "one that reads backward": (Backward, _vectors),
}


def _fitted(model, inputs, **options):
    teachers = [Teacher(model(1)), Teacher(model(2))]
    student = copy.deepcopy(teachers[0].module)
    progress = []
    batches = [inputs(num) for num in (6, 5, 6)]
    GENERATOR.manual_seed(5)
    fit_layers(student, [Lesson(teachers, batches)], progress=lambda *x: progress.append(x))
    assert progress == [(i + 1, len(progress)) for i in range(len(progress))]
    return student.state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_resumed_passes_fit_the_same_bits(name, monkeypatch):
    resumed = _fitted(*MODELS[name])
    monkeypatch.setattr(Resuming, "finished", lambda self: [])
    monkeypatch.setattr(least_squares, "TARGETS_BYTES", 0)
    whole = _fitted(*MODELS[name])
    start = MODELS[name][0](1).state_dict()
    assert any(not torch.equal(whole[key], start[key]) for key in whole)
    for key in whole:
        assert torch.equal(whole[key], resumed[key]), key


@pytest.mark.parametrize("room", [2**30, 2000, 0])
def test_a_linear_layer_is_computed_again_after_a_change_alone(monkeypatch, room):
    """Of a block that is run again for each of its layers, and with the same bits."""
    calls = []
    linear = F.linear

    class Chain(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(
                nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))) for _ in range(5)
            )

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    monkeypatch.setattr(resuming, "OUTPUTS_BYTES", room)
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(1) or linear(*a))
    fitted = _fitted(Chain, _vectors)
    num_calls = len(calls)
    monkeypatch.setattr(Resuming, "_answer", lambda self, name, batch, compute, x: compute(x))
    calls.clear()
    plain = _fitted(Chain, _vectors)
    assert all(torch.equal(fitted[name], plain[name]) for name in plain)
    assert num_calls < 0.87 * len(calls) if room > 2000 else num_calls <= len(calls)


def test_a_fit_costs_a_block_a_layer_and_the_teachers_one_pass(monkeypatch):
    """Eight blocks of two layers: 4 calls of a block for each, and not half a model for each."""
    calls = {"student": 0, "teacher": 0}

    class Chain(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)) for _ in range(8)
            )

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    teacher, student = Chain(1), Chain(2)
    for name, module in (("student", student), ("teacher", teacher)):
        for block in module.blocks:
            block[0].register_forward_hook(
                lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
            )
    batches = [_vectors(20) for _ in range(10)]
    fit_layers(student, [Lesson([Teacher(teacher)], batches)])
    assert calls["teacher"] == 1 + 10 + 8 * 10 - 1  # the first layer alone: no size is known yet
    # each block: for its first layer, its second, and once fitted; one batch whole to check
    assert calls["student"] <= 8 * 10 * 3 + 8 * 8 + 8


def test_a_model_that_reads_backward_is_run_whole():
    student = Backward(1)
    lesson = Lesson([Teacher(Backward(2))], [_vectors(9), _vectors(9)])
    studies = []
    init = least_squares._Study.__init__

    def kept(self, *args):
        init(self, *args)
        studies.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares._Study, "__init__", kept)
        fit_layers(student, [lesson])
    assert not studies[0].passes.works
