"""Workers read and compute chunks at once; hashing, writing and flushing follow behind.

Every output tensor is cut into pieces. Workers take them in the order of the output file, several
files at a time. SHA-256 wants bytes in order: finished pieces wait for their turn, and whichever
worker completes the next one hashes all that are due and queues them for the disk. The order of
computation never shows in the result.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alloy.checkpoint.adapter.compute import Input
from alloy.checkpoint.engine.steps import Rows, Shard, Step, Work, read_mapped
from alloy.checkpoint.engine.writing import BLOCK_BYTES, GrowingFile
from alloy.checkpoint.format import ITEM_BYTES
from alloy.checkpoint.ranges.blocks import AHEAD_BYTES, Ahead, Blocks, Span
from alloy.checkpoint.ranges.files import elsewhere

_CHUNK_BYTES = 1 << 20
_SMALLEST_CHUNK_BYTES = 1 << 16
_BUFFER_BYTES = 96 << 20
_CHUNKS_PER_WORKER = 7  # four of inputs, one of output, two that wait to be hashed
LARGE_BYTES = 32 << 20
"""Larger inputs, which only methods of whole tensors need, are held by one worker at a time."""
_STAGE_BYTES = 2 << 20
"""Bytes of a file gathered before they go to the disk; two of these per file that grows."""
_STAGES_BYTES = 16 << 20
_PREFETCH_CHUNKS = 8
HELD_BYTES = 192 << 20
"""Output of tensors that are merged before their thresholds are known: it waits for them."""


def chunk_bytes_for(threads: int) -> int:
    """Bytes of a model's chunk: a few stay in the cache, all buffers within `_BUFFER_BYTES`."""
    share = _BUFFER_BYTES // (_CHUNKS_PER_WORKER * threads)
    return max(
        _SMALLEST_CHUNK_BYTES,
        min(_CHUNK_BYTES, share // _SMALLEST_CHUNK_BYTES * _SMALLEST_CHUNK_BYTES),
    )


def execute(
    shards: Sequence[Shard],
    folder: Path,
    *,
    threads: int,
    chunk_bytes: int,
    on_shard: Callable[[str, str], None],
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write the shards into the folder.

    Args:
        on_shard: called with (file, SHA-256) once a file is complete on the disk.
        on_bytes: called with the number of bytes just computed, from the workers.

    Raises:
        whatever a step raises; a file that is complete then was reported to `on_shard`.
    """
    schedule = _Schedule(
        shards,
        folder,
        threads=threads,
        chunk_bytes=chunk_bytes,
        on_shard=on_shard,
        on_bytes=on_bytes,
    )
    workers = [
        threading.Thread(target=schedule.run, args=(i,), name=f"merge-{i}", daemon=True)
        for i in range(threads)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(timeout=0.2)  # a bounded wait lets Ctrl-C through
    finally:
        schedule.stop()
        for worker in workers:
            worker.join()
        schedule.close()


@dataclass
class _Task:
    """A step while it is worked on."""

    step: Step
    output: _Output
    work: Work
    spans: list[tuple[int, int]]
    round: int = 0
    """Rounds of measuring that are complete."""
    remaining: int = 0
    """Pieces of this round that are not done."""
    blocks: Blocks | None = None
    inputs: list[Input] = field(default_factory=list)
    held: dict[int, tuple[int, np.ndarray]] | None = None
    """By first element, the index and the output of pieces that wait for the tensor's last."""

    def __post_init__(self) -> None:
        self.remaining = len(self.spans)

    def open(self) -> None:
        self.inputs = [Input(entry, self.blocks) for entry in self.step.inputs]

    def close(self) -> None:
        while self.inputs:
            self.inputs.pop().close()


class _Piece(NamedTuple):
    task: _Task
    start: int
    stop: int
    round: int
    index: int
    """Position in its file, for the pieces that write."""

    @property
    def measures(self) -> bool:
        return self.round < self.task.work.num_measures and len(self.task.spans) > 1


class _Output:
    """A file of the result: its pieces are computed in any order, hashed and written in theirs."""

    def __init__(self, shard: Shard, folder: Path, stage_bytes: int, writer: ThreadPoolExecutor):
        self.shard = shard
        self.num_pieces = 0
        self._sealed = False  # every piece was handed out
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[np.ndarray, Callable[[np.ndarray], None]]] = {}
        self._next, self._hashing = 0, False
        self._sha256 = hashlib.sha256()
        (folder / shard.file).parent.mkdir(exist_ok=True)
        self._file = GrowingFile(folder / shard.file, shard.num_bytes, stage_bytes, writer)
        self._append(np.frombuffer(shard.header, np.uint8))

    def deposit(self, index: int, data: np.ndarray, release: Callable[[np.ndarray], None]) -> bool:
        """Hash this piece when its turn comes, then give its buffer back; True when all is done.

        The thread that hashes it may have brought another piece: each comes with its own `release`.
        """
        with self._lock:
            self._pending[index] = data, release
            if self._hashing:
                return False
            self._hashing = True
        while True:
            with self._lock:
                due = self._pending.pop(self._next, None)
                if due is None:
                    self._hashing = False
                    return self._done()
                self._next += 1
            data, release = due
            self._append(data)
            release(data)

    def seal(self) -> bool:
        """No piece follows; True when all were hashed already."""
        with self._lock:
            self._sealed = True
            return not self._hashing and self._done()

    def _done(self) -> bool:
        """True if everything is hashed; once only."""
        if not (self._sealed and self._next == self.num_pieces):
            return False
        self._sealed = False
        return True

    def _append(self, data: np.ndarray) -> None:
        self._sha256.update(data.data)
        self._file.append(data)

    def finish(self) -> str:
        """Put the file on the disk; its SHA-256."""
        self._file.finish()
        return self._sha256.hexdigest()

    def close(self) -> None:
        self._file.close()


class _Schedule:
    """Hands out pieces: each lane is one output file in order, each worker prefers its own lane."""

    def __init__(
        self,
        shards: Sequence[Shard],
        folder: Path,
        *,
        threads: int,
        chunk_bytes: int,
        on_shard: Callable[[str, str], None],
        on_bytes: Callable[[int], None],
    ):
        self._folder, self._threads, self._chunk_bytes = folder, threads, chunk_bytes
        self._on_shard, self._on_bytes = on_shard, on_bytes
        self._condition = threading.Condition()
        self._waiting = deque(shards)
        self._lanes: list[Iterator[_Piece] | None] = [None] * max(1, min(threads, len(shards)))
        self._heads: list[_Piece | None] = [None] * len(self._lanes)
        self._outputs: list[_Output] = []
        self._tasks: list[_Task] = []
        self._stopped = False
        self._error: BaseException | None = None
        self._large = threading.Lock()  # one large tensor is held whole at a time
        self._buffers = [np.empty(chunk_bytes, np.uint8) for _ in range(2 * threads + 2)]
        self._tokens = threading.Semaphore(len(self._buffers))
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="merge-flush")
        self._writer = ThreadPoolExecutor(len(self._lanes), thread_name_prefix="merge-write")
        share = _STAGES_BYTES // (2 * len(self._lanes)) // BLOCK_BYTES * BLOCK_BYTES
        self._stage_bytes = max(BLOCK_BYTES, min(_STAGE_BYTES, share))
        self._flushes: list[Future] = []
        self._held_bytes = 0
        self._held_buffers: list[np.ndarray] = []
        self._blocks = Blocks() if _reads_elsewhere(shards) else None

    def run(self, worker: int) -> None:
        """The life of one worker."""
        rows = np.empty(0, np.uint8)
        try:
            while True:
                self._tokens.acquire()
                piece = self._next_piece(worker)
                if piece is None:
                    self._tokens.release()
                    return
                rows = self._do(piece, rows)
        except BaseException as error:
            self._fail(error)

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._tokens.release(self._threads)
        if self._blocks is not None:
            self._blocks.close()

    def close(self) -> None:
        """Wait for the flushes; raise what went wrong."""
        self._flusher.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        for resource in (*self._tasks, *self._outputs):
            resource.close()
        if self._error is not None:
            raise self._error
        for flush in self._flushes:
            flush.result()

    def _fail(self, error: BaseException) -> None:
        with self._condition:
            if not self._stopped:  # later ones follow from the stop
                self._error, self._stopped = error, True
        self.stop()

    def _next_piece(self, worker: int) -> _Piece | None:
        with self._condition:
            while True:
                if self._stopped:
                    return None
                blocked = False
                for i in range(len(self._lanes)):
                    lane = (worker + i) % len(self._lanes)
                    piece = self._head(lane)
                    if piece is not None and piece.round <= piece.task.round:
                        self._heads[lane] = None
                        return piece
                    blocked |= piece is not None
                if not blocked:
                    return None
                self._condition.wait()

    def _head(self, lane: int) -> _Piece | None:
        while self._heads[lane] is None:
            pieces = self._lanes[lane]
            if pieces is None:
                if not self._waiting:
                    return None
                pieces = self._lanes[lane] = self._pieces(self._waiting.popleft())
            self._heads[lane] = next(pieces, None)
            if self._heads[lane] is None:
                self._lanes[lane] = None
        return self._heads[lane]

    def _pieces(self, shard: Shard) -> Iterator[_Piece]:
        output = _Output(shard, self._folder, self._stage_bytes, self._writer)
        self._outputs.append(output)
        if self._blocks is not None:
            Ahead(self._blocks, _inputs_of(shard), AHEAD_BYTES // len(self._lanes))
        for step in shard.steps:
            if not step.num_elements:
                continue
            work = step.work()
            task = _Task(step, output, work, list(self._spans(step, work)), blocks=self._blocks)
            task.open()
            self._tasks.append(task)
            if self._guesses(task):
                task.held, task.round = {}, work.num_measures
            elif len(task.spans) > 1:
                for round_ in range(work.num_measures):
                    for start, stop in task.spans:
                        yield _Piece(task, start, stop, round_, -1)
            else:
                task.round = work.num_measures
            for start, stop in task.spans:
                index = output.num_pieces
                output.num_pieces += 1
                yield _Piece(task, start, stop, work.num_measures, index)
        if output.seal():
            self._finish(output)

    def _guesses(self, task: _Task) -> bool:
        """True if the tensor is merged in one pass and waits for what it shows."""
        step, work, size = task.step, task.work, task.step.num_bytes
        if not work.num_measures or len(task.spans) == 1 or self._held_bytes + size > HELD_BYTES:
            return False
        if step.row_maps is not None or any(
            e.fold is not None or elsewhere(e.file) is not None for e in step.inputs
        ):
            return False  # a sample of single elements would cost as much as measuring

        if not work.guess(task.inputs):
            return False
        self._held_bytes += size
        return True

    def _spans(self, step: Step, work: Work) -> Iterator[tuple[int, int]]:
        size = _chunk_elements(step, work, self._chunk_bytes) if work.chunked else step.num_elements
        for start in range(0, step.num_elements, size):
            yield start, min(start + size, step.num_elements)

    def _do(self, piece: _Piece, buffer: np.ndarray) -> np.ndarray:
        task, step, work = piece.task, piece.task.step, piece.task.work
        with (
            self._large
            if step.input_bytes(piece.stop - piece.start) > LARGE_BYTES
            else nullcontext()
        ):
            buffer, rows = self._read(piece, buffer)
            if piece.measures:
                work.measure(piece.round, rows, piece.start)
                self._measured(task)
                self._tokens.release()
                return buffer
            if len(task.spans) == 1:
                for round_ in range(work.num_measures):
                    work.measure(round_, rows, 0)
                    work.prepare(round_)
            num_bytes = (piece.stop - piece.start) * ITEM_BYTES[step.dtype]
            out = self._buffer(num_bytes, held=task.held is not None)
            work.compute(rows, piece.start, out)
            del rows
        self._on_bytes(num_bytes)
        with self._condition:
            task.remaining -= 1
            last = task.remaining == 0
            if task.held is not None:
                task.held[piece.start] = piece.index, out
        if task.held is not None:
            self._tokens.release()
            if last:
                buffer = self._settle(task, buffer)
        if last:
            with self._condition:
                task.close()
                self._tasks.remove(task)
        if task.held is None:
            self._deposit(task, piece.index, out, self._release)
        return buffer

    def _deposit(
        self, task: _Task, index: int, out: np.ndarray, release: Callable[[np.ndarray], None]
    ) -> None:
        if task.output.deposit(index, out, release):
            self._finish(task.output)

    def _settle(self, task: _Task, buffer: np.ndarray) -> np.ndarray:
        """Everything of a tensor is computed: put right what was guessed, and let it be written."""
        held, work = task.held, task.work
        assert held is not None, "only tensors that wait are settled"
        if not work.settle({start: out for start, (_, out) in held.items()}):
            for round_ in range(work.num_measures):
                for start, stop in task.spans:
                    buffer, rows = self._read(_Piece(task, start, stop, round_, -1), buffer)
                    work.measure(round_, rows, start)
                work.prepare(round_)
            for start, stop in task.spans:
                index, out = held[start]
                buffer, rows = self._read(_Piece(task, start, stop, task.round, index), buffer)
                work.compute(rows, start, out)
        for start, _ in task.spans:
            self._deposit(task, *held.pop(start), self._release_held)
        return buffer

    def _measured(self, task: _Task) -> None:
        """One piece of a round of measuring is done; the last of them completes the round."""
        with self._condition:
            task.remaining -= 1
            if task.remaining:
                return
        task.work.prepare(task.round)
        with self._condition:
            task.round += 1
            task.remaining = len(task.spans)
            self._condition.notify_all()

    def _read(self, piece: _Piece, buffer: np.ndarray) -> tuple[np.ndarray, Rows]:
        """The inputs' bytes of a piece, one row each, in a buffer that is used again."""
        task, step = piece.task, piece.task.step
        if not step.inputs:
            return buffer, []
        if step.row_maps is not None:
            return buffer, read_mapped(step, task.inputs, piece.start, piece.stop)
        widths = [(piece.stop - piece.start) * ITEM_BYTES[e.dtype] for e in step.inputs]
        space = task.work.memory(sum(widths))
        if space is None:
            space = buffer
        if sum(widths) > len(space):
            space = np.empty(sum(widths), np.uint8)
            buffer = space if sum(widths) <= LARGE_BYTES else buffer
        rows: Rows
        if len(set(widths)) == 1:
            rows = space[: sum(widths)].reshape(len(widths), widths[0])
        else:
            rows = np.split(space[: sum(widths)], np.cumsum(widths)[:-1])
        for source, row in zip(task.inputs, rows, strict=True):
            start = piece.start * ITEM_BYTES[source.entry.dtype]
            _prefetch(source, start, len(row))
            source.read(piece.start, row)
        return buffer, rows

    def _buffer(self, num_bytes: int, *, held: bool) -> np.ndarray:
        buffers = self._held_buffers if held else self._buffers
        with self._condition:
            if num_bytes <= self._chunk_bytes and buffers:
                return buffers.pop()[:num_bytes]
        return np.empty(max(num_bytes, self._chunk_bytes if held else 0), np.uint8)[:num_bytes]

    def _release_held(self, data: np.ndarray) -> None:
        with self._condition:
            self._held_bytes -= len(data)
            self._held_buffers.append(data if data.base is None else data.base)

    def _release(self, data: np.ndarray) -> None:
        buffer = data if data.base is None else data.base
        with self._condition:
            if len(buffer) == self._chunk_bytes:
                self._buffers.append(buffer)
        self._tokens.release()

    def _finish(self, output: _Output) -> None:
        def flush() -> None:
            self._on_shard(output.shard.file, output.finish())

        self._flushes.append(self._flusher.submit(flush))


def _chunk_elements(step: Step, work: Work, chunk_bytes: int) -> int:
    """Elements per chunk: `chunk_bytes` of the widest dtype, less when there are many inputs."""
    widest = max(ITEM_BYTES[dtype] for dtype in (step.dtype, *(e.dtype for e in step.inputs)))
    size = chunk_bytes // widest * 4 // max(4, len(step.inputs))
    alignment = work.alignment
    if step.row_maps is not None:
        alignment = math.lcm(alignment, step.inputs[0].num_elements // step.inputs[0].shape[0])
    return max(alignment, size // alignment * alignment)


def _inputs_of(shard: Shard) -> Iterator[list[Span]]:
    """The bytes that each step of a file of the result reads, in their order."""
    for step in shard.steps:
        yield [Span(e.file, e.start, e.start + e.num_bytes) for e in step.inputs]


def _reads_elsewhere(shards: Sequence[Shard]) -> bool:
    files = {entry.file for shard in shards for step in shard.steps for entry in step.inputs}
    return any(elsewhere(file) is not None for file in files)


def _prefetch(source: Input, start: int, num_bytes: int) -> None:
    """Let the kernel read the next chunks while this one is computed."""
    entry = source.entry
    first = start if start == 0 else start + _PREFETCH_CHUNKS * num_bytes
    stop = min(start + (1 + _PREFETCH_CHUNKS) * num_bytes, entry.num_bytes)
    if first < stop:
        source.file.will_need(entry.start + first, entry.start + stop)
