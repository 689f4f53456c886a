"""Open files of a checkpoint, on this disk or elsewhere.

The library transports nothing: whoever registers a file elsewhere brings its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from alloy.checkpoint.ranges.blocks import Blocks

Bring = Callable[[int, int], Iterable[bytes]]
"""All bytes of a file from start to stop, in pieces, of the one state that was registered.

Raises CheckpointError where the file has changed, ConnectionError where the network stays broken.
"""


@dataclass(frozen=True)
class Elsewhere:
    """A file that lies elsewhere."""

    size: int
    bring: Bring


_elsewhere: dict[Path, Elsewhere] = {}


def register(stub: Path, size: int, bring: Bring) -> None:
    """Have a path stand for a file elsewhere, of which it holds the header alone."""
    _elsewhere[stub] = Elsewhere(size, bring)


def elsewhere(path: Path) -> Elsewhere | None:
    """The file elsewhere for which a path stands, or None for one that lies here."""
    return _elsewhere.get(path)


def size_of(path: Path) -> int:
    """Bytes of a file, wherever it lies."""
    far = elsewhere(path)
    return path.stat().st_size if far is None else far.size


class File(Protocol):
    """An open file, read at any place from any thread."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with the bytes from `offset` on; CheckpointError where they end early."""
        ...

    def will_need(self, start: int, stop: int) -> None:
        """Say that these bytes are read soon."""
        ...

    def close(self) -> None: ...


def open_file(path: Path, blocks: Blocks | None = None) -> File:
    """Open a file of a checkpoint.

    Args:
        blocks: keeps what was brought of files elsewhere; without it, what is read is brought.
    """
    far = elsewhere(path)
    return _Here(path) if far is None else _Far(path, far, blocks)


class _Here:
    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise _ended(self._path, offset)
            buffer, offset = buffer[count:], offset + count

    def will_need(self, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._descriptor)


class _Far:
    def __init__(self, path: Path, far: Elsewhere, blocks: Blocks | None):
        self._path, self._far, self._blocks = path, far, blocks

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) > self._far.size:
            raise _ended(self._path, self._far.size)
        if self._blocks is not None:
            self._blocks.read_into(self._path, self._far, buffer, offset)
            return
        for piece in self._far.bring(offset, offset + len(buffer)):
            buffer[: len(piece)] = piece
            buffer = buffer[len(piece) :]

    def will_need(self, start: int, stop: int) -> None:
        pass  # `Ahead` asks for whole blocks, in the order of the result

    def close(self) -> None:
        pass


def _ended(path: Path, offset: int) -> CheckpointError:
    return CheckpointError(f"{path}: ended at byte {offset} while it was read; it changed under us")
