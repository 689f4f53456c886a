"""SHA-256 of files: computed, or known from who verified it.

The hub's cache names large files by their hash. A manifest beside a checkpoint is believed only if
the caller says that its own fetch wrote it; anybody can put a file of that name there.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alloy.checkpoint.ranges.files import elsewhere, size_of
from alloy.checkpoint.reading import read_json, source_file
from alloy.errors import CheckpointError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """The origin of a checkpoint, as far as it is known and not merely claimed."""

    source: str
    revision: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    """File name to SHA-256."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def origin_of(path: Path, files: list[Path], *, trust_manifest: bool) -> Origin:
    """The origin of a checkpoint: its manifest's if that is trusted, the hub's, or its name."""
    folder = path if path.is_dir() else path.parent
    if trust_manifest and (origin := _from_manifest(folder)) is not None:
        return origin
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        name = repository.removeprefix("models--").replace("--", "/")
        return Origin(f"hf://{name}", folder.name, _blob_names(files, folder))
    return Origin(path.name or path.resolve().name)


def _from_manifest(folder: Path) -> Origin | None:
    """The origin that our own fetch recorded; None for any other file of that name.

    It has no hash of a file that is read by ranges.
    """
    try:
        path = source_file(folder, "manifest.json")
        data: dict[str, Any] = {} if path is None else read_json(path)
    except CheckpointError:
        return None
    source, revision, files = data.get("source"), data.get("revision"), data.get("files")
    if not isinstance(source, str) or not isinstance(revision, str | None):
        return None
    if not isinstance(files, dict):
        return None
    hashes = {}
    for name, entry in files.items():
        file = folder / name
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if isinstance(entry, dict) and digest is None and elsewhere(file) is not None:
            continue
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            return None
        if file.is_file() and size_of(file) == entry.get("size"):
            hashes[name] = digest
    return Origin(source, revision, hashes)


def _blob_names(files: list[Path], folder: Path) -> dict[str, str]:
    """Hashes by which the hub's cache names the blobs that a snapshot links to."""
    blobs = folder.resolve().parent.parent / "blobs"
    return {
        file.name: target.name
        for file in files
        if file.is_symlink()
        and (target := file.resolve()).parent == blobs
        and _SHA256.fullmatch(target.name)
    }
