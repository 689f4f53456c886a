"""Low-rank adapters by themselves: extracted from a fine-tune, and merged with each other.

What puts one on its base, `base+adapter`, is `alloy.checkpoint`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alloy.adapters.extract import ExtractReport, extract_adapter
    from alloy.adapters.merge import AdapterMergeReport, merge_adapters

__all__ = ["AdapterMergeReport", "ExtractReport", "extract_adapter", "merge_adapters"]

_HOMES = {
    "AdapterMergeReport": "alloy.adapters.merge",
    "ExtractReport": "alloy.adapters.extract",
    "extract_adapter": "alloy.adapters.extract",
    "merge_adapters": "alloy.adapters.merge",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
