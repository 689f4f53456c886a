"""Sums over batches, float64, that do not depend on how many processes see the batches.

Floating-point sums depend on their order, so the order is fixed: that of the batches. One process
adds as it goes. Several take the batches in turns; at the end of each round every sum's owner gets
all addends and adds them in the order of the batches, so that the bits are those of one process.
An owner has its share of the sums, not all of them, until `reduce` brings them together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from alloy.errors import CollectionError
from alloy.processes import ALONE, Processes

T = TypeVar("T")
Layout = list[tuple[Hashable, tuple[int, ...]]]


class RunningSums:
    """Sums and counts by key, on the device where they are computed."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.totals: dict[Hashable, Tensor] = {}
        self.counts: dict[Hashable, int] = {}
        self._addends: list[tuple[Hashable, Tensor]] = []
        self._owners: dict[Hashable, int] = {}
        self._loads = [0] * processes.size
        self._device = torch.device("cpu")  # of the last addend: messages travel between devices

    def add(self, key: Hashable, value: Tensor) -> None:
        if self.processes.size == 1:
            self._accumulate(key, value)
        else:
            self._addends.append((key, value.double()))
            self._device = value.device

    def count(self, key: Hashable, num: int) -> None:
        self.counts[key] = self.counts.get(key, 0) + num

    def _accumulate(self, key: Hashable, value: Tensor) -> None:
        if key in self.totals:
            self.totals[key] += value
        else:
            self.totals[key] = value.double()

    def end_round(self) -> None:
        """Hand the addends of each process's batch to the owners of the sums."""
        if self.processes.size == 1:
            return
        own: Layout = [(key, tuple(value.shape)) for key, value in self._addends]
        layouts = self.processes.objects(own)
        for key, shape in (entry for layout in layouts for entry in layout):
            if key not in self._owners:
                self._owners[key] = self._loads.index(min(self._loads))
                self._loads[self._owners[key]] += torch.Size(shape).numel()
        received = self.processes.exchange(
            [self._sent_to(owner) for owner in range(self.processes.size)],
            [sum(n for _, _, n in self._entries(layout)) for layout in layouts],
        )
        for layout, flat in zip(layouts, received, strict=True):
            entries = list(self._entries(layout))
            values = flat.split([num for _, _, num in entries])
            for (key, shape, _), value in zip(entries, values, strict=True):
                self._accumulate(key, value.view(shape).clone())
        self._addends.clear()

    def _sent_to(self, owner: int) -> Tensor:
        parts = [value.flatten() for key, value in self._addends if self._owners[key] == owner]
        return torch.cat(parts) if parts else self._empty(0)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._device)

    def _entries(self, layout: Layout) -> Iterator[tuple[Hashable, tuple[int, ...], int]]:
        """The key, shape and size of what a process sends here, in its order."""
        for key, shape in layout:
            if self._owners[key] == self.processes.rank:
                yield key, shape, torch.Size(shape).numel()

    def reduce(self) -> None:
        """Bring every sum, and the counts of all batches, to every process."""
        if self.processes.size == 1:
            return
        shapes: dict[Hashable, tuple[int, ...]] = {}
        for part in self.processes.objects({k: tuple(t.shape) for k, t in self.totals.items()}):
            shapes |= part
        for key, owner in self._owners.items():
            mine = self.totals.get(key)
            total = self._empty(*shapes[key]) if mine is None else mine.contiguous()
            self.totals[key] = self.processes.from_owner(total, owner)
        counts = self.processes.objects(self.counts)
        self.counts = {
            key: sum(part.get(key, 0) for part in counts) for part in counts for key in part
        }


def in_rounds(batches: Iterable[T], processes: Processes) -> Iterator[tuple[T | None, bool]]:
    """Each batch if it is this process's, else None; and True where a round ends.

    Raises:
        CollectionError: fewer batches than processes.
    """
    number, ends = -1, True
    for number, batch in enumerate(batches):
        ends = (number + 1) % processes.size == 0
        yield (batch if number % processes.size == processes.rank else None), ends
    if number + 1 < processes.size and processes.size > 1:
        raise CollectionError(
            f"{processes.size} processes for {number + 1} batches of calibration data: take "
            "smaller batches, more data or fewer processes"
        )
    if not ends:
        yield None, True
