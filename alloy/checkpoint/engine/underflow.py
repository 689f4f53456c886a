"""Entries that float16 cannot hold: too small, they become 0, which nobody sees in a loss curve."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from alloy.checkpoint.engine.steps import Rows, Shard, Step, Work
from alloy.checkpoint.reading import few

_SMALLEST = 2.0**-25
"""Half of float16's smallest number: anything below rounds to 0."""


class Underflows:
    """Counts, by tensor, entries of the result that are 0 because float16 has nothing smaller."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._sizes: dict[str, int] = {}

    def watch(self, shard: Shard) -> Shard:
        """The shard, the results of its steps counted where they narrow to float16."""
        return replace(shard, steps=tuple(map(self._watched, shard.steps)))

    def _watched(self, step: Step) -> Step:
        wider = [entry for entry in step.inputs if entry.dtype in ("F32", "F64", "BF16")]
        if step.dtype != "F16" or not wider:
            return step
        self._sizes[step.name] = step.num_elements
        return replace(step, work=partial(_Watched, step, self))

    def add(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] += count

    def notes(self) -> list[str]:
        """One note about all tensors that lost entries."""
        lost = {name: count for name, count in self._counts.items() if count}
        if not lost:
            return []
        total = sum(self._sizes[name] for name in lost)
        return [
            f"{sum(lost.values()):,} of {total:,} entries of {few(sorted(lost))} are smaller than "
            "float16 can hold and became 0; dtype='bfloat16' or 'float32' keeps them"
        ]


class _Watched:
    """A work whose results are compared with its inputs."""

    def __init__(self, step: Step, underflows: Underflows):
        self._step, self._underflows = step, underflows
        self._work: Work = step.work()
        self.num_measures = self._work.num_measures
        self.chunked, self.alignment = self._work.chunked, self._work.alignment

    def measure(self, round_: int, rows: Rows, start: int) -> None:
        self._work.measure(round_, rows, start)

    def prepare(self, round_: int) -> None:
        self._work.prepare(round_)

    def memory(self, num_bytes: int) -> np.ndarray | None:
        return self._work.memory(num_bytes)

    def compute(self, rows: Rows, start: int, out: np.ndarray) -> None:
        self._work.compute(rows, start, out)
        zero = out.view(np.uint16) & 0x7FFF == 0
        if not zero.any():
            return
        largest = np.zeros(int(zero.sum()))
        for row, entry in zip(rows, self._step.inputs, strict=True):
            np.maximum(largest, _magnitudes(row, entry.dtype, zero), out=largest)
        lost = int(((largest > 0) & (largest <= _SMALLEST)).sum())
        self._underflows.add(self._step.name, lost)


def _magnitudes(row: np.ndarray, dtype: str, where: np.ndarray) -> Any:
    """The absolute values of a row of bytes at these entries."""
    if dtype == "BF16":
        values = (row.view(np.uint16)[where].astype(np.uint32) << 16).view(np.float32)
    else:
        values = row.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])[where]
    return np.abs(values.astype(np.float64))
