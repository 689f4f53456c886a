"""Seconds and memory of a trunk of two towers of 12 layers at width 768, with random weights."""

import resource
import time
from typing import Any

import torch
from torch import nn
from transformers import SiglipConfig, SiglipModel
from transformers.initialization import no_init_weights

from alloy.trunk import merge_trunk, plan_trunk

TOWERS = {"image": "vision_model.encoder.layers", "text": "text_model.encoder.layers"}


def random_siglip(num_layers: int = 12, width: int = 768) -> Any:
    """SigLIP base with weights drawn at random."""
    torch.manual_seed(0)
    blocks = {"hidden_size": width, "num_hidden_layers": num_layers, "num_attention_heads": 12}
    blocks["intermediate_size"] = 4 * width
    words = {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": width}
    config = SiglipConfig(
        vision_config={**blocks, "image_size": 224, "patch_size": 16},
        text_config={**blocks, **words, "bos_token_id": 1, "eos_token_id": 2},
    )
    with no_init_weights():
        model = SiglipModel(config).eval()
    for name, parameter in model.named_parameters():
        is_gain = "norm" in name and name.endswith("weight")
        nn.init.ones_(parameter) if is_gain else nn.init.normal_(parameter, std=0.03)
    return model


def pairs(num: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": torch.randn(num, 3, 224, 224),
        "input_ids": torch.randint(3, 32000, (num, 64)),
    }


def measure(*methods: str) -> dict[str, Any]:
    """CPU seconds and the peak of memory so far, of the plan and of each method on 8 pairs."""
    model, found = random_siglip(), {}

    def took(name: str, start: float) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found[name] = {"cpu_seconds": round(time.process_time() - start, 1), "peak_gb": peak}
        print(name, found[name], flush=True)

    start = time.process_time()
    plan = plan_trunk(model, TOWERS, pairs(2), turn=True)
    took("plan", start)
    for method in methods:
        start, chosen = time.process_time(), method
        merge_trunk(plan, [pairs(4), pairs(4)], method=chosen, weigh=False)  # ty: ignore
        took(method, start)
    return found
