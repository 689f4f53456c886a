"""Named settings of the search, for any number of models: `align_models` and PRESETS.

A preset is a dataclass of settings that runs them. docs/alignment.md says what each preset is,
where it comes from and when to use it.
"""

from alloy.alignment.presets.descent import SHARES, Descent, Score
from alloy.alignment.presets.identity import Identity
from alloy.alignment.presets.maps import Transport, Zip
from alloy.alignment.presets.preset import CollectedStatistics, Given, Preset
from alloy.alignment.presets.registry import PRESETS, align_models
from alloy.alignment.presets.universe import Universe

__all__ = [
    "PRESETS",
    "SHARES",
    "CollectedStatistics",
    "Descent",
    "Given",
    "Identity",
    "Preset",
    "Score",
    "Transport",
    "Universe",
    "Zip",
    "align_models",
]
