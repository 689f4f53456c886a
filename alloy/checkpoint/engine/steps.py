"""Steps of a merge: a step makes one tensor, a shard is the file that holds several.

Where vocabularies differ, the rows of a step's inputs are looked up by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from alloy.checkpoint.adapter.compute import Input
from alloy.checkpoint.engine.kernels import KINDS, mix
from alloy.checkpoint.format import ITEM_BYTES, Entry, encode_header

Rows = np.ndarray | Sequence[np.ndarray]
"""One row of bytes per input; an array [inputs, bytes] where all have one dtype."""
RowMap = np.ndarray
"""For each row of the output, the row of a source's tensor; -1 where the source has none."""


class Work(Protocol):
    """Computes one output tensor. `rows` holds one row of bytes per input."""

    num_measures: int
    """Number of passes over the whole tensor before the first chunk is computed."""
    chunked: bool
    """The tensor may be cut, at any multiple of `alignment` elements."""
    alignment: int

    def measure(self, round_: int, rows: Rows, start: int) -> None:
        """Look at the elements from `start` on; called from several threads."""
        ...

    def prepare(self, round_: int) -> None:
        """Called once, when everything was measured in this round."""
        ...

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        """Write the elements from `start` on to `out`, as bytes."""
        ...

    def memory(self, num_bytes: int) -> np.ndarray | None:
        """Memory of its own that the inputs are read into, or None for any."""
        ...

    def guess(self, inputs: Sequence[Input]) -> bool:
        """From samples of the inputs, bound what measuring would find.

        True if `compute` may then come first, with `settle` to put right what it could not know.
        """
        ...

    def settle(self, outs: Mapping[int, np.ndarray]) -> bool:
        """Put right what was computed, by its first element; False if it must be measured."""
        ...


@dataclass(frozen=True)
class Step:
    """One output tensor: what it is made from and how."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[Entry, ...]
    work: partial[Any]  # makes a Work
    row_maps: tuple[RowMap, ...] | None = None
    """For a tensor with one row per token, where the sources' vocabularies differ."""
    prefer_first: bool = False
    """The first input is the base: it stands in for inputs that lack a row."""
    borrowed: Mapping[int, tuple[int | None, int]] = field(default_factory=dict)
    """For rows of the output, the input and its row that stand in instead; zeros without one."""

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    def input_bytes(self, num_elements: int) -> int:
        """The bytes of so many elements of every input."""
        return sum(num_elements * ITEM_BYTES[e.dtype] for e in self.inputs)


@dataclass(frozen=True)
class Shard:
    """One output file."""

    file: str
    steps: tuple[Step, ...]

    @property
    def header(self) -> bytes:
        return encode_header(
            (self.stored_name(step.name), step.dtype, step.shape) for step in self.steps
        )

    def stored_name(self, name: str) -> str:
        """A tensor's name within the file: a module's file has none of its folder."""
        folder = self.file.rpartition("/")[0]
        return name.removeprefix(f"{folder}/") if folder else name

    @property
    def num_bytes(self) -> int:
        return len(self.header) + sum(step.num_bytes for step in self.steps)


def as_float(row: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a row of bytes; none of a dtype that holds no real numbers."""
    if dtype == "BF16":
        return (row.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    numpy_dtypes = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return row.view(numpy_dtypes[dtype]) if dtype in numpy_dtypes else np.zeros(0)


def mapped_dtype(inputs: Sequence[Entry]) -> str:
    """The dtype of rows that are looked up by token: the inputs' own, or one that holds them all.

    Rows that stand in for others are then exact, so that a source which lacks a token of the base
    changes nothing in it.
    """
    dtypes = {entry.dtype for entry in inputs}
    if len(dtypes) == 1:
        return inputs[0].dtype
    return "F64" if "F64" in dtypes else "F32"


def read_mapped(step: Step, inputs: Sequence[Input], start: int, stop: int) -> np.ndarray:
    """The inputs' rows in the order of the output's vocabulary, as [inputs, bytes], all of
    `mapped_dtype`.

    A row that an input lacks is the one chosen for it; else the base's (input 0) if that has it,
    else the mean of those that do.
    """
    assert step.row_maps is not None, "only vocabulary tensors are mapped"
    first, dtype = step.inputs[0], mapped_dtype(step.inputs)
    columns = first.num_elements // first.shape[0]
    begin, end = start // columns, stop // columns
    rows = np.empty((len(step.inputs), end - begin, columns * ITEM_BYTES[dtype]), np.uint8)
    missing = np.zeros((len(step.inputs), end - begin), bool)
    for i, (source, row_map) in enumerate(zip(inputs, step.row_maps, strict=True)):
        wanted = row_map[begin:end]
        missing[i] = wanted < 0
        breaks = np.flatnonzero((np.diff(wanted) != 1) | (wanted[:-1] < 0)) + 1
        for run in np.split(np.arange(end - begin), breaks):
            if wanted[run[0]] >= 0:
                target = rows[i, run[0] : run[-1] + 1].reshape(-1)
                _read_as(dtype, source, int(wanted[run[0]]) * columns, target)
    for column in np.flatnonzero(missing.any(0)):
        if (chosen := step.borrowed.get(begin + int(column))) is not None:
            donor, row = chosen
            lent = np.zeros(rows.shape[2], np.uint8)
            if donor is not None:
                _read_as(dtype, inputs[donor], row * columns, lent)
            rows[missing[:, column], column] = lent
            continue
        _fill(rows[:, column], missing[:, column], step.prefer_first, dtype)
    return rows.reshape(len(step.inputs), -1)


def _read_as(dtype: str, source: Input, first: int, row: np.ndarray) -> None:
    """Fill a row of bytes with a source's elements from `first` on, in a dtype that holds them."""
    own = source.entry.dtype
    if own == dtype:
        source.read(first, row)
        return
    stored = np.empty(len(row) // ITEM_BYTES[dtype] * ITEM_BYTES[own], np.uint8)
    source.read(first, stored)
    wide = as_float(row, dtype)
    wide[:] = as_float(stored, own)


def _fill(rows: np.ndarray, missing: np.ndarray, prefer_first: bool, dtype: str) -> None:
    """Give the inputs that lack a row the first input's, or the mean of those that have it."""
    donors = np.flatnonzero(~missing)
    if prefer_first and not missing[0]:
        donors = donors[:1]
    having = np.ascontiguousarray(rows[donors])
    if dtype in KINDS:
        share = np.full(len(donors), 1 / len(donors), np.float32)
        filled, kind = np.empty(rows.shape[1], np.uint8), KINDS[dtype]
        mix(having, kind, share, False, filled, kind)
    else:
        filled = as_float(having, dtype).mean(0).view(np.uint8)
    rows[missing] = filled
