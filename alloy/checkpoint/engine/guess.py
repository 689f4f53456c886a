"""Thresholds of TIES from one pass: bracketed by a sample, exact by what lies in the bracket.

The k-th largest magnitude of a task vector lies, but for bad luck, between two quantiles of a
sample. Then it follows from the number of elements above the bracket and the magnitudes within.
Bins are those of `kernels.count_magnitudes`: magnitudes of 16-bit floats, the upper 15 bits of
float32. A task vector stored in bfloat16 often has a large part of its elements in one bin; where
the sample leaves no doubt that the threshold is there, two counts confirm it and nothing is listed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import alloy.checkpoint.engine.kernels as kernels
from alloy.checkpoint.adapter.compute import Input

PLACES, PLACE = 64, 1024
"""Places of a tensor that are sampled, and elements of each."""
SHARE = 16
"""At most one element of so many is sampled."""
ERRORS = 3.5
"""Standard errors on either side of the sample's quantile."""
MOST_DOUBTS = 0.2
"""Share of elements in brackets from which measuring the tensor costs less."""


class Doubts(NamedTuple):
    """Elements of one piece that lie in a bracket of any model."""

    start: int
    """The piece's first element."""
    positions: np.ndarray
    """Within the piece."""
    rows: np.ndarray
    """Their bytes, [base and models, bytes]."""


class Guess:
    """Brackets for the thresholds of a tensor, and what a pass over it counted and listed."""

    def __init__(self, kind: int, k: int, lowest: np.ndarray, highest: np.ndarray, share: float):
        """`lowest` and `highest` are bins [models]; `share` of the elements will be listed."""
        n = len(lowest)
        self.kind, self.k, self.lowest, self.highest = kind, k, lowest, highest
        shift = 16 if kind == kernels.F32 else 0
        listed = (lowest < highest) | (kind == kernels.F32)
        least, most = lowest << shift, (highest << shift) + (1 << shift) - 1
        self.brackets = np.stack([least, most, listed], 1).astype(np.uint32)
        self.counts = np.zeros((n, 2), np.int64)
        """Elements that reach the lowest bin, and that exceed the highest."""
        self.doubts: list[Doubts] = []
        self._share, self._complete, self._lock = share, True, threading.Lock()

    def space(self, words: np.ndarray) -> np.ndarray:
        """Memory for the positions of a piece's elements in doubt."""
        # a part of the tensor may have several times the share of the whole
        size = min(1.0, 8 * self._share) * words.shape[1]
        return np.empty(int(size) + 2 * kernels.VOTE_BLOCK, np.uint32)

    def add(
        self, start: int, counts: np.ndarray, positions: np.ndarray, listed: np.ndarray, count: int
    ) -> None:
        """Keep what a piece showed; -1 elements in doubt are more than could be listed."""
        doubts = None
        if count > 0:
            rows = np.ascontiguousarray(listed[:, :count]).view(np.uint8)
            doubts = Doubts(start, positions[:count].copy(), rows)
        with self._lock:
            self.counts += counts
            self._complete &= count >= 0
            if doubts is not None:
                self.doubts.append(doubts)

    def thresholds(self) -> np.ndarray | None:
        """The k-th largest magnitude of each model, or None if one is not in its bracket."""
        reaching, above = self.counts.T
        if not self._complete or (reaching < self.k).any() or (above >= self.k).any():
            return None
        n = len(self.counts)
        counts = np.zeros((n, kernels.NUM_MAGNITUDES), np.int64)
        for doubts in self.doubts:
            kernels.count_magnitudes(doubts.rows, self.kind, counts)
        bins, remaining = self.lowest.copy(), self.k - above
        for i in np.flatnonzero(self.brackets[:, 2]):
            counts[i, : self.lowest[i]] = counts[i, self.highest[i] + 1 :] = 0
            bins[i], remaining[i] = kth_largest(counts[i], int(remaining[i]))
        if self.kind != kernels.F32:
            return bins
        halves = np.zeros((n, 1, 1 << 16), np.int64)
        for doubts in self.doubts:
            kernels.count_lower_halves(doubts.rows, bins[:, None], halves)
        lower = [kth_largest(halves[i, 0], int(remaining[i]))[0] for i in range(n)]
        return (bins << 16) + np.array(lower, np.int64)


def guess_thresholds(inputs: Sequence[Input], num_elements: int, kind: int, k: int) -> Guess | None:
    """Bracket each model's k-th largest magnitude; None where a sample would not pay.

    The first input is the base.
    """
    places = min(PLACES, num_elements // SHARE // PLACE)
    if places < PLACES // 2:
        return None
    n, size, q = len(inputs) - 1, places * PLACE, k / num_elements
    width = PLACE * kernels.item_bytes(kind)
    rows = np.empty((n + 1, places * width), np.uint8)
    for source, row in zip(inputs, rows, strict=True):
        for p in range(places):
            first = (num_elements - PLACE) * p // (places - 1)
            source.read(first, row[p * width : (p + 1) * width])
    bins = np.empty((n, size), np.uint16)
    counts = np.zeros((n, kernels.NUM_MAGNITUDES), np.int32)
    kernels.bin_magnitudes(rows, kind, bins, counts)
    above = np.cumsum(counts[:, ::-1], 1, np.int32)
    lowest, highest = np.empty(n, np.int64), np.empty(n, np.int64)
    share, last = 0.0, kernels.NUM_MAGNITUDES - 1
    chance = (q * (1 - q) / PLACE) ** 0.5
    for i in range(n):
        middle = last - _position(above[i], size * q)
        # elements near each other are alike: the places differ by more than chance alone
        spread = max(_spread(bins[i] >= bound, places) for bound in (middle, middle + 1))
        margin = ERRORS * max(spread, chance) * places**-0.5
        lowest[i] = last - _position(above[i], size * (q + margin) + 1) if q + margin < 1 else 0
        highest[i] = last - _position(above[i], size * (q - margin)) if q > margin else last
        if lowest[i] < highest[i] or kind == kernels.F32:
            share += counts[i, lowest[i] : highest[i] + 1].sum() / size
    return None if share > MOST_DOUBTS else Guess(kind, k, lowest, highest, share)


def _spread(reaching: np.ndarray, places: int) -> float:
    """Standard deviation over the places of the share that is True."""
    eights = reaching.view(np.uint64).reshape(places, -1)  # sums of bytes, below 256 each
    sums = eights.sum(1).view(np.uint8).reshape(places, 8).sum(1)
    return float(sums.std()) / PLACE


def _position(above: np.ndarray, k: float) -> int:
    """The first bin from the top, of numbers above counted from there, that reaches k elements."""
    return int(np.searchsorted(above, min(max(1, int(k)), int(above[-1]))))


def kth_largest(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin of the k-th largest value, and its rank among the values of that bin."""
    above = np.cumsum(counts[::-1])
    position = int(np.searchsorted(above, k))
    before = int(above[position - 1]) if position else 0
    return len(counts) - 1 - position, k - before
