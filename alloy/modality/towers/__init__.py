"""Towers of other models as modality transformers, and back."""

from alloy.modality.towers.importing import Tower, import_tower
from alloy.modality.towers.joining import join_towers
from alloy.modality.towers.released import Release, import_release

__all__ = ["Release", "Tower", "import_release", "import_tower", "join_towers"]
