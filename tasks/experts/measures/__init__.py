"""Benchmarks of recipes of kind experts."""
