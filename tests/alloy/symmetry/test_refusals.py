"""Never wrong, never silent: what cannot be traced is refused in our words, doubts are warnings."""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import prune

import alloy
from alloy.errors import SymmetryError

N, H = 16, 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def quantised():
    return torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})


def packed():
    model = Net()
    model.up.weight = nn.Parameter(torch.ones(8, 4, dtype=torch.int8), requires_grad=False)
    return model


def pruned():
    model = Net()
    prune.l1_unstructured(model.up, "weight", 0.5)
    return model


def sparse():
    model = Net()
    model.register_buffer("adjacency", torch.eye(2).to_sparse())
    return model


class Flex(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.inner(x).view(1, 2, 2, 8).transpose(1, 2)
        return self.out(flex_attention(h, h, h).transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore")  # torch warns of its own quantisation and sparse tensors
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (quantised, r"module 'up' \(Linear\) is quantised: load the model in float32"),
        (packed, r"'weight' of module 'up' \(Linear\) holds whole numbers \(torch.int8\)"),
        (pruned, r"is pruned: make it permanent with torch.nn.utils.prune.remove"),
        (sparse, r"'adjacency' .* is sparse \(torch.sparse_coo\): make it dense"),
        (lambda: nn.Sequential(nn.LazyLinear(8)), r"has no shape yet: run the model once"),
        (Flex, r"flex_attention in .*set attention to 'sdpa' or 'eager'"),
        (lambda: torch.jit.script(Net()), r"is TorchScript: pass the Python module"),
    ],
)
def test_models_that_no_log_can_show_are_refused_in_our_words(make, message):
    inputs = {"x": torch.randn(2, 4)}
    with pytest.raises(SymmetryError, match=message):
        alloy.find_symmetries(make(), inputs)


def patch_tst():
    config = hf.PatchTSTConfig(
        num_input_channels=3,
        context_length=N,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
        d_model=N,
        num_attention_heads=H,
        ffn_dim=N,
        num_hidden_layers=1,
    )
    torch.manual_seed(0)
    model = hf.PatchTSTForPrediction(config).eval()
    return model, {"past_values": torch.randn(2, N, 3)}


def test_heads_are_observed_by_default_whatever_they_are_called():
    """PatchTST's `prediction_outputs`; `loc` and `scale`, which no weight reaches, do not count."""
    model, inputs = patch_tst()
    spec = alloy.find_symmetries(model, inputs)
    assert len(spec.spaces) >= 4
    assert alloy.validate(model, spec, inputs).worst_change < 1e-9


def test_outputs_that_no_weight_reaches_are_refused():
    model, inputs = patch_tst()
    with pytest.raises(
        SymmetryError, match=r"no weight reaches the observed outputs .* inputs alone"
    ):
        alloy.find_symmetries(model, inputs, observe=lambda output: [output.loc, output.scale])


class Towers(Net):
    """A small part in use, a large one beside it."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(100, 100)


def test_most_weights_unused_is_a_warning():
    with pytest.warns(UserWarning, match="reach 4 of 6 weights .* one for each part of the model"):
        spec = alloy.find_symmetries(Towers(), {"x": torch.randn(2, 4)})
    assert len(spec.warnings) == 1
    assert set(spec.unused) == {"other.weight", "other.bias"}


def mini_max():
    config = hf.MiniMaxConfig(
        hidden_size=N,
        intermediate_size=N,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=2,
        head_dim=H,
        vocab_size=N,
        num_local_experts=2,
        block_size=32,
        layer_types=["linear_attention", "full_attention"],
    )
    torch.manual_seed(0)
    return hf.MiniMaxForCausalLM(config).eval()


@torch.no_grad()
def cached_logits(model, ids):
    cache = model(ids[:, :6], use_cache=True).past_key_values
    steps = []
    for i in range(6, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(steps, 1)


def test_tables_of_the_configuration_keep_their_order_where_another_path_reads_their_siblings():
    """Linear attention: heads lie on `query_decay`; cached decoding reads `slope_rate` as well."""
    model = mini_max()
    ids = torch.randint(3, N, (2, 10), generator=torch.Generator().manual_seed(0))
    spec = alloy.find_symmetries(model, {"input_ids": ids})
    reasons = {p.reason for p in spec.pinned}
    assert any("beside which" in reason and "decay" in reason for reason in reasons)
    before = cached_logits(model, ids)
    transforms = alloy.random_transforms(spec, torch.Generator().manual_seed(1))
    model.load_state_dict(alloy.transport(model.state_dict(), spec, transforms))
    torch.testing.assert_close(cached_logits(model, ids), before, atol=1e-5, rtol=1e-5)


class Tables(nn.Module):
    """A decay for each unit, made twice: one for this forward, one for a path not taken."""

    def __init__(self, *, persistent, read):
        super().__init__()
        self.up, self.down, self.read = nn.Linear(4, 8), nn.Linear(8, 3), read
        self.register_buffer("decay", torch.linspace(0, 1, 8))
        self.register_buffer("inverse", 1 - self.decay, persistent=persistent)

    def forward(self, x):
        h = self.up(x) * self.decay
        return self.down(h + self.inverse if self.read else h)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_buffers_move_only_if_all_their_siblings_do(persistent, read):
    spec = alloy.find_symmetries(Tables(persistent=persistent, read=read), {"x": torch.randn(2, 4)})
    assert len(spec.spaces) == int(read and persistent)


def test_operations_without_a_rule_that_pin_no_weight_are_not_reported():
    class Reads(Net):
        def forward(self, x):
            torch.unique(x.round())
            return super().forward(x) if float(x.sum()) < 1e9 else x

    spec = alloy.find_symmetries(Reads(), {"x": torch.randn(2, 4)})
    assert not spec.unknown_operations
    assert len(spec.spaces) == 1
