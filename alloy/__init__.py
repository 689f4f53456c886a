"""Merge transformers that were trained apart: tensors in, tensors out.

The names below are loaded when they are first used, so `import alloy` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alloy.align import align
    from alloy.alignment import Alignment
    from alloy.checkpoint import merge_checkpoints
    from alloy.collect import collect
    from alloy.distance import distance
    from alloy.gauge import search_gauge
    from alloy.merge import merge
    from alloy.presets import align_models
    from alloy.statistics import Statistics
    from alloy.symmetry import (
        SymmetrySpec,
        add_norm_matrices,
        compose,
        find_symmetries,
        fold_norms,
        identity,
        invert,
        random_transforms,
        transport,
        unfold_norms,
        validate,
    )

__all__ = [
    "Alignment",
    "Statistics",
    "SymmetrySpec",
    "add_norm_matrices",
    "align",
    "align_models",
    "collect",
    "compose",
    "distance",
    "find_symmetries",
    "fold_norms",
    "identity",
    "invert",
    "merge",
    "merge_checkpoints",
    "random_transforms",
    "search_gauge",
    "transport",
    "unfold_norms",
    "validate",
]

_HOMES = {
    "Alignment": "alloy.alignment",
    "Statistics": "alloy.statistics",
    "align": "alloy.align",
    "align_models": "alloy.presets",
    "collect": "alloy.collect",
    "distance": "alloy.distance",
    "merge": "alloy.merge",
    "merge_checkpoints": "alloy.checkpoint",
    "search_gauge": "alloy.gauge",
    **dict.fromkeys(
        (
            "SymmetrySpec",
            "add_norm_matrices",
            "compose",
            "find_symmetries",
            "fold_norms",
            "identity",
            "invert",
            "random_transforms",
            "transport",
            "unfold_norms",
            "validate",
        ),
        "alloy.symmetry",
    ),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'alloy' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


class _Package(ModuleType):
    """`alloy.merge` is the function even though `alloy/merge` is a package.

    Python binds a submodule to its name in the package once it is imported; where one of our functions
    has that name, the function stays. `from alloy.merge import ...` finds the module as always.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
