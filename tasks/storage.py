"""Files that are whole or absent.

Whatever is written goes to a temporary folder beside its place, is flushed to the disk, and is
renamed. A reader never sees half a file, and a writer that dies leaves the old state.

A temporary folder has a name that nobody else gives, and its writer holds a lock on it. So two
writers of one path do not meet, and the next writer of that path removes what a dead one has left.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

INCOMPLETE = ".incomplete"
_OURS = re.compile(r"\.alloy-[0-9a-f]{12}\.incomplete$")
_NEW, _OLD = "new", "old"  # in a temporary folder: what is being written, what it has replaced
_CHUNK_BYTES = 1 << 20


def _flush(path: Path) -> None:
    """Ask the kernel to put a file or a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_file(path: Path) -> Generator[Path]:
    """Yield a temporary path of the same name; rename it to `path` when the block ends well."""
    with _temporary(path) as folder:
        partial = folder / path.name
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)


@contextmanager
def write_folder(path: Path) -> Generator[Path]:
    """Yield a new empty folder; it takes the place of `path` when the block ends well.

    An existing `path` stands until the new one is complete on disk.
    """
    with _temporary(path) as folder:
        new = folder / _NEW
        new.mkdir()
        yield new
        for entry in sorted(new.rglob("*")):
            _flush(entry)
        _flush(new)
        old = folder / _OLD
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        _flush(path.parent)


@contextmanager
def _temporary(path: Path) -> Generator[Path]:
    """A folder beside `path` for as long as the block lasts, locked by this process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    folder, descriptor = _new_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _new_folder(path: Path) -> tuple[Path, int | None]:
    """A folder of a new name, and its lock: None on a file system that has no locks."""
    while True:
        folder = path.with_name(f"{path.name}.alloy-{uuid.uuid4().hex[:12]}{INCOMPLETE}")
        folder.mkdir()
        try:
            return folder, _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # a process that looks for leftovers was quicker than our lock
        except OSError:
            return folder, None


def remove_leftovers(path: Path) -> None:
    """Remove what dead writers of a file or folder have left beside it.

    One that died between its two renames had the new folder complete: it is put in its place.
    """
    for folder in path.parent.glob(f"{_escaped(path.name)}.alloy-*{INCOMPLETE}"):
        if not _OURS.fullmatch(folder.name, len(path.name)) or folder.is_symlink():
            continue
        try:
            descriptor = _lock(folder)
        except OSError:  # its writer lives, or nobody can tell
            continue
        try:
            if (folder / _OLD).exists() and not path.exists():
                (folder / _NEW).rename(path)
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _lock(folder: Path) -> int:
    """Lock a folder until the descriptor that is returned is closed.

    Raises BlockingIOError where another process has it, FileNotFoundError where it is gone, another
    OSError where the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def resumable_folder(path: Path) -> Generator[Path]:
    """Yield the folder beside `path` in which long work on it goes on after a kill or a failure.

    It is removed when the block ends well. Raises BlockingIOError if another process works there.
    """
    folder = path.with_name(f"{path.name}.alloy-work{INCOMPLETE}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = _lock(folder)
    except BlockingIOError as error:
        raise BlockingIOError(
            errno.EWOULDBLOCK,
            f"another process is writing {path}: wait until it is done, then run this again",
        ) from error
    try:
        yield folder
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    with write_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path):
    return json.loads(path.read_text())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """One SHA-256 over the relative names and contents of all files of a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()
