"""Bring the checkpoints of a recipe into `models/<recipe>/checkpoints/<name>/`, verified.

Every source names its present state, an immutable revision; files that are already here and
unchanged are not moved. A checkpoint takes its place only when every file has the right size and
hash, every safetensors file is whole, and its config names the architecture of the recipe.

    python -m tasks.fetch RECIPE
    python -m tasks.fetch --check RECIPE    # only say what has changed upstream
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alloy.errors import nearest
from tasks import storage
from tasks.recipe.load import Recipe
from tasks.recipe.shared import CheckpointParams
from tasks.sources import resolve as sources
from tasks.sources import transfer
from tasks.sources.edited import edited, shown
from tasks.sources.place import is_pinned
from tasks.sources.source import MANIFEST, RemoteFile, Snapshot, SourceError

_CHUNK_BYTES = 1 << 20


def resolve(recipe: Recipe) -> dict[str, Snapshot]:
    """The present snapshot of each source of a recipe; no file is moved.

    Raises SourceError for one that is not there, may not be read, or is known not to be what the
    recipe asks for; UnreachableError where nothing answers.
    """
    wanted, folder = recipe.fetch.checkpoints, recipe.workspace.checkpoints
    with ThreadPoolExecutor() as pool:
        resolved = pool.map(lambda name: _snapshot(wanted[name], folder / name), wanted)
        snapshots = dict(zip(wanted, resolved, strict=True))
    for name, snapshot in snapshots.items():
        _refuse_other(f"{recipe.where}: fetch.checkpoints.{name}", wanted[name], snapshot)
    return snapshots


def fetch(recipe: Recipe, snapshots: Mapping[str, Snapshot]) -> None:
    """Bring what is not here yet, and check all of it."""
    section, folder = recipe.fetch, recipe.workspace.checkpoints
    num_bytes = 0
    # Beside the stage's output: what is under way is no part of it, and survives a failed run.
    with storage.resumable_folder(folder) as incoming:
        for name, snapshot in snapshots.items():
            if _stands(folder / name, snapshot, section.checkpoints[name]):
                if section.checkpoints[name].base is None:
                    _refuse_other_architecture(folder / name, snapshot, section.model_type)
                print(f"{name}: unchanged, nothing moved")
                continue
            _bring(snapshot, incoming / name, section.checkpoints[name], section.model_type)
            _put(incoming / name / "files", folder / name)
            shutil.rmtree(incoming / name)
            num_bytes += sum(file.size for file in snapshot.files)
            if snapshot.left_out:
                print(f"{name}: left out {', '.join(snapshot.left_out)}")
    _remove_others(folder, snapshots)
    print(f"fetched {len(snapshots)} checkpoints: {num_bytes:,} bytes moved into {folder}")


def bring(source: str, folder: Path, *, on: str | None = None) -> Path:
    """One source of no recipe, verified, in a folder; what is there and unchanged is not moved.

    Args:
        on: the base of an adapter.

    Raises:
        as `fetch` and `resolve`.
    """
    wanted = CheckpointParams.model_construct(source=source, base=on, revision=None, sha256={})
    snapshot = _snapshot(wanted, folder)
    if not _stands(folder, snapshot, wanted):
        incoming = folder.with_name(f"{folder.name}.incoming")
        incoming.mkdir(parents=True, exist_ok=True)
        _bring(snapshot, incoming, wanted, None)
        _put(incoming / "files", folder)
        shutil.rmtree(incoming)
        print(f"{source}: {snapshot.revision}, {sum(f.size for f in snapshot.files):,} bytes")
    return folder


def main(recipe: Recipe, check: bool = False) -> None:
    snapshots = resolve(recipe)
    if check:
        for name, snapshot in snapshots.items():
            here = _manifest(recipe.workspace.checkpoints / name).get("revision")
            state = "unchanged" if here == snapshot.revision else "changed"
            print(f"{name}: {state}: {snapshot.source} is {snapshot.revision}")
    else:
        fetch(recipe, snapshots)


def _manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    return storage.read_json(path) if path.is_file() else {}


def _snapshot(wanted: CheckpointParams, here: Path) -> Snapshot:
    manifest = _manifest(here)
    # A commit cannot change: a recipe that names one needs no network once it is here.
    if is_pinned(wanted.source) and manifest.get("source") == wanted.source:
        return Snapshot(
            source=wanted.source,
            revision=manifest["revision"],
            files=tuple(RemoteFile(path=name, **file) for name, file in manifest["files"].items()),
            left_out=tuple(manifest["left_out"]),
        )
    return sources.resolve(wanted.source, adapter=wanted.base is not None)


def _refuse_other(where: str, wanted: CheckpointParams, snapshot: Snapshot) -> None:
    """Raise SourceError where the snapshot is known not to be what the recipe asks for."""
    if wanted.revision not in (None, snapshot.revision):
        raise SourceError(
            f"{where}: revision {wanted.revision} is asked for, {wanted.source} is now "
            f"{snapshot.revision}; change the source or the revision"
        )
    files = {file.path: file for file in snapshot.files}
    for name, expected in wanted.sha256.items():
        if name not in files:
            raise SourceError(
                f"{where}.sha256: {wanted.source} has no {name}: {nearest(name, list(files))}"
            )
        if files[name].sha256 not in (None, expected):
            raise SourceError(
                f"{where}: {name} has another hash: expected {expected}, found {files[name].sha256}"
            )


def _stands(folder: Path, snapshot: Snapshot, wanted: CheckpointParams) -> bool:
    """Say if the folder holds the snapshot, to the byte."""
    manifest = _manifest(folder)
    if (manifest.get("source"), manifest.get("revision")) != (snapshot.source, snapshot.revision):
        return False
    if manifest.get("adapter_on") != wanted.base:
        return False
    if names := edited(folder, all_hashes=True):
        print(f"{folder.name}: {shown(names)}: not what was fetched, and fetched again")
        return False
    hashes = {name: file["sha256"] for name, file in manifest["files"].items()}
    return hashes == hashes | wanted.sha256


def _bring(
    snapshot: Snapshot, incoming: Path, wanted: CheckpointParams, model_type: str | None
) -> None:
    """Fill `incoming/files` with a verified checkpoint; go on where a failed run stopped."""
    record, folder = incoming / "snapshot.json", incoming / "files"
    if not record.is_file() or Snapshot.model_validate_json(record.read_bytes()) != snapshot:
        shutil.rmtree(incoming, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text(snapshot.model_dump_json())
    files = sources.files_to_bring(snapshot)
    _refuse_full_disk(folder, sum(file.size for file in snapshot.files))
    config = [file for file in files if file.path == "config.json"]
    try:
        if wanted.base is None:  # a wrong architecture is seen before the weights are moved
            transfer.bring(config, folder, title=f"{incoming.name}: config.json")
            _refuse_other_architecture(folder, snapshot, model_type)
        transfer.bring(files, folder, title=incoming.name)
        hashes = {
            file.path: _verified(file, folder, snapshot, wanted.sha256) for file in snapshot.files
        }
        _refuse_broken_weights(folder, incoming, snapshot, adapter=wanted.base is not None)
        transfer.forget_journals(folder)
        _write_manifest(folder, snapshot, hashes, wanted.base)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _full_disk(folder, str(error)) from error


def _refuse_full_disk(folder: Path, num_bytes: int) -> None:
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if num_bytes - there > free:
        raise _full_disk(folder, f"{num_bytes - there:,} bytes are needed, {free:,} are free")


def _full_disk(folder: Path, reason: str) -> OSError:
    message = (
        f"the disk of {folder} is full: {reason}; what was fetched before stands, make room "
        "and run it again"
    )
    return OSError(errno.ENOSPC, message)


def _refuse_other_architecture(folder: Path, snapshot: Snapshot, model_type: str | None) -> None:
    actual = storage.read_json(folder / "config.json").get("model_type")
    if model_type not in (None, actual):
        raise SourceError(
            f"{snapshot.source}: config.json is of model_type {actual!r}, this recipe takes "
            f"{model_type!r}"
        )


def _verified(file: RemoteFile, folder: Path, snapshot: Snapshot, wanted: dict[str, str]) -> str:
    """The file's SHA-256; every hash that is known of it must agree."""
    path = folder / file.path
    digest = storage.sha256(path)
    expected = {
        "the recipe": (wanted.get(file.path), digest),
        "its source": (file.sha256, digest),
    }
    if file.git_sha1:
        blob = b"blob %d\0" % file.size
        expected["its source (git)"] = (
            file.git_sha1,
            _hash(path, hashlib.sha1(blob, usedforsecurity=False)),
        )
    if file.md5:
        md5 = hashlib.md5(usedforsecurity=False)
        expected["its source (MD5)"] = (file.md5, _hash(path, md5))
    for who, (right, computed) in expected.items():
        if right not in (None, computed):
            transfer.forget(path)
            raise SourceError(
                f"{snapshot.source}: {file.path} has the wrong hash: "
                f"{who} says {right}, found {computed}; the old state stands"
            )
    return digest


def _hash(path: Path, digest) -> str:
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _refuse_broken_weights(
    folder: Path, incoming: Path, snapshot: Snapshot, *, adapter: bool
) -> None:
    from alloy.checkpoint.adapter.opened import open_adapter
    from alloy.checkpoint.format import open_checkpoint
    from alloy.errors import CheckpointError

    try:
        if adapter:
            open_adapter(folder)
        else:
            open_checkpoint(folder)
    except CheckpointError as error:
        shutil.rmtree(incoming)
        reason = str(error).replace(f"{folder}{os.sep}", "")
        raise SourceError(f"{snapshot.source}: {reason}") from error


def _write_manifest(
    folder: Path, snapshot: Snapshot, hashes: dict[str, str], base: str | None
) -> None:
    lines = "\n".join(f"{name} {hashes[name]}" for name in sorted(hashes))
    storage.write_json(
        folder / MANIFEST,
        {
            "source": snapshot.source,
            "revision": snapshot.revision,
            "digest": hashlib.sha256(lines.encode()).hexdigest(),
            "files": {
                file.path: {"size": file.size, "sha256": hashes[file.path]}
                for file in snapshot.files
            },
            "left_out": list(snapshot.left_out),
            **({} if base is None else {"adapter_on": base}),  # another base is another checkpoint
        },
    )


def _put(files: Path, target: Path) -> None:
    with storage.write_folder(target) as partial:
        for path in files.iterdir():
            path.rename(partial / path.name)


def _remove_others(folder: Path, names: Iterable[str]) -> None:
    """Checkpoints that the recipe no longer names are no output of it."""
    for path in sorted(folder.iterdir()):
        if path.name not in names:
            shutil.rmtree(path)
            print(f"{path.name}: removed, the recipe no longer names it")
