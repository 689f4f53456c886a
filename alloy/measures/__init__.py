"""Measures of models: distances of their weights, the loss between them, agreement of answers.

`choose` takes the simplest of several merges, unless measures on held-out data say that another is
better; `choose_by_values` does so by values that were measured already, such as hits of labels.
"""

from alloy.measures.choice import Choice, Gain, answers_of, choose, choose_by_values
from alloy.measures.distances import Distances, ModelDistances, distance
from alloy.measures.encoders import (
    ENCODER_MEASURES,
    explained_variance,
    neighbour_agreement,
    similarity_agreement,
)
from alloy.measures.landscape import barrier, mean_measures, path, plane

__all__ = [
    "ENCODER_MEASURES",
    "Choice",
    "Distances",
    "Gain",
    "ModelDistances",
    "answers_of",
    "barrier",
    "choose",
    "choose_by_values",
    "distance",
    "explained_variance",
    "mean_measures",
    "neighbour_agreement",
    "path",
    "plane",
    "similarity_agreement",
]
