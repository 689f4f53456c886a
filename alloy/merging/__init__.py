"""Merge methods, one function each, and `merge`, which applies one to whole models.

What runs a merge is loaded when it is first used: checking one needs no torch.
"""

from typing import TYPE_CHECKING

from alloy.lazy import lazily

if TYPE_CHECKING:
    from alloy.errors import MergeError
    from alloy.merging.apply import merge, merge_tensor, merge_tensors
    from alloy.merging.check import oriented, validate
    from alloy.merging.fisher import fisher_diagonal
    from alloy.merging.method import MergeMethod, MergeSettings, Option
    from alloy.merging.methods import MERGE_METHODS

__all__ = [
    "MERGE_METHODS",
    "MergeError",
    "MergeMethod",
    "MergeSettings",
    "Option",
    "fisher_diagonal",
    "merge",
    "merge_tensor",
    "merge_tensors",
    "oriented",
    "validate",
]

_HOMES = {
    "MergeError": "alloy.errors",
    "merge": "alloy.merging.apply",
    "merge_tensor": "alloy.merging.apply",
    "merge_tensors": "alloy.merging.apply",
    "oriented": "alloy.merging.check",
    "validate": "alloy.merging.check",
    "fisher_diagonal": "alloy.merging.fisher",
    "MergeMethod": "alloy.merging.method",
    "MergeSettings": "alloy.merging.method",
    "Option": "alloy.merging.method",
    "MERGE_METHODS": "alloy.merging.methods",
}

__getattr__, __dir__ = lazily(__name__, _HOMES)
