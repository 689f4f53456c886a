"""Low-rank adapters by themselves: extracted from a fine-tune, and merged with each other.

What puts one on its base, `base+adapter`, is `alloy.checkpoint`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alloy.adapters.extract import ExtractReport, extract_adapter

__all__ = ["ExtractReport", "extract_adapter"]

_HOMES = {
    "ExtractReport": "alloy.adapters.extract",
    "extract_adapter": "alloy.adapters.extract",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
