"""A source: a place that has files, and tells which they are at one moment."""

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from tasks.sources.transfer import ATTEMPTS, PAUSE_SECONDS

MANIFEST = "manifest.json"
PIECE_BYTES = 1 << 16
TIMEOUT_SECONDS = 30


class SourceError(ValueError):
    """A source is not there, not allowed, or not what the recipe says."""


class UnreachableError(ConnectionError):
    """The place of a source does not answer."""


class Data(BaseModel):
    """Frozen; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RemoteFile(Data):
    """One file of a snapshot, with the hashes that its place tells without sending the file."""

    path: str
    size: int = Field(ge=0)
    sha256: str | None = None
    git_sha1: str | None = None  # of the blob: what a hub tells of files that are not in LFS
    md5: str | None = None
    key: str | None = None  # what its place calls it, where that is not its path
    version: str | None = None  # a bucket's version id
    etag: str | None = None

    @field_validator("path")
    @classmethod
    def _stays_in_its_folder(cls, path: str) -> str:
        parts = path.split("/")
        if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{path!r} would leave the checkpoint's folder; the source is refused")
        return path


class Snapshot(Data):
    """The files of a source at one moment."""

    source: str
    revision: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[str, ...] = ()  # files of the source that no checkpoint of ours needs


class Source(Protocol):
    """A place that has checkpoints."""

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        """The immutable revision, and every file it has."""
        ...

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterable[bytes]:
        """A range of a file exactly as it was resolved."""
        ...


def digest(parts: Iterable[str]) -> str:
    """One SHA-256 over lines."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


T = TypeVar("T")


def again(ask: Callable[[], T], *, if_raised: tuple[type[Exception], ...]) -> T:
    """Ask until it is answered, a few times, with growing pauses."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return ask()
        except if_raised:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    return ask()
