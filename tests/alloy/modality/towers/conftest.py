"""Tiny models of real architectures, in float64 and with norms and biases that matter."""

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import PreTrainedModel

LAYERS = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
IMAGES = {**LAYERS, "intermediate_size": 20, "image_size": 12, "patch_size": 4}
TEXTS = {
    **LAYERS,
    "intermediate_size": 20,
    "vocab_size": 30,
    "max_position_embeddings": 10,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WHISPER = {
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 16,
    "vocab_size": 30,
    "num_mel_bins": 4,
    "max_source_positions": 6,
    "max_target_positions": 10,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def config_of(kind: str, **changes) -> transformers.PreTrainedConfig:
    """A tiny config by the name of its class."""
    made = getattr(transformers, kind)
    if kind in ("CLIPConfig", "SiglipConfig"):
        return made(vision_config={**IMAGES, **changes}, text_config=TEXTS)
    if kind == "FlavaConfig":
        return made(
            image_config=IMAGES,
            text_config=TEXTS,
            multimodal_config={**LAYERS, "intermediate_size": 20, **changes},
            hidden_size=12,
            projection_dim=6,
        )
    if kind == "WhisperConfig":
        return made(**{**WHISPER, **changes})
    of_texts = ("CLIPText", "SiglipText", "Bert", "Roberta", "XLMRoberta", "FlavaText")
    sizes = TEXTS if kind.removesuffix("Config") in of_texts else IMAGES
    if kind == "Dinov2Config":
        sizes = {name: n for name, n in IMAGES.items() if name != "intermediate_size"}
        sizes["mlp_ratio"] = 2
    return made(**{**sizes, **changes})


@pytest.fixture
def hf_model() -> Callable[..., PreTrainedModel]:
    """A function that makes a model of transformers, by the names of its classes."""

    def make(model: str, config: str, **changes) -> PreTrainedModel:
        torch.manual_seed(0)
        made = getattr(transformers, model)(config_of(config, **changes)).double().eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        return made

    return make


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture
def texts() -> dict[str, torch.Tensor]:
    """Texts of seven, five and six words, as keyword arguments of a transformers model."""
    mask = (torch.arange(7) < torch.tensor([7, 5, 6])[:, None]).long()
    ids = torch.randint(3, 30, (3, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids * mask, "attention_mask": mask}
