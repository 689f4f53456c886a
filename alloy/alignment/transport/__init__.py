"""Units of one model spread over those of another by optimal transport: plans and the search."""

from alloy.alignment.transport.plan import transport_plan
from alloy.alignment.transport.search import TransportSearch, TransportSettings

__all__ = ["TransportSearch", "TransportSettings", "transport_plan"]
