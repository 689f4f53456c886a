"""Blocks of files elsewhere: right bytes, brought once, in the order of use, within a budget."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from alloy.checkpoint import open_checkpoint
from alloy.checkpoint.ranges import blocks, files
from alloy.checkpoint.ranges.blocks import Ahead, Blocks, Span
from alloy.errors import CheckpointError

SIZE = 1000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


class Remote:
    """A file elsewhere, in memory; keeps what was asked of it."""

    def __init__(self, stub: Path):
        self.stub, self.asked, self.lock = stub, [], threading.Lock()
        files.register(stub, SIZE, self.bring)

    def bring(self, start: int, stop: int) -> Iterator[bytes]:
        with self.lock:
            self.asked.append((start, stop))
        for first in range(start, stop, 7):
            yield CONTENT[first : min(first + 7, stop)]

    @property
    def num_bytes(self) -> int:
        return sum(stop - start for start, stop in self.asked)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(files, "_elsewhere", {})


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    return Remote(tmp_path / "a")


def read(remote: Remote, start: int, stop: int, held: Blocks | None = None) -> bytes:
    buffer = bytearray(stop - start)
    files.open_file(remote.stub, held).read_into(memoryview(buffer), start)
    return bytes(buffer)


def test_any_range_is_what_the_file_has(remote: Remote) -> None:
    """With and without blocks, at any offset; beyond the end is refused."""
    held = Blocks()
    for start, stop in ((0, 1), (0, SIZE), (63, 65), (64, 128), (500, 999), (960, SIZE)):
        assert read(remote, start, stop) == CONTENT[start:stop]
        assert read(remote, start, stop, held) == CONTENT[start:stop]
    with pytest.raises(CheckpointError, match="ended at byte 1000"):
        read(remote, 990, 1001, held)
    held.close()


def test_a_block_is_brought_once_and_ahead_of_its_use(remote: Remote) -> None:
    """Each tensor's blocks follow those before it, no more of them unread than the share."""
    held = Blocks()
    spans = [Span(remote.stub, 0, 100), Span(remote.stub, 100, 420), Span(remote.stub, 700, SIZE)]
    Ahead(held, ([span] for span in spans), share=128)
    for span in spans:
        for first in range(span.start, span.stop, 50):
            stop = min(first + 50, span.stop)
            assert read(remote, first, stop, held) == CONTENT[first:stop]
            assert len(remote.asked) * 64 <= stop + 128 + 64
        held.drop(span)
    assert len(set(remote.asked)) == len(remote.asked)
    assert sum(stop - start for start, stop in remote.asked) == SIZE - 3 * 64  # 448:640 is not read
    assert [number for _, number in held._blocks] == [6]  # whose end no tensor read
    held.close()


def test_memory_is_bounded_and_what_was_dropped_comes_again(remote: Remote) -> None:
    """A tensor larger than the budget is brought once for each time that it is read."""
    held = Blocks(held_bytes=256)
    for _ in range(2):
        for first in range(0, SIZE, 40):
            assert read(remote, first, min(first + 40, SIZE), held) == CONTENT[first : first + 40]
            assert held._held <= 256
    assert remote.num_bytes == 2 * SIZE
    held.close()


def test_a_broken_file_breaks_the_reader(tmp_path: Path) -> None:
    def bring(start: int, stop: int) -> Iterator[bytes]:
        raise CheckpointError("it was changed meanwhile")

    files.register(tmp_path / "b", SIZE, bring)
    held = Blocks()
    with pytest.raises(CheckpointError, match="changed meanwhile"):
        files.open_file(tmp_path / "b", held).read_into(memoryview(bytearray(3)), 0)
    held.close()


def test_a_stub_alone_is_refused(tmp_path: Path) -> None:
    """Whoever does not know of the file elsewhere finds it truncated, never zeros."""
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    stub = tmp_path / "model.safetensors"
    stub.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path)
    files.register(stub, 8 + len(header) + 8, lambda start, stop: iter(()))
    assert open_checkpoint(tmp_path).num_bytes == 8
