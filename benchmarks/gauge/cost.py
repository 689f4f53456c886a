"""CPU seconds of the search's steps and of sequential least squares, by size of the model."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from alloy.modality import ModalityConfig, ModalityModel
from alloy.modality.sensitivity import affine_grams, sensitivities_of
from alloy.modality.sequential import merge_sequentially
from alloy.modality.stream_search import find_gauge
from alloy.modality.streams import in_gauge
from benchmarks.gauge.params import EXPANSION, HEAD_UNITS

SIZES = ((48, 4), (96, 4), (96, 8), (192, 4), (384, 4))
"""Width and number of blocks; one doubles while the other stays."""
STEPS = 4
"""Steps that are timed, after a first one that also matches heads and neurons."""


def cost() -> Iterator[dict[str, Any]]:
    """Measure each size with random weights and 64 examples: one row, seconds of one core."""
    for hidden, layers in SIZES:
        model = in_gauge(_model(hidden, layers))
        batch = {
            "pixel_values": torch.randint(0, 256, (64, 3, 48, 48), dtype=torch.uint8),
            "input_ids": torch.randint(1, 60, (64, 9)),
            "attention_mask": torch.ones(64, 9, dtype=torch.long),
        }
        grams = affine_grams(model, [batch])
        seconds = []
        for steps in (1, 1 + STEPS):
            began = time.process_time()
            find_gauge(model, grams, starts=["identity"], steps=steps, max_rounds=1)
            seconds.append(time.process_time() - began)
        sensitivities = sensitivities_of(model, [batch])
        began = time.process_time()
        merge_sequentially(model, [batch], sensitivities)
        row = {
            "hidden": hidden,
            "layers": layers,
            "step_seconds": round((seconds[1] - seconds[0]) / STEPS, 3),
            "match_seconds": round(seconds[0], 2),
            "sequential_seconds": round(time.process_time() - began, 2),
        }
        print(row, flush=True)
        yield row


def _model(hidden: int, layers: int) -> ModalityModel:
    config = ModalityConfig(
        sharing="none",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_joint_layers=2,
        num_attention_heads=hidden // HEAD_UNITS,
        intermediate_size=EXPANSION * hidden,
        layer_scale=None,
        initializer_range=0.08,
        image_size=48,
        patch_size=12,
        vocab_size=60,
        max_position_embeddings=9,
        num_answers=0,
        num_segment_classes=0,
    )
    torch.manual_seed(0)
    return ModalityModel(config).eval()
