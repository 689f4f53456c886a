"""The words that every module shares."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Weights = Mapping[str, Tensor]
"""A state dict: parameter name to tensor. ("params" are files.)"""

Batch = Mapping[str, Tensor]
"""Keyword inputs of a model's forward, one row for each example."""


class AlignedWeights(dict[str, Tensor]):
    """A state dict in the units of an alignment, which Grams that are merged with it must share.

    `units` names the alignment; a copy as a plain dict forgets it, and counts as of any units.
    """

    def __init__(self, weights: Weights, units: str) -> None:
        super().__init__(weights)
        self.units = units
