"""What is free is found free: windows, folds, triangular systems, tables, routing by indices.

Each kind of operation on models of the real architectures, and by itself where it must pin.
"""

import pytest
import torch
import transformers as hf
from torch import nn

import alloy

N, H = 16, 4
TEXT = {
    "vocab_size": N,
    "hidden_size": N,
    "intermediate_size": N,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}


def ids(low=3, high=N):
    return torch.randint(low, high, (2, N), generator=torch.Generator().manual_seed(0))


def words():
    return {"input_ids": ids()}


def longformer():
    # No `bos` and `eos`: the tokens of `TEXT` are none of Longformer's.
    sizes = {k: v for k, v in TEXT.items() if k not in ("bos_token_id", "eos_token_id")}
    config = hf.LongformerConfig(**sizes, attention_window=[8, 8])
    return hf.LongformerForMaskedLM(config), words()


def falcon_h1():
    config = hf.FalconH1Config(
        **GROUPED,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
        ssm_multipliers=[0.5, 1.5, 0.7, 2.0, 1.2],
    )
    return hf.FalconH1ForCausalLM(config), words()


def qwen3_next():
    config = hf.Qwen3NextConfig(
        **GROUPED,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=N,
        shared_expert_intermediate_size=N,
    )
    return hf.Qwen3NextForCausalLM(config), words()


def phimoe():
    config = hf.PhimoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return hf.PhimoeForCausalLM(config), words()


def mobilevitv2():
    config = hf.MobileViTV2Config(
        image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], num_labels=N
    )
    generator = torch.Generator().manual_seed(0)
    model = hf.MobileViTV2ForImageClassification(config)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64, generator=generator)}


def idefics3():
    config = hf.Idefics3Config(
        image_token_id=15,
        scale_factor=2,
        vision_config={
            "hidden_size": N,
            "intermediate_size": N,
            "num_hidden_layers": 1,
            "num_attention_heads": H,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config={"model_type": "llama", **GROUPED, "num_hidden_layers": 1},
    )
    tokens = ids(high=14)
    tokens[:, :4] = 15
    generator = torch.Generator().manual_seed(0)
    return hf.Idefics3ForConditionalGeneration(config), {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, 1, 3, 16, 16, generator=generator),
        "pixel_attention_mask": torch.ones(2, 1, 16, 16, dtype=torch.long),
    }


def qwen25_vl():
    config = hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": N,
            "intermediate_size": N,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": N,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **GROUPED,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 10000.0,
            },
        },
        image_token_id=15,
        video_token_id=14,
        vision_start_token_id=13,
    )
    tokens = ids(high=12)
    tokens[:, 0], tokens[:, 1:5] = 13, 15
    types = torch.zeros_like(tokens)
    types[:, 1:5] = 1
    generator = torch.Generator().manual_seed(0)
    return hf.Qwen2_5_VLForConditionalGeneration(config), {
        "input_ids": tokens,
        "pixel_values": torch.randn(32, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": types,
    }


# Architecture -> spaces; a part of a weight's name whose units must be among them.
ARCHITECTURES = {
    longformer: (9, ".attention.self.query"),  # windows by as_strided
    falcon_h1: (17, ".mamba.in_proj"),  # multipliers equal within each segment
    qwen3_next: (15, ".linear_attn.in_proj"),  # a triangular system a chunk
    phimoe: (13, ".mlp.experts"),  # two indices, concatenated
    mobilevitv2: (23, ".transformer.layer.0"),  # col2im
    idefics3: (11, "vision_model.embeddings.patch_embedding"),  # pixel shuffle by views
    qwen25_vl: (15, "visual.blocks.0.attn.qkv"),  # rotary tables chosen by windows
}


@pytest.mark.filterwarnings("ignore:the example inputs reach")
@pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)
def test_nothing_is_pinned_for_want_of_a_rule(make):
    torch.manual_seed(0)
    model, inputs = make()
    model = model.eval()
    spec = alloy.find_symmetries(model, inputs)
    count, part = ARCHITECTURES[make]
    assert not spec.unknown_operations
    assert len(spec.spaces) == count
    assert any(part in axis.parameter for space in spec.spaces.values() for axis in space.axes)
    assert alloy.validate(model, spec, inputs).worst_change < 1e-10


class Net(nn.Module):
    def __init__(self, between, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(width, 3)
        self.between = between

    def forward(self, x):
        return self.down(self.between(self.up(x)))


ONES = torch.ones(2, 6, 1, dtype=torch.long)


def windows(h, dim):
    """Overlapping windows over tokens (1) or units (2) of h [2, 6, 8]."""
    shape, strides = [*h.shape], [*h.stride()]
    shape[dim] = h.shape[dim] // 2 - 1
    shape.insert(dim + 1, 4)
    strides.insert(dim + 1, strides[dim])
    strides[dim] *= 2
    return h.as_strided(shape, strides).sum(dim + 1)


def heads_apart(h):
    return h.as_strided((2, 2, 6, 4), (48, 4, 8, 1)).sum(1)


def folded(h):
    image = h.transpose(1, 2).reshape(2, 8, 2, 3)
    columns = nn.functional.unfold(image, 2, padding=1) ** 2
    return nn.functional.fold(columns, (2, 3), 2, padding=1).flatten(2).transpose(1, 2)


def solved(h, left=True, units=False):
    matrix = torch.eye(8 if units else 6) + torch.tril(h @ h.mT if not units else h.mT @ h, -1)
    return torch.linalg.solve_triangular(matrix, h, upper=False, left=left)


def shuffled(h):
    """Two of the six tokens go into the units: each keeps its own copy of them."""
    return (h.view(2, 3, 2, 8) * 2).view(2, 3, 16)


def cut_then_shuffled(h):
    return shuffled(h + h[:, :1] * torch.arange(6.0)[:, None])


OPERATIONS = {
    "windows over tokens": (lambda h: windows(h, 1), [8]),
    "windows over units": (lambda h: windows(h, 2), []),
    "heads side by side": (heads_apart, []),
    "a transposed view": (lambda h: h.as_strided((2, 8, 6), (48, 1, 8)).mT + h, [8]),
    "a shifted view": (lambda h: h.flatten().as_strided((2, 6, 8), (48, 8, 1), 0) + h, [8]),
    "across two dims": (lambda h: h.as_strided((2, 5, 8), (48, 9, 1)), []),
    "fold": (folded, [8]),
    "triangular over tokens": (solved, [8]),
    "triangular over units": (lambda h: solved(h, left=False, units=True), []),
    "pixels into channels": (shuffled, [8]),
    "pixels after a cut": (cut_then_shuffled, [8]),
    "two winners": (lambda h: _by_experts(h, torch.cat), [8]),
    "two winners stacked": (lambda h: _by_experts(h, torch.stack), [8]),
    "winners and numbers": (lambda h: _gather(h, [h.argmax(-1, True), ONES]), []),
}  # fmt: skip


def _by_experts(h, join):
    first = h.argmax(-1, keepdim=True)
    second = h.masked_fill(nn.functional.one_hot(first[..., 0], 8).bool(), -9).argmax(-1, True)
    indices = join([first, second], -1)
    return _gather(h, [indices.flatten(2)])


def _gather(h, indices):
    return h.gather(-1, torch.cat(indices, -1)).sum(-1, keepdim=True) * h


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_pins_what_it_reads_in_order_and_nothing_else(name):
    between, sizes = OPERATIONS[name]
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 6, 4)}
    with torch.no_grad():
        width = between(torch.randn(2, 6, 8)).shape[-1]
    model = Net(between, width)
    spec = alloy.find_symmetries(model, inputs)
    assert [space.size for space in spec.spaces.values()] == sizes
    assert not spec.unknown_operations
    alloy.validate(model, spec, inputs)


class Scaled(nn.Module):
    def __init__(self, table, write=False):
        super().__init__()
        self.up, self.down, self.write = nn.Linear(4, 8), nn.Linear(8, 3), write
        self.register_buffer("table", torch.tensor(table), persistent=False)

    def forward(self, x):
        if self.write:
            self.table[:1] = 3
        return self.down(torch.relu(self.up(x) * self.table))


@pytest.mark.parametrize(
    ("table", "write", "sizes"),
    [
        ([2.0] * 8, False, [8]),
        ([2.0] * 3 + [5.0] * 5, False, [3, 5]),
        ([2.0] * 3 + [1.0, 7.0] + [5.0] * 3, False, [3, 3]),
        ([1.0, 2.0] * 4, False, []),
        ([2.0] * 8, True, []),
    ],
)
def test_units_are_free_among_those_that_a_constant_treats_alike(table, write, sizes):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4)}
    model = Scaled(table, write)
    spec = alloy.find_symmetries(model, inputs)
    assert [space.size for space in spec.spaces.values()] == sizes
    alloy.validate(model, spec, inputs)


class Rotated(nn.Module):
    """Queries and keys whose rotary tables are chosen by position."""

    def __init__(self, choose):
        super().__init__()
        self.query, self.key = nn.Linear(4, 8), nn.Linear(4, 8)
        self.choose = choose

    def forward(self, x):
        angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.02])
        table = self.choose(torch.cat([angles, angles], -1))
        q, k = (self._turn(h, table.cos(), table.sin()) for h in (self.query(x), self.key(x)))
        return (q @ k.mT).softmax(-1) @ x

    @staticmethod
    def _turn(h, cos, sin):
        return h * cos + torch.cat([-h[..., 4:], h[..., :4]], -1) * sin


ORDER = torch.tensor([3, 1, 0, 5, 4, 2])


@pytest.mark.parametrize(
    ("choose", "kinds"),
    [
        (lambda table: table[ORDER], ["rotary"]),
        (lambda table: table.index_select(0, ORDER), ["rotary"]),
        (lambda table: nn.functional.embedding(ORDER, table), ["rotary"]),
        (lambda table: table.view(2, 3, 8)[torch.tensor([1, 0])].view(6, 8), ["rotary"]),
        (lambda table: table.view(2, 3, 8)[:, torch.tensor([2, 0, 1])].view(6, 8), ["rotary"]),
        (lambda table: table[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])], []),
    ],
)
def test_rotary_tables_may_be_chosen_by_position_but_not_by_unit(choose, kinds):
    torch.manual_seed(0)
    model, inputs = Rotated(choose), {"x": torch.randn(2, 6, 4)}
    spec = alloy.find_symmetries(model, inputs)
    assert [space.kind for space in spec.spaces.values()] == kinds
    alloy.validate(model, spec, inputs)


class Routed(Net):
    """One expert's gate for each token, in a model that also reads numbers of its input."""

    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        h = self.up(x)
        return self.down(h * nn.functional.one_hot(h.argmax(-1), num_classes=8))


def test_one_hot_codes_count_along_the_units_where_real_tensors_are_traced_too():
    torch.manual_seed(0)
    model, inputs = Routed(None), {"x": torch.randn(2, 6, 4)}
    spec = alloy.find_symmetries(model, inputs)
    assert [space.size for space in spec.spaces.values()] == [8]
    alloy.validate(model, spec, inputs)
