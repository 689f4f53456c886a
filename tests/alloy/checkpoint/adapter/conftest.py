"""Tiny models with adapters as PEFT saves them, every tensor of the adapter at random."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=40, tie_word_embeddings=False, attention_bias=True,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=40, n_positions=16)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=40, num_labels=3,
        )
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
            image_size=8, patch_size=4,
        )
    ),
}  # fmt: skip


class Tuned:
    """A base on disk, an adapter of it on disk, and what PEFT makes of both."""

    def __init__(self, base: Path, adapter: Path, merged: dict[str, Tensor]):
        self.base, self.adapter, self.merged = base, adapter, merged

    @property
    def source(self) -> str:
        return f"{self.base}+{self.adapter}"


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """`base("llama", dtype=...)`: a model saved, once a test."""

    def _base(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / f"{kind}-{dtype}"
        if not folder.exists():
            torch.manual_seed(0)
            MODELS[kind]().to(dtype).save_pretrained(folder)
        return folder

    return _base


@pytest.fixture
def tuned(tmp_path: Path, base: Callable[..., Path]) -> Callable[..., Tuned]:
    """`tuned("llama", use_dora=True, ...)`: an adapter of that LoraConfig on that model."""

    def _tuned(
        kind: str,
        name: str = "adapter",
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
        **settings,
    ) -> Tuned:
        folder = base(kind, dtype)
        model = _load(kind, folder)
        config = LoraConfig(**{"r": 3, "lora_alpha": 5} | settings)
        peft = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise.to(parameter.dtype)
        peft.save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(_load(kind, folder), tmp_path / name)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / f"{name}-merged")
        from safetensors.torch import load_file

        return Tuned(
            folder, tmp_path / name, load_file(tmp_path / f"{name}-merged/model.safetensors")
        )

    return _tuned


def _load(kind: str, folder: Path) -> PreTrainedModel:
    return type(MODELS[kind]()).from_pretrained(folder)
