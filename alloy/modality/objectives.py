"""Losses that pre-train the modality transformer: contrast, masked words, statements.

Shapes as in `alloy.modality.modeling`; N is the number of masked words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.modality.modeling import ModalityModel, key_mask

IGNORED = -100
"""Label of a word that no loss counts: what `torch.nn.functional.cross_entropy` ignores."""


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of each image's text among the batch's, and the reverse (ITC)."""
    logits_BB = logit_scale.exp() * image_BE @ text_BE.T
    targets = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, targets) + F.cross_entropy(logits_BB.T, targets)) / 2


def mask_words(
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    mask_token_id: int,
    probability: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Hide words behind the mask token; the class token in front is never hidden.

    Returns:
        The ids and the labels (`IGNORED` where nothing is hidden), both [B, T].
    """
    chance = torch.rand(input_ids_BT.shape, generator=generator).to(input_ids_BT.device)
    hidden = (chance < probability) & attention_mask_BT.bool()
    hidden[:, 0] = False
    labels = input_ids_BT.masked_fill(~hidden, IGNORED)
    return input_ids_BT.masked_fill(hidden, mask_token_id), labels


def masked_word_loss(model: ModalityModel, states_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of the hidden words (MLM); 0 if none is hidden."""
    hidden = labels_BT != IGNORED
    logits_NV = model.masked_word_logits(states_BTD[hidden])
    total = F.cross_entropy(logits_NV, labels_BT[hidden], reduction="sum")
    return total / hidden.sum().clamp(min=1)


def pretraining_losses(
    model: ModalityModel,
    batch: dict[str, Tensor],
    *,
    mask_token_id: int,
    mask_probability: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Compute one batch's losses: `contrastive` (ITC), `masked_words` (MLM), `statements` (ITM).

    A batch has `pixel_values`, `input_ids` and `attention_mask` of its captions, and
    `statement_ids`, `statement_mask` and `statement_labels` (1 = true) of one statement per image.
    The lower blocks run once on the images and once on all texts, because in them the dual-encoder
    pass and the joint pass are the same.
    """
    lower = model.config.num_single_layers
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden_ids, labels = mask_words(ids, mask, mask_token_id, mask_probability, generator)
    all_masks = torch.cat([mask, mask, batch["statement_mask"]])
    image = model.image_states(batch["pixel_values"], lower)
    text = model.text_states(torch.cat([ids, hidden_ids, batch["statement_ids"]]), all_masks, lower)
    num = len(ids)
    image_BE = model.embed_image(model.run_blocks(image, "v", lower, None))
    text_BE = model.embed_text(model.run_blocks(text[:num], "l", lower, None, key_mask(mask)))
    joint = model.join_states(torch.cat([image, image]), text[num:], all_masks[num:])
    return {
        "contrastive": contrastive_loss(image_BE, text_BE, model.logit_scale),
        "masked_words": masked_word_loss(model, joint[:num, : ids.shape[1]], labels),
        "statements": F.cross_entropy(
            model.statement_logits(joint[num:]), batch["statement_labels"]
        ),
    }


def distillation_losses(
    student: ModalityModel, teacher: ModalityModel, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Measure how far the student's outputs are from the teacher's; no labels are needed.

    The losses are Kullback-Leibler divergences of three distributions: which text of the batch
    belongs to an image and the reverse, which word stands at each token, and whether the text is
    true.
    """
    inputs = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        taught = teacher(*inputs)
        taught_BB = teacher.logit_scale.exp() * taught.image_embeddings @ taught.text_embeddings.T
    learned = student(*inputs)
    learned_BB = student.logit_scale.exp() * learned.image_embeddings @ learned.text_embeddings.T
    tokens = batch["attention_mask"].bool()
    return {
        "contrastive": (_divergence(learned_BB, taught_BB) + _divergence(learned_BB.T, taught_BB.T))
        / 2,
        "masked_words": _divergence(
            learned.masked_word_logits[tokens], taught.masked_word_logits[tokens]
        ),
        "statements": _divergence(learned.statement_logits, taught.statement_logits),
    }


def _divergence(logits_NC: Tensor, target_logits_NC: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from the targets' distributions."""
    return F.kl_div(
        logits_NC.log_softmax(-1),
        target_logits_NC.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
