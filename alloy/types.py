"""The words that every module shares."""

from collections.abc import Mapping

from torch import Tensor

Weights = Mapping[str, Tensor]
"""A state dict: parameter name to tensor. ("params" are files.)"""
