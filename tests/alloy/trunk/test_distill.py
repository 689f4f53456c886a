"""A merged model comes nearer to its parent by training on the parent's answers."""

import pytest
import torch

from alloy.errors import MergeError
from alloy.trunk import distil, merge_trunk, plan_trunk
from alloy.trunk.passes import answers_of

TOWERS = {"image": "vision_model.encoder.layers", "text": "text_model.encoder.layers"}


def test_distilling_lowers_the_error_and_keeps_the_sharing(tiny, pairs):
    parent, batches = tiny("siglip"), [pairs("siglip", 16, seed) for seed in (1, 2)]
    plan = plan_trunk(parent, TOWERS, batches[0])
    merged = merge_trunk(plan, batches, method="average").model
    losses = []
    student = distil(
        merged, parent, batches, steps=20, learning_rate=3e-3,
        progress=lambda _, loss: losses.append(loss),
    )  # fmt: skip

    @torch.no_grad()
    def error(model):
        found, wanted = (answers_of(m(**batches[0]), batches[0]) for m in (model, parent))
        return sum(float((a - b).square().mean()) for a, b in zip(found, wanted, strict=True))

    assert error(student) < 0.8 * error(merged)
    assert len(losses) == 20
    assert sum(p.numel() for p in student.parameters()) == plan.num_parameters[1]


def test_bad_training_is_refused(tiny, pairs):
    model, batch = tiny("siglip"), pairs("siglip")
    with pytest.raises(MergeError, match="takes batches and steps: given 0 and 5"):
        distil(model, model, [], steps=5)
    merged = tiny("siglip", 1)
    with pytest.raises(MergeError, match=r"the loss is .*: lower learning_rate"):
        distil(merged, model, [batch], steps=9, learning_rate=1e30)
