"""Bring files over in ranges: several at once, resumed where an interrupted run stopped.

Beside each file that is under way lies a journal of the ranges that are on the disk. A connection
that breaks is opened again at the byte where it broke; a process that dies loses the ranges that
were in flight.
"""

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

RANGE_BYTES = 16 << 20
CONNECTIONS = 8
ATTEMPTS = 5  # connections in a row that bring no byte
PAUSE_SECONDS = 0.5  # before the second attempt; doubles with each further one
JOURNAL = ".ranges"

Read = Callable[[int, int], Iterable[bytes]]
"""The bytes of a file from start to stop, in pieces; ConnectionError when the network breaks."""


class File(NamedTuple):
    """A file that another place has and this one wants."""

    path: str
    size: int  # bytes
    read: Read
    in_ranges: bool = True  # False: the other side can only send it whole


def bring(files: Iterable[File], folder: Path, *, title: str) -> None:
    """Write the files into a folder; what an earlier call already brought stays.

    Raises ConnectionError when a connection breaks again and again, OSError when the disk is full:
    what is there by then is used by the next call.
    """
    work, there = [], 0
    for file in files:
        todo = _open(file, folder)
        there += file.size - sum(stop - start for start, stop in todo)
        work += [(file, *span) for span in todo]
    total = there + sum(stop - start for _, start, stop in work)
    with (
        tqdm(total=total, initial=there, desc=title, unit="B", unit_scale=True) as bar,
        _threads() as (pool, broken),
    ):
        lock = threading.Lock()  # of the journals and of the bar

        def bring_range(file: File, start: int, stop: int) -> None:
            def moved(num_bytes: int) -> None:
                if broken.is_set():
                    raise ConnectionError("another range of this transfer failed")
                with lock:
                    bar.update(num_bytes)

            _write_range(folder / file.path, persist(file, start, stop), start, stop, moved)
            with lock, _journal(folder / file.path).open("a") as journal:
                journal.write(f"{start} {stop}\n")

        jobs = [pool.submit(bring_range, *span) for span in work]
        done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in done:
            job.result()


def forget(path: Path) -> None:
    """Throw away a file and its journal, so that the next `bring` starts it anew."""
    path.unlink(missing_ok=True)
    _journal(path).unlink(missing_ok=True)


def forget_journals(folder: Path) -> None:
    """Take the journals out of a folder whose files are all there."""
    for journal in folder.rglob(f"*{JOURNAL}"):
        journal.unlink()


def _journal(path: Path) -> Path:
    return path.with_name(path.name + JOURNAL)


def _open(file: File, folder: Path) -> list[tuple[int, int]]:
    """Make room for a file and say which of its ranges are still to come."""
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    step = RANGE_BYTES if file.in_ranges else max(file.size, 1)
    spans = [(start, min(start + step, file.size)) for start in range(0, file.size, step)]
    if path.is_file() and path.stat().st_size == file.size and _journal(path).is_file():
        lines = _journal(path).read_text().splitlines()
        there = {tuple(map(int, line.split())) for line in lines if len(line.split()) == 2}
        return [span for span in spans if span not in there]
    forget(path)
    with path.open("wb") as empty:
        empty.truncate(file.size)
    _journal(path).touch()
    return spans


@contextmanager
def _threads() -> Generator[tuple[ThreadPoolExecutor, threading.Event]]:
    """A pool that stops soon, not after all its work, when the block raises."""
    broken = threading.Event()
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="transfer")
    try:
        yield pool, broken
    except BaseException:
        broken.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_range(
    path: Path, pieces: Iterable[bytes], start: int, stop: int, moved: Callable[[int], None]
) -> None:
    with path.open("r+b") as target:
        target.seek(start)
        for piece in pieces:
            target.write(piece)
            moved(len(piece))
        target.flush()
        # The journal must never promise bytes that a power cut can still take.
        os.fdatasync(target.fileno())


def persist(file: File, start: int, stop: int) -> Iterator[bytes]:
    """All bytes of a range, over as many connections as it takes while each brings something."""
    failures = 0
    while start < stop:
        begun = start
        try:
            for piece in file.read(start, stop):
                start += len(piece)
                if start > stop:
                    raise ConnectionError(f"{file.path}: more bytes came than were asked for")
                yield piece
            if start < stop:
                raise ConnectionError(f"{file.path}: the connection ended at byte {start}")
        except ConnectionError as error:
            failures = 1 if start > begun else failures + 1
            if failures >= ATTEMPTS or start > stop:
                raise
            time.sleep(PAUSE_SECONDS * 2 ** (failures - 1))
            tqdm.write(f"{file.path}: {error}; going on at byte {start}")
