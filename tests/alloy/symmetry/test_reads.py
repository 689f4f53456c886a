"""A weight reads the spaces that it contracts with its input, and writes all others."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import alloy
from alloy.symmetry import SymmetrySpec

SIZE = 12


def _bert():
    config = BertConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=3,
        max_position_embeddings=SIZE,
    )
    return BertForMaskedLM(config).eval()


def _gpt2():
    sizes = dict.fromkeys(("vocab_size", "n_embd", "n_positions", "n_inner"), SIZE)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=3, tie_word_embeddings=False, **sizes, **tokens)
    ).eval()


class _Convolutions(nn.Module):
    """Every way a convolution meets channels: plain, per channel, in groups, transposed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.first(x)))
        return self.last(torch.relu(self.up(torch.relu(self.grouped(x))))).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "inputs", "reading", "both"),
    [
        (
            _bert(),
            {"input_ids": torch.arange(SIZE).reshape(3, 4)},
            {"query.weight[1]", "key.weight[1]", "value.weight[1]", "transform.dense.weight[1]"},
            {"word_embeddings.weight[1]"},
        ),
        (
            _gpt2(),
            {"input_ids": torch.arange(SIZE).reshape(3, 4)},
            {"c_attn.weight[0]", "c_fc.weight[0]", "c_proj.weight[0]", "lm_head.weight[1]"},
            set(),
        ),
        (
            _Convolutions(),
            {"x": torch.randn(2, 3, 9, 9)},
            {"grouped.weight[1]", "up.weight[0]", "last.weight[1]"},
            set(),
        ),
    ],
    ids=["bert", "gpt2", "convolutions"],
)
def test_a_weight_reads_along_the_dims_that_are_contracted_with_the_input(
    model, inputs, reading, both
):
    spec = alloy.find_symmetries(model, inputs)
    for part in reading | both:
        assert any(part in axis for axis in spec.reading), part
    assert {".".join(axis.split(".")[-2:]) for axis in spec.both} == both
    writers = [str(a) for s in spec.spaces.values() for a in s.axes if str(a) not in spec.reading]
    assert any(axis.startswith(("depthwise.weight[0]", "bert", "transformer")) for axis in writers)
    assert not any(part in axis for axis in writers for part in reading)


def test_where_a_matrix_acts_readers_take_the_inverse_of_what_writers_take():
    """The values of a head: the two roles are the two variances, whichever is called +1."""
    spec = alloy.find_symmetries(_bert(), {"input_ids": torch.arange(SIZE).reshape(3, 4)})
    (values,) = [s for n, s in spec.spaces.items() if "value" in n and s.kind == "general linear"]
    roles = {(str(axis) in spec.reading, axis.variance) for axis in values.axes}
    assert len(roles) == 2
    assert len({variance for _, variance in roles}) == 2


def test_roles_survive_json():
    spec = alloy.find_symmetries(_bert(), {"input_ids": torch.arange(SIZE).reshape(3, 4)})
    again = SymmetrySpec.from_json(spec.to_json())
    assert (again.reading, again.both) == (spec.reading, spec.both)
    assert spec.reading
