"""Choose the symmetry by the merge's own error: gauges that make least-squares merging cheap.

docs/gauge.md explains the idea and how to read the diagnostics.
"""

from alloy.gauge.objective import GaugeError
from alloy.gauge.search import STARTS, Gauge, StreamUse, merge_layers, search_gauge

__all__ = ["STARTS", "Gauge", "GaugeError", "StreamUse", "merge_layers", "search_gauge"]
