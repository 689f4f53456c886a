"""Tiny modality transformers and inputs: hidden, patches and tokens of different sizes."""

import pytest
import torch

from alloy.modality import ModalityConfig, ModalityModel


def tiny_config(**changes) -> ModalityConfig:
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_joint_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "embedding_size": 10,
        "layer_scale": 0.5,
        "initializer_range": 0.2,
        "image_size": 12,
        "patch_size": 4,
        "vocab_size": 30,
        "max_position_embeddings": 7,
        "num_answers": 11,
        "num_segment_classes": 5,
        "segment_cells": 2,
    }
    return ModalityConfig(**{**sizes, **changes})


@pytest.fixture
def config():
    return tiny_config


@pytest.fixture
def model():
    """A function that makes a model in evaluation mode, the same for equal arguments."""

    def make(seed: int = 0, **changes) -> ModalityModel:
        torch.manual_seed(seed)
        return ModalityModel(tiny_config(**changes)).eval()

    return make


@pytest.fixture
def inputs():
    """Four images and texts of one to seven tokens, as keyword arguments of the model."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 1, 4, 6])
    mask = (torch.arange(7) < lengths[:, None]).long()
    return {
        "pixel_values": torch.randint(
            0, 256, (4, 3, 12, 12), generator=generator, dtype=torch.uint8
        ),
        "input_ids": torch.randint(1, 30, (4, 7), generator=generator) * mask,
        "attention_mask": mask,
    }


@pytest.fixture
def specific(model):
    """A modality-specific model in float64, whose norms have gains and biases."""

    def make(seed: int = 0, **changes) -> ModalityModel:
        made = model(seed, sharing="none", **changes).double()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.2 * torch.randn_like(parameter) * parameter.requires_grad
        return made

    return make
