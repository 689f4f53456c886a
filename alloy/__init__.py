"""Merge transformers that were trained apart: tensors in, tensors out.

Packages are nouns (`alloy.symmetry`, `alloy.merging`), functions are verbs (`alloy.merge`,
`alloy.align`). The names below are loaded at first use, so `import alloy` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alloy.alignment.presets import align_models
    from alloy.alignment.result import Alignment
    from alloy.alignment.search import align
    from alloy.checkpoint.run import merge_checkpoints
    from alloy.errors import AlloyError
    from alloy.gauge import search_gauge
    from alloy.measures.distances import distance
    from alloy.merging.apply import merge
    from alloy.statistics.collection import collect
    from alloy.statistics.sums import Statistics
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

__version__ = "0.2.0"

__all__ = [
    "Alignment",
    "AlloyError",
    "Statistics",
    "SymmetrySpec",
    "__version__",
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
    "align_models": "alloy.alignment.presets",
    "Alignment": "alloy.alignment.result",
    "align": "alloy.alignment.search",
    "merge_checkpoints": "alloy.checkpoint.run",
    "AlloyError": "alloy.errors",
    "search_gauge": "alloy.gauge",
    "distance": "alloy.measures.distances",
    "merge": "alloy.merging.apply",
    "collect": "alloy.statistics.collection",
    "Statistics": "alloy.statistics.sums",
    "SymmetrySpec": "alloy.symmetry",
    "add_norm_matrices": "alloy.symmetry",
    "compose": "alloy.symmetry",
    "find_symmetries": "alloy.symmetry",
    "fold_norms": "alloy.symmetry",
    "identity": "alloy.symmetry",
    "invert": "alloy.symmetry",
    "random_transforms": "alloy.symmetry",
    "transport": "alloy.symmetry",
    "unfold_norms": "alloy.symmetry",
    "validate": "alloy.symmetry",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
