"""Checks before a tensor is read: configs, vocabularies, tensors and places."""
