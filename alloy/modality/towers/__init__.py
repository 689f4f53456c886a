"""Towers of other models as modality transformers, and back."""

from alloy.modality.towers.importing import Tower, import_tower

__all__ = ["Tower", "import_tower"]
