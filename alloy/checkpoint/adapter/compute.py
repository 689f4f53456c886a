"""Elements of a folded tensor, computed when they are read; memory holds the low-rank factors.

Products are summed over the rank in one order, in float32 (float64 for float64 weights), so that
equal elements have equal bits wherever a tensor is cut.
"""

from __future__ import annotations

import threading
from math import prod

import numpy as np

from alloy.checkpoint.format import ITEM_BYTES, Entry
from alloy.checkpoint.ranges.blocks import Blocks, Span
from alloy.checkpoint.ranges.files import File, open_file

_NORM_BYTES = 1 << 20
"""Bytes of the base at a time where norms are measured (DoRA)."""
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class Input:
    """A stored tensor, open: its elements from any place, from several threads, folded if it is."""

    def __init__(self, entry: Entry, blocks: Blocks | None = None):
        self.entry, self._blocks = entry, blocks
        self.file = open_file(entry.file, blocks)
        self._lock = threading.Lock()
        self._folding: _Folding | None = None

    def read(self, first: int, row: np.ndarray) -> None:
        """Fill a row of bytes with the elements from `first` on."""
        entry = self.entry
        start = entry.start + first * ITEM_BYTES[entry.dtype]
        if entry.fold is None:
            self.file.read_into(row.data, start)
            return
        with self._lock:
            if self._folding is None:
                self._folding = _Folding(entry, self.file)
        self._folding.read(first, row)

    def close(self) -> None:
        self.file.close()
        if self._blocks is not None:
            entry = self.entry
            self._blocks.drop(Span(entry.file, entry.start, entry.start + entry.num_bytes))


class _Folding:
    """The factors of one tensor, in memory."""

    def __init__(self, entry: Entry, file: File):
        fold = entry.fold
        assert fold is not None, "an entry with a fold"
        self._entry, self._fold, self._file = entry, fold, file
        self._wide = np.float64 if entry.dtype == "F64" else np.float32
        self._width = _width(entry)
        self._left = self._right = None
        self._factors = np.ones(0, self._wide)
        if fold.left is None:
            return
        left = _values(fold.left, self._wide)
        if fold.right is None:
            self._left, self._right = left[:, None], np.ones((1, 1), self._wide)
            self._width = 1
            return
        left = left.reshape(left.shape[0], -1)  # of a convolution: [out, rank, 1, 1]
        right = _values(fold.right, self._wide).reshape(left.shape[1], -1)
        if fold.turned:
            left, right = right.T, left.T
        self._left, self._right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        if fold.magnitude is not None:
            magnitude = _values(fold.magnitude, np.float64).reshape(-1)
            with np.errstate(divide="ignore", invalid="ignore"):  # NaN is refused where it is met
                self._factors = (magnitude / self._norms()).astype(self._wide)

    def read(self, first: int, row: np.ndarray) -> None:
        """Fill a row of bytes with the elements from `first` on."""
        dtype = self._entry.dtype
        values = self._elements(first, len(row) // ITEM_BYTES[dtype], scaled=True)
        row[:] = _encoded(values, dtype)

    def _elements(self, first: int, count: int, *, scaled: bool) -> np.ndarray:
        """The sum, without DoRA's factors unless `scaled`."""
        source, file = self._entry, self._file
        if self._fold.onto is not None:
            source, file = self._fold.onto, None
        values = _read(source, first, count, file).astype(self._wide, copy=False)
        if self._left is not None and self._right is not None:
            from alloy.checkpoint.adapter.loops import add_product

            factors = self._factors if scaled else self._factors[:0]
            add_product(
                values, first, self._width, self._left, self._right,
                self._wide(self._fold.scaling), factors, not self._fold.turned,
            )  # fmt: skip
        return values

    def _norms(self) -> np.ndarray:
        """The norm of each unit's weights, of the sum: one pass over the base."""
        rows = self._entry.num_elements // self._width
        squares = np.zeros(self._width if self._fold.turned else rows)
        step = max(1, _NORM_BYTES // (8 * self._width))
        for row in range(0, rows, step):
            count = min(step, rows - row)
            values = self._elements(row * self._width, count * self._width, scaled=False)
            piece = np.square(values.reshape(count, self._width), dtype=np.float64)
            if self._fold.turned:
                squares += piece.sum(0)
            else:
                squares[row : row + count] = piece.sum(1)
        return np.sqrt(squares)


def _width(entry: Entry) -> int:
    """Elements of a row of a matrix, or of a filter."""
    return prod(entry.shape[1:]) if len(entry.shape) > 1 else 1


def _values(entry: Entry, dtype: type) -> np.ndarray:
    """A tensor of an adapter, whole."""
    return _read(entry, 0, entry.num_elements).astype(dtype).reshape(entry.shape)


def _read(entry: Entry, first: int, count: int, file: File | None = None) -> np.ndarray:
    """Elements of a tensor as they are stored, bfloat16 as float32."""
    size = ITEM_BYTES[entry.dtype]
    raw = np.empty(count * size, np.uint8)
    opened = open_file(entry.file) if file is None else file
    try:
        opened.read_into(raw.data, entry.start + first * size)
    finally:
        if file is None:
            opened.close()
    if entry.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(_NUMPY[entry.dtype])


def _encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of values, rounded once, to the nearest and to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # Inf is refused where it is met
            return values.astype(_NUMPY[dtype]).view(np.uint8)
    from alloy.checkpoint.adapter.loops import round_to_bfloat16

    halves = np.empty(len(values), np.uint16)
    round_to_bfloat16(values.view(np.uint32), halves)
    return halves.view(np.uint8)
