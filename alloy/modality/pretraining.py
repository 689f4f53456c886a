"""Objectives of arXiv:2304.14933's pre-training, which need images and captions and nothing else.

Contrast among the batch of all processes, by both pairs of projections; matching of images and
texts, the wrong ones drawn among those that the contrast finds alike (ITM); whole words hidden
(MLM). Texts alone and images alone are for pre-training in stages.

Shapes: B batch of this process, G of all processes, T text tokens, P patches, I image tokens,
D hidden, E embedding.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from alloy.modality.layers import as_floats
from alloy.modality.masking import Masking, mask_whole_words
from alloy.modality.modeling import ModalityModel, key_mask
from alloy.modality.objectives import contrastive_loss, contrasts, masked_word_loss
from alloy.processes import ALONE, Processes

Batch = Mapping[str, Tensor]


def caption_losses(
    model: ModalityModel,
    batch: Batch,
    masking: Masking,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Losses of images and their captions: `contrastive`, `matching`, `masked_words`.

    The batch is this process's own; so are the losses, whose sum over the processes counts. The
    lower blocks run once on the images and once on captions with and without hidden words. Each
    image is matched with its text, with a wrong one, and each text with a wrong image.

    Raises:
        ValueError: a model whose lower blocks see both modalities: contrast and matching would not
            share their states.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    hidden_ids, labels = _hidden_words(ids, mask, masking, generator, processes)
    lower, num = model.config.num_single_layers, len(ids)
    image = model.image_states(batch["pixel_values"], lower)
    text = model.text_states(torch.cat([ids, hidden_ids]), torch.cat([mask, mask]), lower)
    text, hidden = text[:num], text[num:]
    image_BE = model.embed_image(model.run_blocks(image, "v", lower, None))
    text_BE = model.embed_text(model.run_blocks(text, "l", lower, None, key_mask(mask)))
    contrastive = contrastive_loss(image_BE, text_BE, model.logit_scale, processes)
    if model.config.joint_contrast:
        pair = model.embed_jointly(image, text, mask)
        second = contrastive_loss(*pair, model.joint_logit_scale, processes)
        contrastive = (contrastive + second) / 2
    to_text, to_image = wrong_partners(image_BE, text_BE, model.logit_scale, generator, processes)
    other_text, other_mask = _texts_of(model, text, batch, to_text, processes)
    joint = model.join_states(
        torch.cat([image, image, image, _images_of(model, image, batch, to_image, processes)]),
        torch.cat([hidden, text, other_text, text]),
        torch.cat([mask, mask, other_mask, mask]),
    )
    is_true = torch.arange(3 * num, device=joint.device) < num
    matching = F.cross_entropy(model.statement_logits(joint[num:]), is_true.long())
    return {
        "contrastive": contrastive,
        "matching": matching / processes.size,
        "masked_words": masked_word_loss(model, joint[:num, : ids.shape[1]], labels, processes),
    }


def _hidden_words(
    ids_BT: Tensor,
    mask_BT: Tensor,
    masking: Masking,
    generator: torch.Generator,
    processes: Processes,
) -> tuple[Tensor, Tensor]:
    """Hide words of all processes' texts alike, so that results do not depend on their number."""
    all_ids, all_masks = processes.gather(ids_BT), processes.gather(mask_BT)
    hidden, labels = mask_whole_words(all_ids, all_masks, masking, generator)
    own = slice(processes.rank * len(ids_BT), (processes.rank + 1) * len(ids_BT))
    return hidden[own], labels[own]


@torch.no_grad()
def wrong_partners(
    image_BE: Tensor,
    text_BE: Tensor,
    logit_scale: Tensor,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """Draw a wrong text for each image and a wrong image for each text, the likelier the closer.

    Returns:
        Their places in the batch of all processes, [B] each.
    """
    num, first = len(image_BE), processes.rank * len(image_BE)
    if num * processes.size == 1:
        raise ValueError("a batch of one has no wrong pairs: batch_size must be 2 or more")
    own = torch.arange(num, device=image_BE.device)
    drawn = []
    for similar_BG in contrasts(image_BE, text_BE, logit_scale, processes):
        similar_BG[own, own + first] = float("-inf")
        chance_GG = processes.gather(similar_BG.float().softmax(1)).cpu()
        places = torch.multinomial(chance_GG, 1, generator=generator)[:, 0]
        drawn.append(places[first : first + num].to(image_BE.device))
    return drawn[0], drawn[1]


def _images_of(
    model: ModalityModel, image_BID: Tensor, batch: Batch, places: Tensor, processes: Processes
) -> Tensor:
    """The lower blocks' states of images of the whole batch; others' are computed here."""
    if processes.size == 1:
        return image_BID[places]
    pixels = processes.gather(batch["pixel_values"])[places]
    return model.image_states(pixels, model.config.num_single_layers)


def _texts_of(
    model: ModalityModel, text_BTD: Tensor, batch: Batch, places: Tensor, processes: Processes
) -> tuple[Tensor, Tensor]:
    if processes.size == 1:
        return text_BTD[places], batch["attention_mask"][places]
    ids, mask = (processes.gather(batch[n])[places] for n in ("input_ids", "attention_mask"))
    return model.text_states(ids, mask, model.config.num_single_layers), mask


def text_losses(
    model: ModalityModel,
    batch: Batch,
    masking: Masking,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Loss of texts alone: hidden words, by all blocks' experts of texts."""
    mask = batch["attention_mask"]
    hidden, labels = _hidden_words(batch["input_ids"], mask, masking, generator, processes)
    states = model.final_norm(model.text_states(hidden, mask), "l")
    return {"masked_words_of_texts": masked_word_loss(model, states, labels, processes)}


def image_losses(
    model: ModalityModel,
    batch: Batch,
    share: float,
    generator: torch.Generator,
    processes: Processes = ALONE,
) -> dict[str, Tensor]:
    """Loss of images alone: the pixels of hidden patches, by L1 distance (SimMIM, 2111.09886).

    BEiT predicts the tokens of an image tokenizer instead, which is a model of its own.
    """
    pixels_BCHW = batch["pixel_values"]
    num, first = len(pixels_BCHW), processes.rank * len(pixels_BCHW)
    chance = torch.rand((num * processes.size, model.config.num_patches), generator=generator)
    hidden_BP = (chance[first : first + num] < share).to(pixels_BCHW.device)
    states = model.image_states(pixels_BCHW, hidden_BP=hidden_BP)
    patches_BPC = patches_of(as_floats(pixels_BCHW, states.dtype), model.config.patch_size)
    distance_BP = (model.patch_logits(states) - patches_BPC).abs().mean(-1)
    total = hidden_BP.sum()
    processes.add_up([total])
    return {"masked_patches": (distance_BP * hidden_BP).sum() / total.clamp(min=1)}


def patches_of(pixels_BCHW: Tensor, size: int) -> Tensor:
    """Images as rows of patches, [B, P, C size size], in the order of the image's tokens."""
    return F.unfold(pixels_BCHW, size, stride=size).transpose(1, 2)
