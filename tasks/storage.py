"""Files that are whole or absent.

Whatever is written goes to a temporary name beside its place, is flushed to the disk, and is renamed.
A reader never sees half a file, and a run that dies leaves the old state and a `*.incomplete` that the
next run removes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

INCOMPLETE = ".incomplete"
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
    """Yield a temporary path; rename it to `path` when the block ends well, remove it when it raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + INCOMPLETE)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def write_folder(path: Path) -> Generator[Path]:
    """Yield a new empty folder; it takes the place of `path` when the block ends well.

    An existing `path` stands until the new one is complete on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + INCOMPLETE)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for entry in sorted(partial.rglob("*")):
            _flush(entry)
        retired = path.with_name(path.name + ".old" + INCOMPLETE)
        shutil.rmtree(retired, ignore_errors=True)
        if path.exists():
            path.rename(retired)
        partial.rename(path)
        _flush(path.parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
