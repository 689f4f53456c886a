"""Sources of checkpoints, resolved at one moment.

A source is one line of a recipe. Resolving it gives a snapshot: the files and an immutable revision
(a hub's commit, a bucket's versions or ETags, a registry's version number, a folder's digest), so
that what is fetched later is what was resolved, or an error.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from pydantic import ValidationError

from tasks.sources.bucket import Bucket
from tasks.sources.place import place
from tasks.sources.registry import Registry
from tasks.sources.source import MANIFEST, RemoteFile, Snapshot, SourceError
from tasks.sources.transfer import File

TEXTS = (".json", ".txt", ".md", ".model", ".jinja", ".tiktoken")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
STANDARD = {
    CONFIG: re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"),
    ADAPTER: re.compile(r"adapter_model\.safetensors"),
}
"""The names of weights beside a config."""
MODULES, MODULE = "modules.json", re.compile(r"\d+_\w+/model\.safetensors")
"""What a sentence encoder's modules are listed in, and the weights of one: `2_Dense/...`."""
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def resolve(source: str, *, adapter: bool = False) -> Snapshot:
    """Ask a source what it is now: a checkpoint, or an adapter.

    Raises SourceError where it does not exist, may not be read, or is no checkpoint in safetensors;
    UnreachableError where nothing answers.
    """
    try:
        revision, files = place(source).resolve()
    except ValidationError as error:
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise SourceError(f"{source}: {reasons}") from error
    if not files:
        raise SourceError(f"{source}: nothing is there")
    kept, left_out = _choose(source, files, ADAPTER if adapter else CONFIG)
    return Snapshot(
        source=source,
        revision=revision,
        files=tuple(sorted(kept, key=lambda file: file.path)),
        left_out=tuple(sorted(left_out)),
    )


def files_to_bring(snapshot: Snapshot) -> list[File]:
    """The snapshot's files for `tasks.sources.transfer.bring`."""
    origin = place(snapshot.source)

    def reader(file: RemoteFile) -> Callable[[int, int], Iterable[bytes]]:
        return lambda start, stop: origin.read(snapshot, file, start, stop)

    in_ranges = not isinstance(origin, Registry)
    return [File(file.path, file.size, reader(file), in_ranges) for file in snapshot.files]


def pinned(snapshot: Snapshot) -> Snapshot:
    """The snapshot with a pin for every file, so that ranges of it are of one state."""
    origin = place(snapshot.source)
    if not isinstance(origin, Bucket):  # a commit and a version are pins
        return snapshot
    return snapshot.model_copy(update={"files": tuple(map(origin.pinned, snapshot.files))})


def _choose(
    source: str, files: Iterable[RemoteFile], config: str
) -> tuple[list[RemoteFile], list[str]]:
    """The files that a checkpoint in safetensors is made of, and the names of the others."""
    by_name = {file.path: file for file in files}
    weights = {name for name in by_name if name.endswith(".safetensors")}
    if not weights:
        pickles = sorted(name for name in by_name if name.endswith(PICKLES))
        others = f"only {pickles}: a pickle can run code and is refused" if pickles else "none"
        raise SourceError(
            f"{source}: a checkpoint needs *.safetensors, found {others}; "
            "save it with save_pretrained(..., safe_serialization=True)"
        )
    if config not in by_name:
        what = "a checkpoint" if config == CONFIG else "an adapter"
        hint = "; it is an adapter's: write {adapter: SOURCE, base: NAME}"
        raise SourceError(
            f"{source}: {config} is missing: this is not {what}'s folder"
            + (hint if ADAPTER in by_name else "")
        )
    standard = STANDARD[config]
    named = {name for name in weights if standard.fullmatch(name)}
    if config == CONFIG and MODULES in by_name:
        named |= {name for name in weights if MODULE.fullmatch(name)}
    kept = (named or weights) | {name for name in by_name if _is_text(name)}
    return [by_name[name] for name in kept], [name for name in by_name if name not in kept]


def _is_text(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    # The source's own manifest gives way to ours.
    if hidden or name == MANIFEST:
        return False
    return name.endswith(TEXTS) or PurePosixPath(name).suffix == ""  # LICENSE, NOTICE
