"""Layers of a checkpoint's architecture: which of them an adapter of PEFT can hold, and how."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from alloy.checkpoint.checks.rows import is_embedding
from alloy.checkpoint.config import skeleton, stored_names
from alloy.checkpoint.format import Checkpoint

Kind = Literal["linear", "turned", "embedding", "module", "container"]
"""A linear layer; one stored [in, out]; embeddings; another module, without or with children."""
LAYERS = ("linear", "turned", "embedding")
"""The kinds that can get a LoRA."""


def names_of(base: Checkpoint) -> dict[str, str]:
    """The model's own name, which PEFT writes, of every tensor that a file names."""
    names = {stored: name for name, stored in stored_names(base.config).items()}
    return names or {name: name for name in base.entries}


def kinds_of(base: Checkpoint) -> dict[str, Kind]:
    """The kind of every module that has weights of its own, by the model's name.

    An architecture that transformers lacks is known by its tensors alone: matrices are of linear
    layers, or of embeddings by their name.
    """
    model = skeleton(base.config)
    if model is None:
        return _by_shape(base)
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def of(module: nn.Module) -> Kind:
        if isinstance(module, nn.Linear):
            return "linear"
        if isinstance(module, Conv1D):
            return "turned"
        if isinstance(module, nn.Embedding):
            return "embedding"
        return "container" if any(module.children()) else "module"

    return {
        name: of(module)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }


def within(names: Mapping[str, str], containers: Iterable[str]) -> set[str]:
    """The files' names of the tensors that lie in one of these modules of the model."""
    prefixes = tuple(f"{container}." for container in containers)
    return {stored for stored, name in names.items() if name.startswith(prefixes)}


def _by_shape(base: Checkpoint) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, entry in base.entries.items():
        module, _, parameter = name.rpartition(".")
        if parameter == "weight" and len(entry.shape) == 2:
            kinds[module] = "embedding" if is_embedding(name) else "linear"
        else:
            kinds.setdefault(module, "module")
    return kinds
