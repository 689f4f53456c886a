"""Merge transformers that were trained apart: tensors in, tensors out.

Packages are nouns (`alloy.symmetry`, `alloy.merging`), functions are verbs (`alloy.merge`,
`alloy.align`). The names below are loaded at first use, so `import alloy` costs nothing.
"""

from typing import TYPE_CHECKING

from alloy.lazy import lazily

if TYPE_CHECKING:
    from alloy.alignment.presets import align_models
    from alloy.alignment.result import Alignment
    from alloy.alignment.search import align
    from alloy.checkpoint.run import merge_checkpoints
    from alloy.errors import AlloyError
    from alloy.gauge import search_gauge
    from alloy.measures.distances import distance
    from alloy.merging.apply import merge
    from alloy.modality.sharing import load_shared
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
    from alloy.trunk import Member, Trunk, TrunkPlan, merge_trunk, plan_trunk

__version__ = "0.2.0"

__all__ = [
    "Alignment",
    "AlloyError",
    "Member",
    "Statistics",
    "SymmetrySpec",
    "Trunk",
    "TrunkPlan",
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
    "load_shared",
    "merge",
    "merge_checkpoints",
    "merge_trunk",
    "plan_trunk",
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
    "load_shared": "alloy.modality.sharing",
    "Member": "alloy.trunk",
    "Trunk": "alloy.trunk",
    "TrunkPlan": "alloy.trunk",
    "merge_trunk": "alloy.trunk",
    "plan_trunk": "alloy.trunk",
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

__getattr__, __dir__ = lazily(__name__, _HOMES)
