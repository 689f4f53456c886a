"""The unfinished result: a folder that is ours by its journal, locked, resumed or cleared.

Nothing in it is removed or overwritten unless the journal says that a merge wrote it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alloy.checkpoint.hash import sha256
from alloy.errors import CheckpointError

_JOURNAL = "journal.jsonl"
LOCK = "lock"
_MOVE_IT = "move or remove it, or choose another output"


class Journal:
    """The record of an unfinished result: every file's name first, then each finished one's hash.

    The names are what makes a folder ours: another merge may remove these files and nothing else.
    """

    def __init__(self, folder: Path, plan: str, files: Sequence[str]):
        self.path = folder / _JOURNAL
        self.finished: dict[str, str] = {}
        entries = _journal_entries(folder)
        if entries and entries[0]["plan"] == plan:
            for entry in entries[1:]:
                file = folder / entry["file"]
                if file.is_file() and sha256(file) == entry["sha256"]:
                    self.finished[entry["file"]] = entry["sha256"]
        else:
            remove_ours(folder, keep=LOCK)
            self._append({"plan": plan, "files": list(files)})
        self.resumed = tuple(self.finished)

    def add(self, file: str, digest: str) -> None:
        self._append({"file": file, "sha256": digest})
        self.finished[file] = digest

    def _append(self, entry: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink()


def _journal_entries(folder: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; a last line that a crash cut short is left out.

    Raises:
        CheckpointError: the journal is not one of ours.
    """
    path = folder / _JOURNAL
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, so it is not ours; {_MOVE_IT}")
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        entry: Any = None
        with suppress(ValueError):
            entry = json.loads(line)
        if not _is_entry(entry, first=number == 1):
            raise CheckpointError(
                f"{path}: line {number} is not a line of a merge's journal; {_MOVE_IT}"
            )
        entries.append(entry)
    return entries


def _is_entry(entry: Any, *, first: bool) -> bool:
    if not isinstance(entry, dict):
        return False
    if first:
        files = entry.get("files")
        plain = isinstance(files, list) and all(_is_plain_name(name) for name in files)
        return plain and isinstance(entry.get("plan"), str)
    return _is_plain_name(entry.get("file")) and isinstance(entry.get("sha256"), str)


def _is_plain_name(name: object) -> bool:
    """True of a name that stays within its folder: a file, or a file of a folder in it."""
    if not isinstance(name, str) or "\0" in name:
        return False
    parts = name.split("/")
    return len(parts) <= 2 and all(Path(part).name == part != ".." for part in parts)


def remove_ours(folder: Path, keep: str | None = None) -> None:
    """Remove what the folder's journal names, itself last; a file that is not ours stays."""
    entries = _journal_entries(folder)
    for name in (*(entries[0]["files"] if entries else ()), _JOURNAL, LOCK):
        if name != keep:
            (folder / name).unlink(missing_ok=True)
    for name in {Path(name).parent for name in (entries[0]["files"] if entries else ())}:
        if name != Path() and (folder / name).is_dir():
            (folder / name).rmdir()


def refuse_foreign(folder: Path) -> None:
    """Refuse an unfinished folder unless it is absent, empty, or holds only what its journal names.

    Raises:
        CheckpointError: a link, a file, or a folder with anything that an earlier merge did not
            write.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, and a merge would write through it; {_MOVE_IT}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file where a merge keeps its work; {_MOVE_IT}")
    entries = _journal_entries(folder)
    ours = {_JOURNAL, *(entries[0]["files"] if entries else ())}
    folders = {str(Path(name).parent) for name in ours} - {"."}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_lock = name == LOCK and path.stat(follow_symlinks=False).st_size == 0
        is_file = (is_lock or name in ours) and path.is_file()
        if path.is_symlink() or not (is_file or (name in folders and path.is_dir())):
            raise CheckpointError(
                f"{folder} holds {name!r}, which no earlier merge wrote; {_MOVE_IT}"
            )


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """The unfinished folder, ours alone; what it holds stays for the next run if this one dies."""
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: another run is writing it; wait for it or stop it"
            ) from error
        yield


def write_through(path: Path, content: bytes) -> None:
    """Write a file, in a folder of its own if its name has one, and put it on the disk."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
