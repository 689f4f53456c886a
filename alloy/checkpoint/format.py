"""The safetensors format, read without loading a tensor: in which file each lies, and where.

A file is 8 bytes (length of the header, little-endian), the header (JSON), then the tensors' bytes
without gaps. Everything a header claims is checked against the file before anything trusts it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from alloy.errors import CheckpointError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
MERGEABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that a merge computes with; tensors of others must agree and pass through."""

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names for the mergeable dtypes, as configs and users write them."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_UNREADABLE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


class Entry(NamedTuple):
    """One stored tensor: its bytes are `file[start : start + num_bytes]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose headers were read and checked; no tensor was touched.

    `entries` are in file order: by file, then by offset.
    """

    path: Path
    entries: Mapping[str, Entry]
    config: Mapping | None
    """The parsed `config.json`, or None where there is none."""

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint's headers: a folder as of Hugging Face, or one safetensors file.

    Raises:
        CheckpointError: nothing there, no safetensors, a file that is truncated or corrupt, an
            index that names a missing file or disagrees with the files, a name stored twice.
    """
    path = Path(path)
    if path.is_file():
        return Checkpoint(path, {e.name: e for e in read_header(path)}, None)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such folder or file; give a folder with config.json and safetensors "
            "(fetch models of a hub first)"
        )
    return Checkpoint(path, _entries(path), _config(path))


def read_header(path: Path) -> list[Entry]:
    """The tensors of one safetensors file, ordered by offset.

    Raises:
        CheckpointError: the file is truncated or corrupt, with what was expected and found.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise CheckpointError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull`")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: truncated or not safetensors: {size} bytes, header of {length} "
                "announced; "
                "fetch it again"
            )
        header = file.read(length)
    try:
        fields = json.loads(header)
        if not isinstance(fields, dict):
            raise ValueError("the header is no JSON object")
        fields.pop("__metadata__", None)
        spans = [_span(name, value) for name, value in fields.items()]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: corrupt header ({error}); fetch it again") from error

    spans.sort(key=lambda span: span[3])
    position, entries = 0, []
    for name, dtype, shape, start, stop in spans:
        entry = Entry(name, dtype, shape, path, 8 + length + start)
        if start != position or stop - start != entry.num_bytes:
            raise CheckpointError(
                f"{path}: corrupt header: {name!r} is {dtype} {list(shape)}, {entry.num_bytes} "
                "bytes, but lies "
                f"at {start}:{stop} where {position} comes next; fetch it again"
            )
        entries.append(entry)
        position = stop
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path}: "
            f"{'truncated' if size < 8 + length + position else 'bytes after the last tensor'}: "
            f"{size} bytes where its header says {8 + length + position}; fetch it again"
        )
    return entries


def encode_header(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> bytes:
    """The first bytes of a file with these tensors (name, dtype, shape), in this order."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + prod(shape) * ITEM_BYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # the format aligns the first tensor to 8 bytes
    return len(header).to_bytes(8, "little") + header


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill the buffer from a file, from any thread; CheckpointError where the file ends early."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise CheckpointError(
                f"{path}: ended at byte {offset} while it was read; it changed under us"
            )
        buffer, offset = buffer[count:], offset + count


def natural_order(name: str) -> list:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _span(name: str, value: dict) -> tuple[str, str, tuple[int, ...], int, int]:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name!r} has dtype {dtype!r}; known are {sorted(ITEM_BYTES)}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name!r} has a negative or fractional size")
    return name, dtype, shape, start, stop


def _entries(folder: Path) -> dict[str, Entry]:
    files, index = _weight_files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in entries:
                raise CheckpointError(
                    f"{folder}: {entry.name!r} is stored in {entries[entry.name].file.name} and in "
                    f"{file.name}; "
                    "remove the file that does not belong"
                )
            entries[entry.name] = entry
    if index is not None:
        wrong = [
            name
            for name in sorted(index.keys() | entries.keys())
            if name not in entries or index.get(name) != entries[name].file.name
        ]
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX} disagrees with the files about {few(wrong)}; fetch the "
                "checkpoint again"
            )
    if not entries:
        raise CheckpointError(f"{folder}: no tensor in {', '.join(f.name for f in files)}")
    return entries


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index if there is one."""
    if (folder / INDEX).exists():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(index.values()), key=natural_order)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / INDEX}: corrupt ({error!r}); fetch it again"
            ) from error
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{folder / INDEX}: {name!r} leaves the folder; fetch it again"
                )
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / name}: missing, {INDEX} names it; fetch the checkpoint again"
                )
        return [folder / name for name in names], index
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, None
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} safetensors files and no {INDEX}; add the index, or name one "
            "file"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in _UNREADABLE)
    raise CheckpointError(
        f"{folder}: no safetensors file"
        + (
            f", only {few(others)}; load the model and call save_pretrained "
            "(Alloy executes no pickle)"
            if others
            else ""
        )
    )


def _config(folder: Path) -> dict | None:
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: corrupt ({error}); fetch it again") from error


def few(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
