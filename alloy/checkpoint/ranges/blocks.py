"""Blocks of files elsewhere: asked for ahead of their use, in memory until they were used.

A merge reads its inputs side by side, in the order of the result. That order is known before it
begins, so several connections bring the next blocks while the last ones are computed with. What the
merge does not read is not brought.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from alloy.checkpoint.ranges.files import Elsewhere, elsewhere
from alloy.errors import CheckpointError

BLOCK_BYTES = 8 << 20
"""A range of one request, large enough that its latency does not count."""
CONNECTIONS = 8
AHEAD_BYTES = 256 << 20
"""The most that is asked for and not yet read, in all files of the result together."""
_HELD_BYTES = 2 << 30

Key = tuple[Path, int]
"""A file and the number of a block."""


class Span(NamedTuple):
    """Bytes of a file that are read."""

    file: Path
    start: int
    stop: int


class _Block:
    """A block that is here or under way."""

    def __init__(self, future: Future[bytearray], num_bytes: int, ahead: Ahead | None):
        self.future, self.num_bytes = future, num_bytes
        self.ahead = ahead
        """Who asked for it, until it is read."""


class Blocks:
    """The blocks of one merge, shared by its workers.

    They are dropped when the tensor that ends in them is done; a method that reads a tensor twice
    finds them, unless all blocks together exceed `held_bytes`.
    """

    def __init__(self, held_bytes: int | None = None):
        self._held_bytes = held_bytes or _affordable()
        self._lock = threading.Lock()
        self._blocks: OrderedDict[Key, _Block] = OrderedDict()
        self._held = 0
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="merge-range")
        self._closed = threading.Event()

    def read_into(self, path: Path, far: Elsewhere, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a file elsewhere; waits for what is under way."""
        while buffer:
            number, within = divmod(offset, BLOCK_BYTES)
            data = self._read((path, number), far)
            count = min(len(buffer), len(data) - within)
            buffer[:count] = memoryview(data)[within : within + count]
            buffer, offset = buffer[count:], offset + count

    def ask(self, key: Key, ahead: Ahead) -> int:
        """Begin to bring a block; its bytes, or 0 where it is here or under way."""
        far = elsewhere(key[0])
        assert far is not None, "only blocks of files elsewhere are asked for"
        with self._lock:
            if key in self._blocks or self._closed.is_set():
                return 0
            return self._begin(key, far, ahead).num_bytes

    def drop(self, span: Span) -> None:
        """Forget the blocks that a tensor, which is done, overlaps and ends."""
        far = elsewhere(span.file)
        if far is None or span.start == span.stop:
            return
        unread = []
        with self._lock:
            for number in range(span.start // BLOCK_BYTES, (span.stop - 1) // BLOCK_BYTES + 1):
                key = span.file, number
                if min((number + 1) * BLOCK_BYTES, far.size) <= span.stop and key in self._blocks:
                    unread.append(self._forget(key))
        for block in unread:
            if block.ahead is not None:
                block.ahead.was_read(block.num_bytes)

    def close(self) -> None:
        """Stop bringing, and give the memory back."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._blocks.clear()

    def _read(self, key: Key, far: Elsewhere) -> bytearray:
        with self._lock:
            block = self._blocks.get(key) or self._begin(key, far, None)
            self._blocks.move_to_end(key)
            ahead, block.ahead = block.ahead, None
        if ahead is not None:
            ahead.was_read(block.num_bytes)
        return block.future.result()

    def _begin(self, key: Key, far: Elsewhere, ahead: Ahead | None) -> _Block:
        start = key[1] * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, far.size)
        for other in list(self._blocks):
            if self._held + stop - start <= self._held_bytes:
                break
            if self._blocks[other].ahead is None and self._blocks[other].future.done():
                self._forget(other)
        block = _Block(self._pool.submit(self._bring, far, start, stop), stop - start, ahead)
        self._blocks[key] = block
        self._held += block.num_bytes
        return block

    def _forget(self, key: Key) -> _Block:
        block = self._blocks.pop(key)
        self._held -= block.num_bytes
        return block

    def _bring(self, far: Elsewhere, start: int, stop: int) -> bytearray:
        data, position = bytearray(stop - start), 0
        for piece in far.bring(start, stop):
            if self._closed.is_set():
                raise CheckpointError("the merge has ended")
            data[position : position + len(piece)] = piece
            position += len(piece)
        return data


class Ahead:
    """Asks for the blocks of one file of the result in the order in which they will be read."""

    def __init__(self, blocks: Blocks, groups: Iterable[Sequence[Span]], share: int):
        self._blocks, self._share = blocks, share
        self._order = _in_order(groups)
        self._lock = threading.Lock()
        self._unread = 0
        self._ask()

    def was_read(self, num_bytes: int) -> None:
        """One block less is waiting: ask for the next."""
        with self._lock:
            self._unread -= num_bytes
        self._ask()

    def _ask(self) -> None:
        with self._lock:
            while self._unread < self._share and (key := next(self._order, None)) is not None:
                self._unread += self._blocks.ask(key, self)


def _in_order(groups: Iterable[Sequence[Span]]) -> Iterator[Key]:
    """The blocks elsewhere of spans that are read group by group, those of a group side by side."""
    for group in groups:
        numbers = [
            [(s.file, n) for n in range(s.start // BLOCK_BYTES, (s.stop - 1) // BLOCK_BYTES + 1)]
            for s in group
            if s.start < s.stop and elsewhere(s.file) is not None
        ]
        yield from (key for key in chain.from_iterable(zip_longest(*numbers)) if key is not None)


def _affordable() -> int:
    """`_HELD_BYTES`, or a quarter of the memory that is free where that is less."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return _HELD_BYTES
    return max(4 * BLOCK_BYTES, min(_HELD_BYTES, free // 4))
