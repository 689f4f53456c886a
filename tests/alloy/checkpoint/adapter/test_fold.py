"""A base with an adapter on it is what PEFT's merge_and_unload makes of both."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import alloy
from alloy.checkpoint import load_weights
from alloy.checkpoint.adapter.compute import _encoded
from alloy.errors import MergeError

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
KINDS = {
    "LoRA": ("llama", {"target_modules": ALL}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "rsLoRA": ("llama", {"target_modules": ALL, "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": ALL, "use_dora": True}),
    "DoRA of rsLoRA": ("llama", {"target_modules": ALL, "use_dora": True, "use_rslora": True}),
    "patterns of ranks and alphas": (
        "llama",
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 11, ".*down_proj": 1},
        },
    ),
    "patterns with rsLoRA": (
        "llama",
        {"target_modules": ALL, "rank_pattern": {"q_proj": 5}, "use_rslora": True},
    ),
    "one layer of a pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "biases of the layers": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query", "dense"], "bias": "all"}),
    "a bias of lora_B": ("bert", {"target_modules": ["query", "value"], "lora_bias": True}),
    "a head saved whole": (
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings with DoRA": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embeddings and head saved whole": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "a head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "square Conv1D alone": (
        "gpt2",
        {"target_modules": r".*attn\.c_proj", "fan_in_fan_out": True},
    ),
    "Conv1D with DoRA": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "convolutions": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "names that transformers stores otherwise": ("vit", {"target_modules": ["v_proj", "fc1"]}),
    "convolutions with DoRA": ("vit", {"target_modules": ["projection"], "use_dora": True}),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA"),  # PEFT: a bias has one dim
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_adapter_equals_merge_and_unload(kind: str, tuned: Callable) -> None:
    """To the rounding of float32, for every tensor; and the adapter changes some of them."""
    model, settings = KINDS[kind]
    made = tuned(model, **settings)
    folded = load_weights(made.source)
    assert folded.keys() == made.merged.keys()
    for name, expected in made.merged.items():
        torch.testing.assert_close(folded[name], expected, rtol=1e-5, atol=1e-6, msg=name)
    plain = load_weights(made.base)
    assert any((folded[name] - plain[name]).abs().max() > 1e-3 for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_rounded_once_to_the_bases_dtype(dtype: torch.dtype, tuned: Callable) -> None:
    made = tuned("llama", dtype=dtype, target_modules=ALL)
    folded, plain = load_weights(made.source), load_weights(made.base)
    stored = load_file(made.adapter / "adapter_model.safetensors")
    for name, weight in plain.items():
        assert folded[name].dtype == dtype
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in stored:
            product = (
                stored[f"{key}.lora_B.weight"].double() @ stored[f"{key}.lora_A.weight"].double()
            )
            exact = weight.double() + 5 / 3 * product
            error = (folded[name].double() - exact).abs().max()
            # half of the last place of values below 1, and float32's own rounding before it
            assert error <= torch.finfo(dtype).eps / 2 * exact.abs().max() + 1e-6
        else:
            assert torch.equal(folded[name], weight)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    """Any bits: halves go to the even, overflow to Inf, NaN stays NaN."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    special = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F7FFFFF], np.uint32)
    values = np.concatenate([bits, special, bits & 0xFFFF8000]).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().float()
    halves = _encoded(values, "BF16").view(np.uint16)
    ours = torch.from_numpy((halves.astype(np.uint32) << 16).view(np.float32))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_in_an_adapter_is_refused_with_its_file(
    dtype: torch.dtype, tuned: Callable, tmp_path: Path
) -> None:
    made = tuned("llama", dtype=dtype, target_modules=["q_proj"])
    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    message = r"q_proj.weight in 'x' .*model.safetensors \+ .*adapter_model.safetensors\) has NaN"
    with pytest.raises(MergeError, match=message):
        alloy.merge_checkpoints("linear", {"x": made.source}, tmp_path / "out")


@pytest.mark.parametrize("method", ["ties", "slerp", "wudi"])
def test_a_merge_reads_the_folded_tensors(method: str, tuned: Callable, tmp_path: Path) -> None:
    """Merging base+adapter gives the bytes of merging what was folded and saved before."""
    a = tuned("llama", "a", 1, target_modules=ALL, use_dora=True)
    b = tuned("llama", "b", 2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    whole = {}
    for name, made in (("a", a), ("b", b)):
        whole[name] = tmp_path / f"whole-{name}"
        alloy.merge_checkpoints("linear", {name: made.source}, whole[name])
    base = {} if method == "slerp" else {"base": a.base}
    for output, sources in (
        ("folded", {"a": a.source, "b": b.source}),
        ("plain", whole),
    ):
        alloy.merge_checkpoints(method, sources, tmp_path / output, **base)
    files = [tmp_path / output / "model.safetensors" for output in ("folded", "plain")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {}])
def test_pieces_have_the_bits_of_the_whole(settings: dict, tuned: Callable, tmp_path: Path) -> None:
    """Wherever a tensor is cut, and however many workers read it, its elements are the same."""
    from alloy.checkpoint import MergeRequest, plan_merge, run_plan

    made = tuned("gpt2", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **settings)
    written = []
    for i, (chunk_bytes, threads) in enumerate([(64, 3), (1000, 2), (1 << 20, 1)]):
        plan = plan_merge(MergeRequest("linear", [made.source], tmp_path / f"out{i}"))
        run_plan(plan, chunk_bytes=chunk_bytes, threads=threads)
        written.append((tmp_path / f"out{i}/model.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
