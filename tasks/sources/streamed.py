"""Sources that a merge reads by ranges, without a copy: `alloy merge ties OUT hf://a s3://b/c`.

What is brought is small: configs, tokenizers, and of each file of weights its header. The ranges
that the merge asks for are pinned to the state that was resolved, by a commit, a version or an
ETag.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alloy.checkpoint.ranges import files as ranges
from alloy.errors import CheckpointError
from tasks import storage
from tasks.sources import transfer
from tasks.sources.cache import cached, folder_of
from tasks.sources.resolve import files_to_bring, pinned, resolve
from tasks.sources.source import MANIFEST, Snapshot, SourceError

_FIRST_BYTES = 1 << 18
"""A first range, which holds most headers whole."""
_LONGEST_HEADER = 100_000_000  # the format's own limit; a longer one is refused where it is read


def streamed(source: str) -> Path:
    """A folder that stands for a source: a merge reads it as one that is here.

    A source that the cache holds in its present state, or that can only be sent whole, is read
    there.

    Raises:
        CheckpointError: as `tasks.sources.cache.cached`.
    """
    try:
        snapshot = resolve(source)
        files = files_to_bring(snapshot)
        if _is_cached(snapshot) or not all(file.in_ranges for file in files):
            return cached(source)
        snapshot = pinned(snapshot)
        files = files_to_bring(snapshot)
        folder = folder_of(source, _state(snapshot), within="ranges")
        if not _stands(folder):
            _write(folder, snapshot, files)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(error)) from error
    for file in files:
        if _is_weights(file.path):
            ranges.register(folder / file.path, file.size, _reader(source, file))
    return folder


def _is_cached(snapshot: Snapshot) -> bool:
    """True if the cache has this very state; `cached` looks whether it was edited."""
    manifest = folder_of(snapshot.source) / MANIFEST
    return manifest.is_file() and storage.read_json(manifest).get("revision") == snapshot.revision


def _state(snapshot: Snapshot) -> str:
    """A text that differs wherever a byte of the files may: their pins."""
    pins = (f"{f.path} {f.size} {f.version or f.etag or ''}" for f in snapshot.files)
    return "\n".join([snapshot.revision, *pins])


def _stands(folder: Path) -> bool:
    """True if the folder is there and as it was written."""
    if not (folder / MANIFEST).is_file():
        return False
    stubs = storage.read_json(folder / MANIFEST)["stubs"]
    return all((folder / n).is_file() and _hash(folder / n) == h for n, h in stubs.items())


def _write(folder: Path, snapshot: Snapshot, files: list[transfer.File]) -> None:
    weights = [file for file in files if _is_weights(file.path)]
    small = [file for file in files if file not in weights]
    with storage.write_folder(folder) as partial:
        transfer.bring(small, partial, title=snapshot.source)
        transfer.forget_journals(partial)
        with ThreadPoolExecutor(transfer.CONNECTIONS) as pool:
            list(pool.map(lambda file: _write_stub(partial / file.path, file), weights))
        stubs = {file.path: _hash(partial / file.path) for file in files}
        known = {file.path: stubs[file.path] for file in small}
        storage.write_json(
            partial / MANIFEST,
            {
                "source": snapshot.source,
                "revision": snapshot.revision,
                "files": {f.path: {"size": f.size, "sha256": known.get(f.path)} for f in files},
                "stubs": stubs,
            },
        )


def _write_stub(path: Path, file: transfer.File) -> None:
    """The header of a file of weights."""
    first = b"".join(transfer.persist(file, 0, min(_FIRST_BYTES, file.size)))
    length = int.from_bytes(first[:8], "little")
    stop = min(8 + length, file.size) if length <= _LONGEST_HEADER else 8
    if stop > len(first):
        first += b"".join(transfer.persist(file, len(first), stop))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(first[:stop])


def _reader(source: str, file: transfer.File) -> ranges.Bring:
    def bring(start: int, stop: int) -> Iterator[bytes]:
        try:
            yield from transfer.persist(file, start, stop)
        except SourceError as error:
            raise CheckpointError(f"{file.path} of {source}: {error}") from error

    return bring


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
