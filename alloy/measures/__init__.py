"""Distances of models: of their weights, and of the loss between them."""
