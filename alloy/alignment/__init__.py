"""Alignment of the units of models trained apart: similarities, the search and its presets.

`align_models` aligns any number of models by a preset, `align` one model to a reference, and an
`Alignment` says how each comes into one space. Names are loaded when they are first used: reading
an `Alignment` needs neither numba nor scipy's optimisers.
"""

from typing import TYPE_CHECKING

from alloy.lazy import lazily

if TYPE_CHECKING:
    from alloy.alignment.canonical import canonical_transforms
    from alloy.alignment.grams import transport_grams
    from alloy.alignment.matching import MATCHING_METHODS
    from alloy.alignment.presets import PRESETS, Preset, align_models
    from alloy.alignment.report import SpaceAlignment, describe
    from alloy.alignment.result import Alignment
    from alloy.alignment.search import align

__all__ = [
    "MATCHING_METHODS",
    "PRESETS",
    "Alignment",
    "Preset",
    "SpaceAlignment",
    "align",
    "align_models",
    "canonical_transforms",
    "describe",
    "transport_grams",
]

_HOMES = {
    "canonical_transforms": "alloy.alignment.canonical",
    "transport_grams": "alloy.alignment.grams",
    "MATCHING_METHODS": "alloy.alignment.matching",
    "PRESETS": "alloy.alignment.presets",
    "Preset": "alloy.alignment.presets",
    "align_models": "alloy.alignment.presets",
    "SpaceAlignment": "alloy.alignment.report",
    "describe": "alloy.alignment.report",
    "Alignment": "alloy.alignment.result",
    "align": "alloy.alignment.search",
}

__getattr__, __dir__ = lazily(__name__, _HOMES)
