"""One forward pass for each modality's experts, and the answers behind it.

Images run through the v experts, texts through the l experts, pairs through the vl experts of the
joint blocks; any other pass would show an expert inputs that it never has to deal with. The
pre-trained heads read the states at the end of a pass, and what they answer is what merging should
keep.

Shapes: B batch, T text tokens, I image tokens, S any sequence, N words, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.modality.experts import expert_name, split_experts
from alloy.modality.modeling import ModalityModel
from alloy.types import Batch

"""`pixel_values`, `input_ids`, `attention_mask`, of which image i and text i belong together; and
`HIDDEN` where words are hidden."""

HIDDEN = "hidden_mask"
"""A batch's mask [B, T] of the words behind the mask token; without it every word is an answer."""


@dataclass(frozen=True)
class Pass:
    """One modality's forward pass, and the heads behind it."""

    forward: Callable[[ModalityModel, Batch], Tensor]
    """States [B, S, D] in the modality's own stream."""
    mask: Callable[[ModalityModel, Batch], Tensor | None]
    """Mask [B, S] of the states that are not padding; None if none is."""
    answers: Callable[[ModalityModel, Batch, Tensor], tuple[Tensor, ...]]
    """Answers of the pre-trained heads, given the states."""
    heads: tuple[str, ...]
    """Linear layers of the heads, which read this modality's stream alone."""


def _image_states(model: ModalityModel, batch: Batch) -> Tensor:
    return model.image_states(batch["pixel_values"])


def _text_states(model: ModalityModel, batch: Batch) -> Tensor:
    return model.text_states(batch["input_ids"], batch["attention_mask"])


def _pair_states(model: ModalityModel, batch: Batch) -> Tensor:
    return model.encode_joint(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


def _pair_mask(model: ModalityModel, batch: Batch) -> Tensor:
    mask_BT = batch["attention_mask"]
    return torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), model.config.num_image_tokens)], 1)


def _image_answers(model: ModalityModel, batch: Batch, states_BID: Tensor) -> tuple[Tensor]:
    del batch
    return (model.embed_image(states_BID),)


def _text_answers(model: ModalityModel, batch: Batch, states_BTD: Tensor) -> tuple[Tensor]:
    del batch
    return (model.embed_text(states_BTD),)


def _pair_answers(model: ModalityModel, batch: Batch, states_BSD: Tensor) -> tuple[Tensor, Tensor]:
    mask_BT = batch["attention_mask"].bool()
    words_NV = model.masked_word_logits(states_BSD[:, : mask_BT.shape[1]][mask_BT])
    if HIDDEN in batch:
        words_NV = words_NV[batch[HIDDEN][mask_BT]]
    return _centred(words_NV), _centred(model.statement_logits(states_BSD))


def _centred(logits: Tensor) -> Tensor:
    """Logits without their mean, which softmax does not see."""
    return logits - logits.mean(-1, keepdim=True)


PASSES: Mapping[str, Pass] = {
    "v": Pass(_image_states, lambda _, batch: None, _image_answers, ("image_projection",)),
    "l": Pass(
        _text_states, lambda _, batch: batch["attention_mask"], _text_answers, ("text_projection",)
    ),
    "vl": Pass(
        _pair_states,
        _pair_mask,
        _pair_answers,
        (
            "masked_word_head.transform",
            "masked_word_head.decoder",
            "pooler",
            "statement_head",
        ),
    ),
}

Answers = Literal["heads", "states"]
"""Outputs that merging should keep: "heads", those of the pre-trained heads; "states", also every
state behind the last block, which heads that are still to be trained may read."""


def answers_of(
    model: ModalityModel, batch: Batch, *, modality: str, kind: Answers = "heads"
) -> tuple[Tensor, ...]:
    """Run one modality's pass and answer: one tensor a head, then (kind "states") the states."""
    own_pass, batch = PASSES[modality], beside(model, batch)
    states_BSD = own_pass.forward(model, batch)
    answers = own_pass.answers(model, batch, states_BSD)
    if kind == "heads":
        return answers
    mask_BS = own_pass.mask(model, batch)
    if modality != "vl":  # there the norm is part of the pass
        states_BSD = model.final_norm(states_BSD, modality)
    return *answers, states_BSD if mask_BS is None else states_BSD[mask_BS.bool()]


def layers_of(model: ModalityModel, modality: str) -> dict[str, str]:
    """Linear layers of a modality's experts: agnostic name to the name in this model."""
    layers = {}
    for name in split_experts(model.state_dict(), model.config)[modality]:
        layer, _, kind = expert_name(name, modality).rpartition(".")
        if kind == "weight" and isinstance(model.get_submodule(layer), nn.Linear):
            layers[name.removesuffix(".weight")] = layer
    return layers
