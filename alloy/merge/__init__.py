"""Merge methods: one function each, and `merge`, which applies one to whole models."""
