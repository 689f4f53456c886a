"""Tiny models of several modalities as transformers builds them, and their language models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 64
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "hidden_size": 32,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

ARCHITECTURES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "LlavaNext": (
        "llama",
        {
            "vision_config": {
                "model_type": "clip_vision_model", "projection_dim": 16, "image_size": 16,
                "patch_size": 8, **TOWER,
            },
            "image_token_index": 63,
            "image_grid_pinpoints": [[16, 16]],
        },
        "vision_tower",
    ),
    "Qwen2VL": (
        "qwen2_vl_text",
        {"vision_config": {"embed_dim": 32, "mlp_ratio": 2, **QWEN_TOWER}, "image_token_id": 63},
        "vision_tower",
    ),
    "Qwen2_5_VL": (
        "qwen2_5_vl_text",
        {
            "vision_config": {
                "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
                "fullatt_block_indexes": [1], **QWEN_TOWER,
            },
            "image_token_id": 63,
        },
        "vision_tower",
    ),
    "InternVL": (
        "qwen2",
        {
            "vision_config": {"image_size": [16, 16], "patch_size": [8, 8], **TOWER},
            "image_token_id": 63,
        },
        "vision_tower",
    ),
    "Idefics3": (
        "llama",
        {
            "vision_config": {"image_size": 16, "patch_size": 8, **TOWER},
            "scale_factor": 2,
            "image_token_id": 63,
        },
        "vision_tower",
    ),
    "Qwen2Audio": (
        "qwen2",
        {
            "audio_config": {
                "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 2,
                "encoder_ffn_dim": 24, "d_model": 16, "max_source_positions": 20,
            },
            "audio_token_index": 63,
        },
        "audio_tower",
    ),
}  # fmt: skip
"""By name of the class: kind of its language model, its config, the group of its encoder."""


def whole(name: str, seed: int = 0, num_layers: int = 2) -> PreTrainedModel:
    """A model of several modalities with random weights."""
    kind, settings, _ = ARCHITECTURES[name]
    text: dict[str, Any] = {"model_type": kind, **TEXT, "num_hidden_layers": num_layers}
    if "_vl_" in kind:
        text["rope_parameters"] = SECTIONS
    config = getattr(transformers, f"{name}Config")(**settings, text_config=text)
    architecture = f"{name}ForConditionalGeneration"
    torch.manual_seed(seed)
    return getattr(transformers, architecture)(config).eval()


def language_model(name: str, seed: int = 0, num_layers: int = 2) -> PreTrainedModel:
    """A language model of the kind that is part of such a model."""
    kind = "Llama" if ARCHITECTURES[name][0] == "llama" else "Qwen2"
    tied = {"tie_word_embeddings": True} if name == "InternVL" else {}  # as its public ones are
    text = {**TEXT, **tied, "num_hidden_layers": num_layers}
    config = getattr(transformers, f"{kind}Config")(**text)
    torch.manual_seed(seed)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
