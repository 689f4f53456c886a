"""Choose the symmetry by the merge's own error: gauges that make least-squares merging cheap.

docs/gauge.md explains the idea and how to read the diagnostics.
"""

from alloy.errors import GaugeError
from alloy.gauge.search import Gauge, merge_layers, search_gauge
from alloy.gauge.starts import STARTS
from alloy.gauge.streams import StreamUse

__all__ = ["STARTS", "Gauge", "GaugeError", "StreamUse", "merge_layers", "search_gauge"]
