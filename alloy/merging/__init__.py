"""Merge methods, one function each, and `merge`, which applies one to whole models.

What runs a merge is loaded when it is first used: checking one needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alloy.errors import MergeError
    from alloy.merging.apply import merge, merge_tensor
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
    "oriented",
    "validate",
]

_HOMES = {
    "MergeError": "alloy.errors",
    "merge": "alloy.merging.apply",
    "merge_tensor": "alloy.merging.apply",
    "oriented": "alloy.merging.check",
    "validate": "alloy.merging.check",
    "fisher_diagonal": "alloy.merging.fisher",
    "MergeMethod": "alloy.merging.method",
    "MergeSettings": "alloy.merging.method",
    "Option": "alloy.merging.method",
    "MERGE_METHODS": "alloy.merging.methods",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
