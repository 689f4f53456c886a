"""Laws of the pre-training objectives."""

import math

import pytest
import torch
import torch.nn.functional as F

from alloy.modality.objectives import (
    IGNORED,
    contrastive_loss,
    distillation_losses,
    mask_words,
    masked_word_loss,
    pretraining_losses,
)


@pytest.fixture
def batch(inputs):
    generator = torch.Generator().manual_seed(2)
    return {
        **inputs,
        "statement_ids": torch.randint(1, 30, (4, 7), generator=generator),
        "statement_mask": torch.ones(4, 7, dtype=torch.long),
        "statement_labels": torch.tensor([0, 1, 1, 0]),
    }


def test_contrast_is_least_when_pairs_agree_and_others_do_not():
    """Orthonormal pairs at a high scale cost 0, equal embeddings log B, a wrong order more."""
    eye, scale = torch.eye(5), torch.tensor(100.0).log()
    same = torch.ones(5, 5) / 5**0.5
    assert contrastive_loss(eye, eye, scale) < 1e-6
    assert contrastive_loss(same, same, scale).item() == pytest.approx(math.log(5))
    assert contrastive_loss(eye, eye.roll(1, 0), scale) > 99


def test_contrast_is_symmetric():
    image, text = F.normalize(torch.randn(2, 6, 4), dim=-1)
    scale = torch.tensor(1.0)
    torch.testing.assert_close(
        contrastive_loss(image, text, scale), contrastive_loss(text, image, scale)
    )


def test_words_are_hidden_as_often_as_asked_but_never_class_token_or_padding():
    mask = torch.ones(400, 9, dtype=torch.long)
    mask[:, 6:] = 0
    ids = torch.randint(5, 30, mask.shape)
    hidden, labels = mask_words(ids, mask, 3, 0.4, torch.Generator().manual_seed(0))
    where = labels != IGNORED
    assert where[:, 1:6].float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert not where[:, 0].any()
    assert not where[:, 6:].any()
    assert (hidden[where] == 3).all()
    assert torch.equal(labels[where], ids[where])
    assert torch.equal(hidden[~where], ids[~where])


def test_no_hidden_word_costs_nothing(model):
    states = torch.randn(2, 3, 24, requires_grad=True)
    loss = masked_word_loss(model(), states, torch.full((2, 3), IGNORED))
    loss.backward()
    assert loss.item() == 0


def test_the_shared_computation_gives_the_losses_of_the_separate_passes(model, batch):
    """Running the lower blocks once on all texts changes no loss."""
    network = model(sharing="none", num_joint_layers=2)
    arguments = {"mask_token_id": 3, "mask_probability": 0.5}

    def generator():
        return torch.Generator().manual_seed(0)

    together = pretraining_losses(network, batch, generator=generator(), **arguments)
    images, ids, mask = (batch[k] for k in ("pixel_values", "input_ids", "attention_mask"))
    hidden, labels = mask_words(ids, mask, 3, 0.5, generator())
    statements = network.encode_joint(images, batch["statement_ids"], batch["statement_mask"])
    apart = {
        "contrastive": contrastive_loss(
            network.encode_image(images), network.encode_text(ids, mask), network.logit_scale
        ),
        "masked_words": masked_word_loss(
            network, network.encode_joint(images, hidden, mask)[:, : ids.shape[1]], labels
        ),
        "statements": F.cross_entropy(
            network.statement_logits(statements), batch["statement_labels"]
        ),
    }
    assert together.keys() == apart.keys()
    for name, loss in apart.items():
        torch.testing.assert_close(together[name], loss)


def test_pretraining_reaches_every_expert(model, batch):
    """Every parameter but those of the heads that only fine-tuning trains gets a gradient."""
    network = model(sharing="none")
    generator = torch.Generator().manual_seed(0)
    losses = pretraining_losses(
        network, batch, mask_token_id=3, mask_probability=0.5, generator=generator
    )
    sum(losses.values()).backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert {name.split(".")[0] for name in without} == {"answer_head", "pair_head", "segment_head"}


def test_a_model_has_nothing_to_learn_from_itself(model, inputs):
    """Distillation is 0 from itself, positive from another, and moves the student alone."""
    student, teacher = model(sharing="all"), model(seed=1, sharing="none")
    for loss in distillation_losses(student, student, inputs).values():
        assert loss.item() == pytest.approx(0, abs=1e-6)
    losses = distillation_losses(student, teacher, inputs)
    assert all(loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.blocks[0].ffn.fc1.weight.grad.any()
