"""Find, check and apply the symmetries of any model that PyTorch can run.

`find_symmetries` traces a model and gives a `SymmetrySpec`: pure data. `transport` applies
transforms of its spaces to weights; `validate` checks that the model's function stays; `fold_norms`
enlarges the group. docs/symmetry.md explains the idea.
"""

from alloy.symmetry.diagonal import Diagonal, Factor
from alloy.symmetry.draws import random_transforms
from alloy.symmetry.fold import add_norm_matrices, fold_norms, unfold_norms
from alloy.symmetry.names import display_names
from alloy.symmetry.spec import (
    Axis,
    Fold,
    Leaf,
    Pinned,
    Product,
    Space,
    Sum,
    SymmetryError,
    SymmetrySpec,
    differences,
    require_equal,
    unit_view,
    with_kind,
)
from alloy.symmetry.tracing.discover import find_symmetries
from alloy.symmetry.tracing.recording.observe import observe_outputs
from alloy.symmetry.transforms import (
    Transform,
    Transforms,
    compose,
    identity,
    invert,
    transforms_from_tensors,
    transforms_to_tensors,
    transport,
)
from alloy.symmetry.validate import NotProvenError, Validation, validate

__all__ = [
    "Axis",
    "Diagonal",
    "Factor",
    "Fold",
    "Leaf",
    "NotProvenError",
    "Pinned",
    "Product",
    "Space",
    "Sum",
    "SymmetryError",
    "SymmetrySpec",
    "Transform",
    "Transforms",
    "Validation",
    "add_norm_matrices",
    "compose",
    "differences",
    "display_names",
    "find_symmetries",
    "fold_norms",
    "identity",
    "invert",
    "observe_outputs",
    "random_transforms",
    "require_equal",
    "transforms_from_tensors",
    "transforms_to_tensors",
    "transport",
    "unfold_norms",
    "unit_view",
    "validate",
    "with_kind",
]
