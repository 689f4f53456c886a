"""Statistics of models on calibration data: the points of their units, and streamed sums.

`collect` runs models side by side and returns their `Statistics`.
"""

from alloy.statistics.collection import collect
from alloy.statistics.masks import Masks
from alloy.statistics.moments import CrossMoments, Gram, SampledMoments
from alloy.statistics.sums import JointMoments, Place, Statistics, Warned

__all__ = [
    "CrossMoments",
    "Gram",
    "JointMoments",
    "Masks",
    "Place",
    "SampledMoments",
    "Statistics",
    "Warned",
    "collect",
]
