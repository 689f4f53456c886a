"""A file that grows in order, on the disk while the next part is gathered.

Large files bypass the page cache where the system can: what was written is not read again soon, and
dirty pages beyond what memory takes would evict the sources and make time grow faster than size.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

DIRECT_BYTES = 16 << 20
"""Files from this size on bypass the page cache."""
BLOCK_BYTES = 4096
"""The offset and the size of a direct write are multiples of this."""
_SYNC_FILE_RANGE_WRITE = 2


class GrowingFile:
    """Bytes are gathered in one stage while the other goes to the disk."""

    def __init__(self, path: Path, num_bytes: int, stage_bytes: int, writer: ThreadPoolExecutor):
        self._writer = writer
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._direct = _open_direct(path) if num_bytes >= DIRECT_BYTES else -1
        _reserve(self._descriptor, num_bytes)
        self._stages = [_page_aligned(stage_bytes) for _ in range(2)]
        self._filled = self._offset = 0  # of the stage that is gathered, and where it belongs
        self._writing: Future | None = None

    def append(self, data: np.ndarray) -> None:
        while len(data):
            stage = self._stages[0]
            count = min(len(data), len(stage) - self._filled)
            stage[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == len(stage):
                self._put()

    def _put(self) -> None:
        """Send the stage to the disk; the other one is free when its own write is done."""
        self._wait()
        self._writing = self._writer.submit(
            self._write, self._stages[0][: self._filled].data, self._offset
        )
        self._stages.reverse()
        self._offset += self._filled
        self._filled = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, view: memoryview, offset: int) -> None:
        start, num_bytes = offset, len(view)
        aligned = num_bytes // BLOCK_BYTES * BLOCK_BYTES if self._direct >= 0 else 0
        while aligned > offset - start:
            try:
                count = os.pwrite(self._direct, view[: aligned - (offset - start)], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # a file system that promises direct writes and refuses them
            view, offset = view[count:], offset + count
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count
        if not aligned:
            start_flush(self._descriptor, start, num_bytes)

    def finish(self) -> None:
        """Put everything on the disk."""
        if self._filled:
            self._put()
        self._wait()
        self._stages = []
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1
        self._stages = []


def _page_aligned(num_bytes: int) -> np.ndarray:
    """Memory that begins at a page, as direct writes ask."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8)


def _open_direct(path: Path) -> int:
    """A descriptor whose writes bypass the page cache, or -1 where the system has none."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Give the file its size; OSError at once where the disk has no room for it."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        os.ftruncate(descriptor, num_bytes)  # a system that cannot reserve


def start_flush(descriptor: int, offset: int, num_bytes: int) -> None:
    """Let the kernel begin to write, so that the final fsync finds little left to do."""
    if _sync_file_range is not None:
        _sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(num_bytes), _SYNC_FILE_RANGE_WRITE
        )


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
