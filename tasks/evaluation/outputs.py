"""Answers of models of any architecture, in a form that models can be compared by.

A model with `logits` answers with these; any other with its first output, such as its last hidden
state. Shapes: R rows (an example, or a token that is no padding), C classes, words or features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.symmetry import observe_outputs


class Answers(NamedTuple):
    """`rows` [R, C], maybe logits; the example of each row and its place in it, [R]."""

    rows: Tensor
    are_logits: bool
    examples: Tensor
    places: Tensor


@torch.no_grad()
def answers(model: nn.Module, inputs: Mapping[str, Tensor]) -> Answers:
    """A model's answers to one batch, float32, on the CPU."""
    return read(model(**beside(model, inputs)), inputs)


def read(output: Any, inputs: Mapping[str, Tensor]) -> Answers:
    """The answers in a model's output; padding tokens give none.

    Raises ValueError for an output without any tensor of numbers.
    """
    logits = getattr(output, "logits", None)
    tensors = [logits] if isinstance(logits, Tensor) else observe_outputs(output)
    if not tensors:
        raise ValueError(f"{type(output).__name__} has no tensor of numbers to compare models by")
    tensor = tensors[0].float().cpu()
    num = len(next(iter(inputs.values())))
    if len(tensor) != num:
        raise ValueError(
            f"the first output of {type(output).__name__} has {len(tensor)} rows for {num} examples"
        )
    if tensor.dim() == 4:  # maps [N, C, H, W]: a pixel is a row
        tensor = tensor.flatten(2).transpose(1, 2)
    tensor_NTC = tensor.reshape(num, -1, tensor.shape[-1])
    kept = torch.ones(tensor_NTC.shape[:2], dtype=torch.bool)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is not None and mask.shape == kept.shape:
        kept = mask.cpu().bool()
    examples, places = kept.nonzero(as_tuple=True)
    return Answers(tensor_NTC[kept], isinstance(logits, Tensor), examples, places)


def by_length(examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort texts that are padded on the right, shortest first, with their labels; others stay."""
    mask = examples.get("attention_mask")
    if mask is None or not _ends_in_padding(mask):
        return dict(examples)
    order = mask.sum(dim=1).argsort(stable=True)
    return {name: tensor[order] for name, tensor in examples.items()}


def trimmed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Texts without the columns at the end that are padding in all of them."""
    mask = batch.get("attention_mask")
    if mask is None or not _ends_in_padding(mask):
        return dict(batch)
    longest = int(mask.sum(dim=1).max())
    return {
        name: tensor[:, :longest] if tensor.shape[:2] == mask.shape else tensor
        for name, tensor in batch.items()
    }


def _ends_in_padding(mask: Tensor) -> bool:
    """True if any padding is on the right and no text is empty."""
    return mask.dim() == 2 and bool((mask[:, :1] == 1).all() and (mask.diff(dim=1) <= 0).all())
