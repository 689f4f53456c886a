"""A look at a checkpoint that is not here yet: its config, and which files it has."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import storage
from tasks.sources.folder import Folder
from tasks.sources.place import place
from tasks.sources.resolve import CONFIG, resolve
from tasks.sources.source import MANIFEST, SourceError


@dataclass(frozen=True)
class Glance:
    """What can be said of a checkpoint without its weights."""

    config: dict[str, Any]
    files: Collection[str]


def glance(source: str, fetched: Path) -> Glance | None:
    """Look at a source; None where nothing can be said, and `fetch` will say why.

    Args:
        source: as recipes name it.
        fetched: where `fetch` puts it; what is there of this source is looked at instead.
    """
    origin = place(source)
    if isinstance(origin, Folder):
        return _in(origin.path)
    manifest = fetched / MANIFEST
    if manifest.is_file() and storage.read_json(manifest).get("source") == source:
        return _in(fetched)
    try:
        snapshot = resolve(source)
        file = next(file for file in snapshot.files if file.path == CONFIG)
        content = b"".join(origin.read(snapshot, file, 0, file.size))
    except (SourceError, ConnectionError):
        return None
    return _read(content, [file.path for file in snapshot.files])


def _in(folder: Path) -> Glance | None:
    path = folder / CONFIG
    if not path.is_file():
        return None
    return _read(path.read_bytes(), [p.name for p in folder.iterdir() if p.is_file()])


def _read(content: bytes, files: Collection[str]) -> Glance | None:
    try:
        config = json.loads(content)
    except ValueError:
        return None
    return Glance(config, files) if isinstance(config, dict) else None
