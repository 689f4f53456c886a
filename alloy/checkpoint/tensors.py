"""Tensors of a checkpoint in memory, for those who need whole weights rather than a stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alloy.checkpoint.adapter.source import open_source
from alloy.checkpoint.format import Entry
from alloy.checkpoint.ranges.files import open_file

if TYPE_CHECKING:
    import torch

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
"""The name in torch of every dtype of the format."""


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, or of `base+adapter`, by name.

    Raises:
        CheckpointError: as `open_source`.
    """
    return {name: load_tensor(entry) for name, entry in open_source(path).entries.items()}


def load_tensor(entry: Entry) -> torch.Tensor:
    """One stored tensor, in memory of its own."""
    import torch

    data = bytearray(entry.num_bytes)
    if entry.fold is not None:
        _read_folded(entry, data)
    else:
        file = open_file(entry.file)
        try:
            file.read_into(memoryview(data), entry.start)
        finally:
            file.close()
    dtype = getattr(torch, TORCH_DTYPES[entry.dtype])
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def _read_folded(entry: Entry, data: bytearray) -> None:
    """A tensor as its adapter changes it."""
    import numpy as np

    from alloy.checkpoint.adapter.compute import Input

    source = Input(entry)
    try:
        source.read(0, np.frombuffer(data, np.uint8))
    finally:
        source.close()
