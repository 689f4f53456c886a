"""Files of a folder, read with their claims checked: kind, place, encoding, JSON, keys.

A message names the file and the key, what was expected and what stands there.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alloy.errors import CheckpointError

_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")
_MAX_JSON_BYTES = 256 << 20  # no tokenizer is that large


def source_file(folder: Path, name: str) -> Path | None:
    """A file of a checkpoint's folder, or None where there is none.

    Raises:
        CheckpointError: a folder, a pipe or a device of that name; a link to nowhere, or to a file
            outside the folder that is neither in the same repository of the hub's cache nor in a
            cache of DVC.
    """
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to nowhere ({path.readlink()}); fetch it again")
        return None
    require_regular(path)
    target, home = path.resolve(), folder.resolve()
    if not (target.is_relative_to(home) or _is_hub_blob(target, home) or _is_dvc_object(target)):
        raise CheckpointError(
            f"{path}: a link that leaves its folder, to {target}; copy the file here if it belongs "
            "to the checkpoint"
        )
    return path


def require_regular(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise CheckpointError(f"{path}: {what}, where a file is due; remove it or fetch it again")


def _is_hub_blob(target: Path, snapshot: Path) -> bool:
    """True of a link as the hub's cache has them: `snapshots/<commit>/` points into `blobs/`."""
    return snapshot.parent.name == "snapshots" and target.parent == snapshot.parent.parent / "blobs"


def _is_dvc_object(target: Path) -> bool:
    """True of an object in a cache of DVC, to which `cache.type symlink` links: it has no name."""
    return _DVC_OBJECT.search(target.as_posix()) is not None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: not UTF-8, not JSON, a key given twice, a value that is no number, nested
            beyond reason, or no object.
    """
    require_regular(path)
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes are no {path.name}; fetch it again")
    return parse_object(path.read_bytes(), str(path))


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        CheckpointError: no file, or not UTF-8.
    """
    require_regular(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text in UTF-8 ({error.reason})") from error


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that bytes hold; `where` names them in messages."""
    return parse_json(content, where, dict)


def parse_json(content: bytes, where: str, kind: type) -> Any:
    """The JSON value of this kind, an object or a list, that bytes hold."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{where}: corrupt ({what}); fetch it again") from error
    if not isinstance(value, kind):
        due = "object" if kind is dict else "list"
        raise CheckpointError(
            f"{where}: corrupt (a JSON {due} is due, this is {shown(value)}); fetch it again"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return result


def _no_number(text: str) -> float:
    if text in ("Infinity", "-Infinity"):  # Python's json writes them, and configs have them
        return float(text.replace("Infinity", "inf"))
    raise ValueError(f"{text} is no number")


_KINDS = {
    "text": str,
    "true or false": bool,
    "a whole number": int,
    "an object": dict,
    "a list": list,
}


def typed(data: Mapping[str, Any], key: str, kind: str, where: Path) -> Any:
    """A key's value if it is of this kind, None if the key is missing or null.

    Args:
        kind: a key of `_KINDS`, for the message too.

    Raises:
        CheckpointError: a value of another kind, with the file, the key and the value.
    """
    value = data.get(key)
    if value is None:
        return None
    right = type(value) is _KINDS[kind]
    if not right:
        raise CheckpointError(f"{where}: {key} is {shown(value)}; it must be {kind}")
    return value


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def few(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
