"""Loading, statistics and alignment for several stages of recipes of kind experts."""
