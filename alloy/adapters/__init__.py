"""Low-rank adapters by themselves: extracted from a fine-tune, and merged with each other.

What puts one on its base, `base+adapter`, is `alloy.checkpoint`.
"""

from typing import TYPE_CHECKING

from alloy.lazy import lazily

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

__getattr__, __dir__ = lazily(__name__, _HOMES)
