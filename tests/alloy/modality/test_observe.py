"""The memory of the statistics is known before they are taken."""

import pytest
import torch

import alloy
from alloy.modality import ModalityConfig, ModalityModel, agnostic_config, observe
from alloy.modality.observe import collect_experts, planned_bytes
from alloy.statistics.running import RunningSums


@pytest.mark.parametrize(("width", "depth"), [(12, 2), (24, 3)])
def test_the_planned_bytes_are_those_of_the_sums(width, depth, monkeypatch):
    """A base model's 12 x 768 is planned without being run."""
    torch.manual_seed(0)
    config = ModalityConfig(
        sharing="none",
        hidden_size=width,
        num_hidden_layers=depth,
        num_joint_layers=1,
        num_attention_heads=3,
        intermediate_size=2 * width,
        image_size=8,
        patch_size=4,
        vocab_size=20,
        max_position_embeddings=6,
        num_answers=0,
    )
    model = ModalityModel(config).eval()
    batch = {
        "pixel_values": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
        "input_ids": torch.randint(1, 20, (4, 6)),
        "attention_mask": torch.ones(4, 6, dtype=torch.long),
    }
    spec = alloy.find_symmetries(ModalityModel(agnostic_config(config)).eval(), batch)
    made = []

    class Kept(RunningSums):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(observe, "RunningSums", Kept)
    collect_experts(model, [batch], spec)
    assert planned_bytes(model, spec) == sum(t.nbytes for t in made[0].totals.values())
