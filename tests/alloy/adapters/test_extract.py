"""An extracted adapter is the best of its rank, and PEFT loads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from alloy.adapters import extract_adapter
from alloy.adapters.lowrank import truncated
from alloy.checkpoint import load_weights
from alloy.cli.app import app
from alloy.errors import CheckpointError, MergeError

MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=40, tie_word_embeddings=False,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            n_embd=24, n_layer=2, n_head=4, vocab_size=40, n_positions=16,
            tie_word_embeddings=False,
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            image_size=8, patch_size=4,
        )
    ),
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True:UserWarning"),  # mixed kinds
]


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """`pair("llama", change)`: a base, and a fine-tune by default changed in every tensor."""

    def everything(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        return weight + 0.1 * torch.randn(weight.shape, generator=generator)

    def _pair(kind: str, change: Callable[..., Tensor] = everything) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = MODELS[kind]()
        model.save_pretrained(tmp_path / "seed")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            parameter.data = change(name, parameter.data, generator)
        model.save_pretrained(tmp_path / "tuned")
        return tmp_path / "seed", tmp_path / "tuned"

    return _pair


def _low_rank(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Matrices change by rank 2."""
    if weight.ndim != 2:
        return weight
    left = torch.randn(weight.shape[0], 2, generator=generator)
    return weight + 0.1 * left @ torch.randn(2, weight.shape[1], generator=generator)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_full_rank_gives_the_fine_tune_back(kind: str, pair: Callable, tmp_path: Path) -> None:
    """With all energy nothing is lost: matrices, embeddings, norms, biases, class tokens."""
    seed, tuned = pair(kind)
    report = extract_adapter(tuned, tmp_path / "lora", base=seed, energy=1.0)
    assert report.energy == pytest.approx(1, abs=1e-6)
    folded, expected = load_weights(f"{seed}+{tmp_path / 'lora'}"), load_weights(tuned)
    for name, weight in expected.items():
        torch.testing.assert_close(folded[name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_peft_loads_it_and_merges_to_the_same(kind: str, pair: Callable, tmp_path: Path) -> None:
    seed, tuned = pair(kind)
    extract_adapter(tuned, tmp_path / "lora", base=seed, rank=3)
    model = PeftModel.from_pretrained(type(MODELS[kind]()).from_pretrained(seed), tmp_path / "lora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    folded = load_weights(f"{seed}+{tmp_path / 'lora'}")
    for name, weight in load_weights(tmp_path / "merged").items():
        torch.testing.assert_close(folded[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_a_change_of_low_rank_is_extracted_exactly(pair: Callable, tmp_path: Path) -> None:
    """Energy finds the rank that the change has."""
    seed, tuned = pair("llama", _low_rank)
    report = extract_adapter(tuned, tmp_path / "lora", base=seed, energy=1 - 1e-6)
    assert set(report.ranks.values()) == {2}
    assert report.saved == ()
    folded, expected = load_weights(f"{seed}+{tmp_path / 'lora'}"), load_weights(tuned)
    for name, weight in expected.items():
        torch.testing.assert_close(folded[name], weight, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (20, 30)])
@pytest.mark.parametrize("rank", [1, 5])
def test_no_matrix_of_that_rank_is_closer(shape: tuple[int, int], rank: int) -> None:
    """The error is the root of the other squared singular values, by either decomposition."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator) * 0.9 ** torch.arange(shape[1])
    left, right = truncated(matrix, rank=rank, energy=None, generator=generator)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    singular = torch.linalg.svdvals(matrix.double())
    best = singular[rank:].square().sum().sqrt()
    error = torch.linalg.norm(matrix.double() - left.double() @ right.double())
    assert error == pytest.approx(float(best), rel=1e-4)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_energy_takes_the_least_rank_that_keeps_it(energy: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(250, 240, generator=generator) * 0.95 ** torch.arange(240)
    left, _ = truncated(matrix, rank=None, energy=energy, generator=generator)
    squares = torch.linalg.svdvals(matrix.double()).square()
    share = squares.cumsum(0) / squares.sum()
    least = int((share < energy).sum()) + 1
    assert left.shape[1] == least
    capped, _ = truncated(matrix, rank=2, energy=energy, generator=generator)
    assert capped.shape[1] == min(2, least)


def test_equal_seeds_give_equal_bytes(pair: Callable, tmp_path: Path) -> None:
    seed, tuned = pair("llama")
    for name in ("one", "two"):
        extract_adapter(tuned, tmp_path / name, base=seed, rank=2)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_layers_that_did_not_change_get_nothing(pair: Callable, tmp_path: Path) -> None:
    def only_queries(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        return weight + 0.1 if "q_proj" in name else weight

    seed, tuned = pair("llama", only_queries)
    report = extract_adapter(tuned, tmp_path / "lora", base=seed, rank=4, dtype="bfloat16")
    assert list(report.ranks) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", 4, 4)
    assert config["base_model_name_or_path"] == str(seed)


def test_drop_leaves_the_bases_own(pair: Callable, tmp_path: Path) -> None:
    seed, tuned = pair("llama")
    report = extract_adapter(
        tuned, tmp_path / "lora", base=seed, rank=2, drop=["*norm*", "*embed*"]
    )
    assert report.saved == ()
    assert len(report.dropped) == 6
    folded, base = load_weights(f"{seed}+{tmp_path / 'lora'}"), load_weights(seed)
    assert all(torch.equal(folded[name], base[name]) for name in report.dropped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give rank, energy or both"),
        ({"rank": 0}, "rank=0: give a whole number from 1"),
        ({"rank": True}, "rank=True: give a whole number"),
        ({"energy": 1.5}, r"energy=1.5: give a share in \(0, 1\]"),
        ({"energy": 0}, "energy=0: give a share"),
        ({"rank": 2, "dtype": "int8"}, "dtype='int8': choose one of"),
        ({"rank": 2, "drop": ["*nrm*"]}, r"drop pattern '\*nrm\*' matches no tensor"),
        ({"rank": 2, "drop": ["*"]}, "but for what drop leaves out: there is nothing to extract"),
    ],
)
def test_settings_are_checked_first(
    settings: dict, message: str, pair: Callable, tmp_path: Path
) -> None:
    seed, tuned = pair("llama", _low_rank)
    with pytest.raises(MergeError, match=message):
        extract_adapter(tuned, tmp_path / "lora", base=seed, **settings)
    assert not (tmp_path / "lora").exists()


def test_what_no_adapter_can_hold_is_refused(pair: Callable, tmp_path: Path) -> None:
    seed, tuned = pair("llama", _low_rank)
    with pytest.raises(MergeError, match="there is nothing to extract"):
        extract_adapter(seed, tmp_path / "lora", base=seed, rank=2)
    for folder in (seed, tuned):
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match=r"embeddings tied to the head.*drop=\['lm_head"):
        extract_adapter(tuned, tmp_path / "lora", base=seed, rank=2)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").touch()
    with pytest.raises(MergeError, match="is not an empty folder"):
        extract_adapter(tuned, tmp_path / "lora", base=seed, rank=2)
    (tmp_path / "lora" / "mine").unlink()
    unfinished = tmp_path / "lora.incomplete"
    unfinished.mkdir()
    (unfinished / "mine").touch()
    with pytest.raises(CheckpointError, match="'mine' is not ours"):
        extract_adapter(tuned, tmp_path / "lora", base=seed, rank=2, drop=["*embed*", "lm_head*"])


def test_models_of_other_shapes_are_refused(pair: Callable, tmp_path: Path) -> None:
    seed, _ = pair("llama")
    MODELS["gpt2"]().save_pretrained(tmp_path / "other")
    with pytest.raises(MergeError, match=r"has no .*; give the base that it was trained from"):
        extract_adapter(tmp_path / "other", tmp_path / "lora", base=seed, rank=2)


def test_the_command_writes_it_and_says_what_it_kept(pair: Callable, tmp_path: Path) -> None:
    seed, tuned = pair("llama", _low_rank)
    arguments = ["extract", str(tmp_path / "lora"), str(tuned), "--base", str(seed)]
    done = CliRunner().invoke(app, [*arguments, "--energy", "0.999999"])
    assert done.exit_code == 0, done.output
    assert "16 layers, ranks 2 to 2, 100.00% of what training added" in " ".join(
        done.output.split()
    )
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "give rank, energy or both" in refused.output
