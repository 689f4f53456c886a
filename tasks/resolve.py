"""Ask every source of a recipe what it is now, and write down the answer: `models/<recipe>/sources.json`.

This stage runs every time, because only asking can tell whether a hub, a bucket or a folder has changed.
Its answer names immutable revisions, so `fetch` and all that follows run again only when one is another.

    python -m tasks.resolve modality
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import TypeAdapter

from tasks import params, sources, storage
from tasks.command import run_stage
from tasks.params import CheckpointParams, FetchParams, ParamsError
from tasks.sources import Snapshot, SourceError

_SNAPSHOTS = TypeAdapter(dict[str, Snapshot])


def resolve(recipe: str) -> None:
    wanted = params.load(recipe, "fetch", FetchParams).checkpoints
    path = _path(recipe)
    last = _read(path) if path.is_file() else {}
    with ThreadPoolExecutor() as pool:
        found = dict(
            zip(
                wanted,
                pool.map(lambda name: _snapshot(wanted[name], last.get(name)), wanted),
                strict=True,
            )
        )
    for name, snapshot in found.items():
        refuse_other(f"params/{recipe}.yaml: fetch.checkpoints.{name}", wanted[name], snapshot)
    changed = [name for name in found if found[name] != last.get(name)]
    if changed or set(last) != set(found):
        storage.write_json(path, _SNAPSHOTS.dump_python(found, mode="json", exclude_defaults=True))
    print(f"resolved {len(found)} sources: {', '.join(changed) or 'none'} changed")


def resolved(recipe: str) -> dict[str, Snapshot]:
    """What the last `resolve` wrote, if it fits the recipe as it is now."""
    path = _path(recipe)
    wanted = params.load(recipe, "fetch", FetchParams).checkpoints
    found = _read(path) if path.is_file() else {}
    if {name: snapshot.source for name, snapshot in found.items()} != {
        name: checkpoint.source for name, checkpoint in wanted.items()
    }:
        raise ParamsError(
            f"{path} does not fit params/{recipe}.yaml: run python -m tasks.resolve {recipe} first"
        )
    return found


def refuse_other(where: str, wanted: CheckpointParams, snapshot: Snapshot) -> None:
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
                f"{where}.sha256: {wanted.source} has no {name}: {params.nearest(name, list(files))}"
            )
        if files[name].sha256 not in (None, expected):
            raise SourceError(
                f"{where}: {name} has another hash: expected {expected}, found {files[name].sha256}"
            )


def _snapshot(wanted: CheckpointParams, last: Snapshot | None) -> Snapshot:
    # A commit cannot change: a recipe that names one needs no network once it was resolved.
    if last and last.source == wanted.source and sources.is_pinned(wanted.source):
        return last
    return sources.resolve(wanted.source)


def _path(recipe: str) -> Path:
    return Path("models") / recipe / "sources.json"


def _read(path: Path) -> dict[str, Snapshot]:
    return _SNAPSHOTS.validate_json(path.read_bytes())


if __name__ == "__main__":
    run_stage(resolve, __doc__)
