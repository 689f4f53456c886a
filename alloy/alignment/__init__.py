"""Units of models trained apart, brought together: similarities, the search, zips and transport."""
