"""Masks of the samples of an activation that are padding.

An `attention_mask` [batch, tokens] is of every activation with those tokens, a
`decoder_attention_mask` of those of the decoder; without one all `decoder_input_ids` count. An
activation with other tokens (image patches, a pooled state) has no padding. Tokens may come before
examples (XLNet); where there are equally many of both, examples are taken to come first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alloy.errors import MaskError


class Masks:
    """The masks of a batch, and which activations they are of.

    Raises:
        MaskError: a mask that is not [batch, tokens].
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.masks = {k: v for k, v in inputs.items() if k.endswith("attention_mask")}
        for name, mask in self.masks.items():
            if mask.ndim != 2:
                raise MaskError(
                    f"{name} has shape {tuple(mask.shape)}; padding is masked by [batch, tokens]"
                )
        decoded = inputs.get("decoder_input_ids")
        if decoded is not None and "decoder_attention_mask" not in self.masks:
            self.masks["decoder_input_ids"] = torch.ones_like(decoded)
        self.pending = {name for name, mask in self.masks.items() if not mask.all()}

    @property
    def unused(self) -> bool:
        """True if no activation has the tokens of the mask."""
        return bool(self.pending)

    def kept(self, units: Tensor) -> Tensor:
        """The samples that are no padding, as [N, D]; `units` are [..., D].

        Raises:
            MaskError: two masks of this shape that hide different tokens.
        """
        samples = units.shape[:-1]
        fitting = {name: m for name, m in self.masks.items() if m.shape == samples[:2]}
        fitting = fitting or {n: m.T for n, m in self.masks.items() if m.T.shape == samples[:2]}
        flat = {name: m for name, m in self.masks.items() if samples == (m.numel(),)}
        fits = list((fitting or flat).items())
        if not fits:
            return units.reshape(-1, units.shape[-1])
        name, mask = fits[0]
        for other, second in fits[1:]:
            if not torch.equal(mask.bool(), second.bool()):
                raise MaskError(
                    f"{name} and {other} have the same shape {tuple(mask.shape)} and mask "
                    "different tokens: "
                    "pad one of them further, so that activations tell which they are of"
                )
        self.pending.difference_update(name for name, _ in fits)
        if mask.all():
            return units.reshape(-1, units.shape[-1])
        where = mask.bool() if fitting else mask.bool().flatten()
        return units[where].reshape(-1, units.shape[-1])
