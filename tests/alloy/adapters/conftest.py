"""Adapters as PEFT saves them, written tensor by tensor on a small base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24,
    "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / "seed")
    return tmp_path / "seed"


@pytest.fixture
def adapter(tmp_path: Path, seed: Path) -> Callable[..., Path]:
    """`adapter("a", 1, layers=..., rank=3, **config)`: random factors of these layers."""

    def _adapter(
        name: str,
        number: int,
        layers=LAYERS,
        rank: int = 3,
        saved=(),
        bias: bool = False,
        **config: Any,
    ) -> Path:
        generator = torch.Generator().manual_seed(number)
        weights = load_file(seed / "model.safetensors")
        tensors = {}
        for weight, value in weights.items():
            key = f"base_model.model.{weight.removesuffix('.weight')}"
            if any(layer in weight for layer in layers):
                rows, width = value.shape
                if "embed" in weight:
                    tensors[f"{key}.lora_embedding_A"] = torch.randn(
                        rank, rows, generator=generator
                    )
                    tensors[f"{key}.lora_embedding_B"] = torch.randn(
                        width, rank, generator=generator
                    )
                else:
                    tensors[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
                    tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
            if weight in saved:
                noise = torch.randn(value.shape, generator=generator)
                tensors[f"base_model.model.{weight}"] = value + noise
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": list(layers)}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings | config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return _adapter
