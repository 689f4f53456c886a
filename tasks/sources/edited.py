"""Files of a fetched checkpoint that are no longer what was fetched."""

from pathlib import Path

from tasks import storage
from tasks.sources.source import MANIFEST, SourceError

_MOST_NAMES = 3


def edited(folder: Path, *, all_hashes: bool) -> list[str]:
    """The files that are not what the manifest says: changed, missing, or added.

    Hidden files that were not fetched are a file manager's, and no loader reads them.
    Without `all_hashes` a file of the right size is read only if it was written after the manifest,
    which fetch writes last.
    """
    manifest = folder / MANIFEST
    fetched = storage.read_json(manifest)["files"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    written = manifest.stat().st_mtime_ns

    def differs(name: str) -> bool:
        path = folder / name
        state = path.stat()
        if state.st_size != fetched[name]["size"]:
            return True
        is_read = all_hashes or state.st_mtime_ns > written
        return is_read and storage.sha256(path) != fetched[name]["sha256"]

    others = {
        name
        for name in there ^ {*fetched, MANIFEST}
        if name in fetched or not Path(name).name.startswith(".")
    }
    return sorted(others | {name for name in there & fetched.keys() if differs(name)})


def refuse_edited(checkpoints: Path) -> None:
    """Raise SourceError where a fetched checkpoint was changed since: nothing would record it."""
    for manifest in sorted(checkpoints.glob(f"*/{MANIFEST}")):
        if names := edited(manifest.parent, all_hashes=False):
            raise SourceError(
                f"{manifest.parent}: {shown(names)}: not what was fetched; run the stage fetch "
                "again to have that back, or give the changed checkpoint as a source of its own"
            )


def shown(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
