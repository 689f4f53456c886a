"""Units of one model spread over those of another by optimal transport: plans and the search."""
