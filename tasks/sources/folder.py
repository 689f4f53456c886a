"""A folder on this machine as a source; its revision is the digest of all its files."""

from collections.abc import Iterator
from pathlib import Path

from tasks.registry.secrets import without_secrets
from tasks.sources.source import PIECE_BYTES, RemoteFile, Snapshot, SourceError, digest
from tasks.storage import sha256


class Folder:
    """A folder on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse_missing(self) -> None:
        """Raise SourceError where the folder is not there."""
        if not self.path.is_dir():
            raise SourceError(
                f"{without_secrets(str(self.path))}: no such folder; "
                "give one in the Hugging Face layout"
            )

    def resolve(self) -> tuple[str, list[RemoteFile]]:
        self.refuse_missing()
        files = [
            RemoteFile(
                path=path.relative_to(self.path).as_posix(),
                size=path.stat().st_size,
                sha256=sha256(path),
            )
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
        ]
        return digest(f"{file.path} {file.sha256}" for file in files), files

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> Iterator[bytes]:
        with (self.path / file.path).open("rb") as content:
            content.seek(start)
            while start < stop and (piece := content.read(min(PIECE_BYTES, stop - start))):
                start += len(piece)
                yield piece
        if start < stop:
            raise SourceError(f"{self.path / file.path} changed while it was read; run it again")
