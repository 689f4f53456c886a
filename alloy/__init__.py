"""Merge transformers that were trained apart: tensors in, tensors out."""
