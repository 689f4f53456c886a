"""Merge methods, one function each, and `merge`, which applies one to whole models."""

from alloy.merge._merge import merge, merge_tensor, validate
from alloy.merge._method import MergeError, MergeMethod, MergeSettings, Option
from alloy.merge.fisher import fisher_diagonal
from alloy.merge.methods import MERGE_METHODS

__all__ = [
    "MERGE_METHODS",
    "MergeError",
    "MergeMethod",
    "MergeSettings",
    "Option",
    "fisher_diagonal",
    "merge",
    "merge_tensor",
    "validate",
]
