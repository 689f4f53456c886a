"""The modality transformer and its experts."""

from alloy.modality.configuration import EXPERT_PARTS, ModalityConfig
from alloy.modality.experts import (
    MODALITIES,
    agnostic_config,
    copy_to_experts,
    join,
    shared_weights,
    split_experts,
)
from alloy.modality.modeling import FRESH_HEADS, ModalityModel, ModalityOutput
from alloy.modality.resizing import resize_images
from alloy.modality.towers import Release, Tower, import_release, import_tower, join_towers

__all__ = [
    "EXPERT_PARTS",
    "FRESH_HEADS",
    "MODALITIES",
    "ModalityConfig",
    "ModalityModel",
    "ModalityOutput",
    "Release",
    "Tower",
    "agnostic_config",
    "copy_to_experts",
    "import_release",
    "import_tower",
    "join",
    "join_towers",
    "resize_images",
    "shared_weights",
    "split_experts",
]
