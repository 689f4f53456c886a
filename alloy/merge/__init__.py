"""Merge methods, one function each, and `merge`, which applies one to whole models.

What runs a merge is loaded when it is first used: checking one needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from alloy.merge._check import oriented, validate
from alloy.merge._method import MergeError, MergeMethod, MergeSettings, Option
from alloy.merge.methods import MERGE_METHODS

if TYPE_CHECKING:
    from alloy.merge._merge import merge, merge_tensor
    from alloy.merge.fisher import fisher_diagonal

__all__ = [
    "MERGE_METHODS",
    "MergeError",
    "MergeMethod",
    "MergeSettings",
    "Option",
    "fisher_diagonal",
    "merge",
    "merge_tensor",
    "oriented",
    "validate",
]

_HOMES = {"fisher_diagonal": "fisher", "merge": "_merge", "merge_tensor": "_merge"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
