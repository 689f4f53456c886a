"""Laws of merging experts by sequential least squares."""

import torch

from alloy.modality import ModalityModel, agnostic_config, copy_to_experts
from alloy.modality.passes import PASSES
from alloy.modality.sensitivity import sensitivities_of
from alloy.modality.sequential import average_of_experts, merge_sequentially
from alloy.modality.streams import in_gauge
from tests.alloy.modality.laws import outputs


def test_equal_experts_merge_into_the_seed(model, inputs):
    """Sequential least squares of experts that all equal the seed is the seed."""
    seed = model(sharing="all").double()
    config = model(sharing="none").config
    same = ModalityModel(config).double().eval()
    same.load_state_dict(copy_to_experts(seed.state_dict(), config))
    for sensitivities in (None, sensitivities_of(same, [inputs])):
        merged = merge_sequentially(same, [inputs], sensitivities)
        for name, tensor in seed.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name], tensor)
    assert agnostic_config(config).to_dict().keys() == merged.config.to_dict().keys()


def test_heads_follow_and_the_errors_of_answers_count_most(specific):
    """Refitted heads answer more as the experts did, and more so if the answers' errors count."""
    model = in_gauge(specific())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randint(0, 256, (128, 3, 12, 12), generator=generator).byte(),
        "input_ids": torch.randint(1, 11, (128, 7), generator=generator),
        "attention_mask": torch.ones(128, 7, dtype=torch.long),
    }
    taught = outputs(model, inputs)
    names = ("image_embeddings", "text_embeddings", "masked_word_logits", "statement_logits")

    def distance(sensitivities=None, **settings):
        learned = outputs(merge_sequentially(model, [inputs], sensitivities, **settings), inputs)
        return sum(
            float((taught[name] - learned[name]).square().mean() / taught[name].var())
            for name in names
        )

    kept, alike = distance(heads=False), distance()
    by_answers = distance(sensitivities_of(model, [inputs]))
    assert alike < 0.8 * kept
    assert by_answers < 0.9 * alike


def test_sequential_merging_comes_nearer_to_the_experts_than_their_average(specific, inputs):
    model = in_gauge(specific())
    average = average_of_experts(model)
    merged = merge_sequentially(model, [inputs])

    def distance(student):
        return sum(
            float((one.forward(model, inputs) - one.forward(student, inputs)).square().mean())
            for one in PASSES.values()
        )

    with torch.no_grad():
        assert distance(merged) < 0.5 * distance(average)
    alone = merge_sequentially(model, [inputs], joint_experts=["vl"])
    assert (alone.blocks[2].ffn.fc1.weight - merged.blocks[2].ffn.fc1.weight).abs().max() > 1e-3
    torch.testing.assert_close(alone.blocks[0].ffn.fc1.weight, merged.blocks[0].ffn.fc1.weight)
