"""Benchmarks of the user's, on models of any kind: text, labels, pairs, harnesses, commands."""
