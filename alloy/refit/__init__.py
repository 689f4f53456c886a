"""Layers of a merged model refitted to its parents: least squares, sensitivities, repair.

`fit_layers` fits a student's layers to what teachers' layers compute. `repair` has what is done to
a merged model after its weights have been averaged.
"""

from alloy.refit import repair
from alloy.refit.least_squares import fit_layers, loaded
from alloy.refit.lessons import Lesson, Sensitivity, Teacher, Units
from alloy.refit.linear_layer import LinearLayer, fittable_layers
from alloy.refit.sensitivity import Answers, sensitivities
from alloy.refit.tracing import layers_in_order
from alloy.refit.units import units_between

__all__ = [
    "Answers",
    "Lesson",
    "LinearLayer",
    "Sensitivity",
    "Teacher",
    "Units",
    "fit_layers",
    "fittable_layers",
    "layers_in_order",
    "loaded",
    "repair",
    "sensitivities",
    "units_between",
]
