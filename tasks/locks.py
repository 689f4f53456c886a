"""Locks on a workspace: a run's (`flows.workspace`) and the one that every stage shares.

A lock is an open file, so that whatever ends its holder frees it. The file says who holds it.
"""

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tasks.workspace import STATE

STAGES = STATE / "stages.lock"


@contextmanager
def hold_workspace(what: str) -> Generator[None]:
    """Show runs that a stage works here; stages do not wait for each other."""
    descriptor = open_lock(STAGES)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        sign_lock(descriptor, what)
        yield
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> int:
    path.parent.mkdir(exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def sign_lock(descriptor: int, what: str) -> None:
    """Write down who holds a lock."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    holder = json.dumps({"pid": os.getpid(), "what": what, "since": since})
    os.pwrite(descriptor, holder.encode(), 0)


def lock_holder(path: Path) -> str:
    """Name who holds a lock."""
    try:
        holder = json.loads(path.read_text())
        return f"{holder['what']} (process {holder['pid']}, since {holder['since']})"
    except (ValueError, KeyError):  # between taking the lock and signing it
        return "another run"
