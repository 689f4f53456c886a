"""Places of a command's sources: this disk, or wherever the pipeline's fetch brings them from.

The library transports nothing. In a checkout `tasks.recipe.cli` registers the fetch stage's own
code, which brings `hf://`, `s3://` and `mlflow:` sources into a cache, verified, or has a merge
read them by ranges, without a copy.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alloy.errors import MergeError

Bring = Callable[[str, str | None], Path]
"""Gives the folder of a source; of an adapter, given the base that it goes on."""
Stream = Callable[[str], Path]
"""Gives a folder that stands for a source, whose weights are read by ranges."""

_REMOTE = re.compile(r"(hf|s3)://|mlflow:")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w.-]+)?")
_bring: Bring | None = None
_stream: Stream | None = None


def bring_by(bring: Bring, stream: Stream) -> None:
    """Bring sources of other places by these functions: whole, or by the ranges that are read."""
    global _bring, _stream
    _bring, _stream = bring, stream


def is_remote(source: str) -> bool:
    """True for a source that is brought from another place."""
    return _REMOTE.match(source) is not None


def local(source: str, on: str | None = None, *, by_ranges: bool = False) -> Path:
    """The folder of a source, which is brought here where it lies elsewhere.

    Args:
        source: a path, `hf://org/name@revision`, `s3://bucket/prefix` or
            `mlflow:models/NAME@alias`.
        on: the base of an adapter.
        by_ranges: the folder may stand for weights that are brought when they are read.

    Raises:
        MergeError: another place, and no fetch to bring it; CheckpointError: it cannot be brought.
    """
    if not is_remote(source):
        return Path(source)
    if _bring is None or _stream is None:
        raise MergeError(
            f"{source}: this installation of alloy brings nothing from other places; a checkout of "
            "the project does, or download it first (`hf download`, `aws s3 sync`)"
        )
    return _stream(source) if by_ranges else _bring(source, on)


def on_hub(name: str) -> str:
    """A model as mergekit names it: `org/name` is one of a hub where there is no such folder."""
    if Path(name).exists() or _HUB_NAME.fullmatch(name) is None:
        return name
    return f"hf://{name}"


def placed(source: str, *, by_ranges: bool = False) -> str:
    """A source with all of its parts here: `base+adapter` has two.

    Args:
        by_ranges: of a checkpoint, or a base, as in `local`.
    """
    if not _REMOTE.search(source):
        _refuse_misnamed(source)
        return source
    base, plus, adapter = _parts(source)
    if not plus:
        return str(local(source, by_ranges=by_ranges))
    return f"{local(base, by_ranges=by_ranges)}+{local(adapter, base)}"


def placed_adapters(
    sources: Mapping[str, str] | Sequence[str], base: str | None
) -> dict[str, str] | list[str]:
    """The folders of adapters, brought here where they lie elsewhere; the base may be unnamed."""

    def here(source: str) -> str:
        if is_remote(source):
            return str(local(source, base or ""))
        _refuse_misnamed(source)
        return source

    if isinstance(sources, Mapping):
        return {name: here(source) for name, source in sources.items()}
    return [here(source) for source in sources]


def _refuse_misnamed(source: str) -> None:
    """Refuse what is not here and reads as the name of another place, written in another way."""
    if "://" in source and not Path(source).exists():
        raise MergeError(
            f"{source}: write hf://org/name@revision, s3://bucket/prefix, "
            "mlflow:models/NAME@alias or a path"
        )
    if on_hub(source) != source:
        raise MergeError(
            f"{source}: no such folder or file; if it is a name of the hub, write {on_hub(source)}"
        )


def _parts(source: str) -> tuple[str, str, str]:
    """A base and an adapter; a plus that is no end of a part's name belongs to it."""
    match = re.match(r"(.+?)\+((?:(?:hf|s3)://|mlflow:|[./]).*|[^+]+)$", source)
    return (match[1], "+", match[2]) if match else (source, "", "")


def named(sources: Sequence[str] | Mapping[str, str]) -> dict[str, str] | list[str]:
    """Sources by name: those that were named, or where any is brought the last words of each."""
    if isinstance(sources, Mapping):
        return dict(sources)
    if not any(_REMOTE.search(source) for source in sources):
        return list(sources)
    result: dict[str, str] = {}
    for source in sources:
        word = re.split(r"@|(?<=\w)/(?=\d+$)", source.rstrip("/"))[0].rpartition("/")[2] or source
        same = sum(name == word or name.startswith(f"{word}#") for name in result)
        result[f"{word}#{same + 1}" if same else word] = source
    return result
