"""Losses that pre-train the modality transformer: contrast, masked words, statements.

Shapes as in `alloy.modality.modeling`; N is the number of masked words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.modality.masking import IGNORED
from alloy.modality.modeling import ModalityModel, ModalityOutput, key_mask
from alloy.processes import ALONE, Processes


def contrastive_loss(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, processes: Processes = ALONE
) -> Tensor:
    """Symmetric cross-entropy of each image's text among the batch's, and the reverse (ITC).

    With several processes, this one's part of it: its own rows among the rows of all.
    """
    if processes.size == 1:
        logits_BB = logit_scale.exp() * image_BE @ text_BE.T
        targets = torch.arange(len(logits_BB), device=logits_BB.device)
        return (F.cross_entropy(logits_BB, targets) + F.cross_entropy(logits_BB.T, targets)) / 2
    to_text, to_image = contrasts(image_BE, text_BE, logit_scale, processes)
    targets = torch.arange(len(to_text), device=to_text.device) + processes.rank * len(to_text)
    total = F.cross_entropy(to_text, targets) + F.cross_entropy(to_image, targets)
    return total / (2 * processes.size)


def contrasts(
    image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Scaled similarities of this process's images to all texts, and of its texts to all images."""
    images, texts = processes.gather(image_BE.float()), processes.gather(text_BE.float())
    scale = logit_scale.exp()
    return scale * image_BE.float() @ texts.T, scale * text_BE.float() @ images.T


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


def masked_word_loss(
    model: ModalityModel, states_BTD: Tensor, labels_BT: Tensor, processes: Processes = ALONE
) -> Tensor:
    """Cross-entropy of the hidden words (MLM), of all processes' words; 0 if none is hidden."""
    hidden = labels_BT != IGNORED
    logits_NV = model.masked_word_logits(states_BTD[hidden])
    total = F.cross_entropy(logits_NV, labels_BT[hidden], reduction="sum")
    return total / _over_all(hidden.sum(), processes).clamp(min=1)


def _over_all(count: Tensor, processes: Processes) -> Tensor:
    processes.add_up([count])
    return count


def pretraining_losses(
    model: ModalityModel,
    batch: dict[str, Tensor],
    *,
    mask_token_id: int,
    mask_probability: float,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Compute one batch's losses: `contrastive` (ITC), `masked_words` (MLM), `statements` (ITM).

    A batch has `pixel_values`, `input_ids` and `attention_mask` of its captions, and
    `statement_ids`, `statement_mask` and `statement_labels` (1 = true) of one statement per image.
    The lower blocks run once on the images and once on all texts, because in them the dual-encoder
    pass and the joint pass are the same.

    With several processes, each given the whole batch, this one's part of the losses, from its
    share of the batch; the sum over the processes is the loss.
    """
    lower = model.config.num_single_layers
    hidden_ids, labels = mask_words(
        batch["input_ids"], batch["attention_mask"], mask_token_id, mask_probability, generator
    )
    batch = processes.share({**batch, "hidden_ids": hidden_ids, "labels": labels})
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden_ids, labels = batch["hidden_ids"], batch["labels"]
    all_masks = torch.cat([mask, mask, batch["statement_mask"]])
    image = model.image_states(batch["pixel_values"], lower)
    text = model.text_states(torch.cat([ids, hidden_ids, batch["statement_ids"]]), all_masks, lower)
    num = len(ids)
    image_BE = model.embed_image(model.run_blocks(image, "v", lower, None))
    text_BE = model.embed_text(model.run_blocks(text[:num], "l", lower, None, key_mask(mask)))
    joint = model.join_states(torch.cat([image, image]), text[num:], all_masks[num:])
    return {
        "contrastive": contrastive_loss(image_BE, text_BE, model.logit_scale, processes),
        "masked_words": masked_word_loss(model, joint[:num, : ids.shape[1]], labels, processes),
        "statements": F.cross_entropy(
            model.statement_logits(joint[num:]), batch["statement_labels"]
        )
        / processes.size,
    }


def distillation_losses(
    student: ModalityModel,
    teacher: ModalityModel,
    batch: dict[str, Tensor],
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Measure how far the student's outputs are from the teacher's; no labels are needed.

    The losses are Kullback-Leibler divergences of three distributions: which text of the batch
    belongs to an image and the reverse, which word stands at each token, and whether the text is
    true. With several processes the batch is this one's share, and so are the losses.
    """
    inputs = batch["pixel_values"], batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        taught = teacher(*inputs)
        taught_contrasts = _contrasts_of(teacher, taught, processes)
    learned = student(*inputs)
    to_text, to_image = (
        _divergence(ours, theirs, processes)
        for ours, theirs in zip(
            _contrasts_of(student, learned, processes), taught_contrasts, strict=True
        )
    )
    tokens = batch["attention_mask"].bool()
    return {
        "contrastive": (to_text + to_image) / 2,
        "masked_words": _divergence(
            learned.masked_word_logits[tokens], taught.masked_word_logits[tokens], processes
        ),
        "statements": _divergence(learned.statement_logits, taught.statement_logits, processes),
    }


def _contrasts_of(
    model: ModalityModel, output: ModalityOutput, processes: Processes
) -> tuple[Tensor, Tensor]:
    image_BE, text_BE = output.image_embeddings, output.text_embeddings
    assert image_BE is not None
    assert text_BE is not None
    if processes.size > 1:
        return contrasts(image_BE, text_BE, model.logit_scale, processes)
    logits_BB = model.logit_scale.exp() * image_BE @ text_BE.T
    return logits_BB, logits_BB.T


def _divergence(logits_NC: Tensor, target_logits_NC: Tensor, processes: Processes) -> Tensor:
    """Mean Kullback-Leibler divergence from the targets' distributions, of all processes."""
    total = F.kl_div(
        logits_NC.log_softmax(-1),
        target_logits_NC.log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    num = torch.tensor(len(logits_NC), device=logits_NC.device)
    return total / _over_all(num, processes)
