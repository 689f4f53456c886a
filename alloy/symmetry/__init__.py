"""Find, check and apply the symmetries of any model that PyTorch can run."""

from alloy.symmetry.discover import find_symmetries
from alloy.symmetry.parts import owned_axes, restrict
from alloy.symmetry.spec import Axis, Space, SymmetryError, SymmetrySpec, unit_view, with_kind
from alloy.symmetry.transforms import (
    Transform,
    Transforms,
    compose,
    identity,
    invert,
    random_transforms,
    transforms_from_tensors,
    transforms_to_tensors,
    transport,
)
from alloy.symmetry.validate import validate

__all__ = [
    "Axis",
    "Space",
    "SymmetryError",
    "SymmetrySpec",
    "Transform",
    "Transforms",
    "compose",
    "find_symmetries",
    "identity",
    "invert",
    "owned_axes",
    "random_transforms",
    "restrict",
    "transforms_from_tensors",
    "transforms_to_tensors",
    "transport",
    "unit_view",
    "validate",
    "with_kind",
]
