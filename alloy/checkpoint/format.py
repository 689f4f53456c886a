"""The safetensors format, read without loading a tensor: in which file each lies, and where.

A file is 8 bytes (length of the header, little-endian), the header (JSON), then the tensors' bytes
without gaps. Everything a header claims is checked against the file before anything trusts it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

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

QUANTISED = frozenset(
    ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I4", "U4")
)
"""Dtypes that hold a part of a number: codes without their scale, or a scale alone."""
DEQUANTISE = (
    "load the model with transformers, dequantise it (model.dequantize()) and call save_pretrained"
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_MAX_JSON_BYTES = 256 << 20  # no tokenizer is that large
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
ADAPTER = "adapter_config.json"
_ADAPTER_TENSOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w\d)\b")
_PACKED_TENSOR = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|weight_packed|weight_scale|weight_scale_inv"
    r"|weight_zero_point|weight_shape)$|\.quant_state\.|_proj_(blocks|scales)$"
)
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
    try:
        if path.is_dir():
            return Checkpoint(path, _entries(path), _config(path))
        if path.exists():
            return Checkpoint(path, {e.name: e for e in _refuse_parts(read_header(path))}, None)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    raise CheckpointError(
        f"{path}: no such folder or file; give a folder with config.json and safetensors "
        "(fetch models of a hub first)"
    )


def source_file(folder: Path, name: str) -> Path | None:
    """A file of a checkpoint's folder, or None where there is none.

    Raises:
        CheckpointError: a folder, a pipe or a device of that name; a link to nowhere, or to a file
            outside the folder that is not in the same repository of the hub's cache.
    """
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link to nowhere ({path.readlink()}); fetch it again")
        return None
    _require_regular(path)
    target, home = path.resolve(), folder.resolve()
    if not target.is_relative_to(home) and not _is_hub_blob(target, home):
        raise CheckpointError(
            f"{path}: a link that leaves its folder, to {target}; copy the file here if it belongs "
            "to the checkpoint"
        )
    return path


def _require_regular(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise CheckpointError(f"{path}: {what}, where a file is due; remove it or fetch it again")


def _is_hub_blob(target: Path, snapshot: Path) -> bool:
    """Whether a link follows the hub's cache: `snapshots/<commit>/` points into `blobs/` beside."""
    return snapshot.parent.name == "snapshots" and target.parent == snapshot.parent.parent / "blobs"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: not UTF-8, not JSON, a key given twice, a value that is no number, nested
            beyond reason, or no object.
    """
    _require_regular(path)
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes are no {path.name}; fetch it again")
    return parse_object(path.read_bytes(), str(path))


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        CheckpointError: no file, or not UTF-8.
    """
    _require_regular(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text in UTF-8 ({error.reason})") from error


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object that bytes hold; `where` names them in messages."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{where}: corrupt ({what}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: corrupt (a JSON object is due, this is {_shown(value)}); fetch it again"
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
        raise CheckpointError(f"{where}: {key} is {_shown(value)}; it must be {kind}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_header(path: Path) -> list[Entry]:
    """The tensors of one safetensors file, ordered by offset.

    Raises:
        CheckpointError: the file is truncated or corrupt, with what was expected and found.
    """
    _require_regular(path)
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
    fields = parse_object(header, f"{path}: header")
    fields.pop("__metadata__", None)
    spans = [_span(name, value, path) for name, value in fields.items()]
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


def _span(name: str, value: Any, path: Path) -> tuple[str, str, tuple[int, ...], int, int]:
    """Read a header's entry: name, dtype, shape, first byte and the one after the last."""
    where = f"{path}: corrupt header: {name!r}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {_shown(value)}, no object; fetch it again")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if isinstance(dtype, str) and dtype in QUANTISED:
        raise CheckpointError(
            f"{path}: {name!r} is {dtype}, a quantised type that cannot be merged; {DEQUANTISE}"
        )
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where} has dtype {_shown(dtype)}; known are {sorted(ITEM_BYTES)}; fetch it again"
        )
    for what, sizes in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(sizes, list) or not all(_is_size(n) for n in sizes):
            raise CheckpointError(
                f"{where} has {what} {_shown(sizes)}, no list of whole numbers from 0 on; fetch it "
                "again"
            )
    if len(offsets) != 2:
        raise CheckpointError(f"{where} has {len(offsets)} data_offsets, not 2; fetch it again")
    return name, dtype, tuple(shape), *offsets


def _is_size(number: object) -> bool:
    return type(number) is int and 0 <= number < 1 << 63


def _entries(folder: Path) -> dict[str, Entry]:
    files, index = _weight_files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in _refuse_parts(read_header(file)):
            if entry.name in entries:
                raise CheckpointError(
                    f"{folder}: {entry.name!r} is stored in {entries[entry.name].file.name} and in "
                    f"{file.name}; remove the file that does not belong"
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


def _refuse_parts(entries: list[Entry]) -> list[Entry]:
    """The entries, unless they are parts of weights that must not be averaged apart.

    Those are an adapter's low-rank factors, and the codes and scales of packed quantised weights.
    """
    packed = [e.name for e in entries if _PACKED_TENSOR.search(e.name)]
    if packed:
        raise CheckpointError(
            f"{entries[0].file}: {few(packed, 2)} hold codes and scales of quantised weights, "
            f"which cannot be merged apart; {DEQUANTISE}"
        )
    factors = [e.name for e in entries if _ADAPTER_TENSOR.search(e.name)]
    if factors:
        raise CheckpointError(
            f"{entries[0].file}: an adapter ({few(factors, 2)}), no whole weights; load it on its "
            "base with peft, call merge_and_unload and save the result"
        )
    return entries


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index if there is one."""
    if source_file(folder, ADAPTER) is not None:
        raise CheckpointError(
            f"{folder}: {ADAPTER} makes it an adapter, which loaders put on the weights; load it "
            "on its base with peft, call merge_and_unload and save the result"
        )
    single = source_file(folder, SINGLE)
    shards = [p.name for p in sorted(folder.iterdir()) if _SHARD.fullmatch(p.name)]
    if source_file(folder, INDEX) is not None:
        index = _index(folder / INDEX)
        if single is not None and SINGLE not in index.values():
            raise CheckpointError(
                f"{folder}: {SINGLE} stands beside {INDEX}, which does not name it: loaders take "
                "one or the other; remove what does not belong"
            )
        names = sorted(set(index.values()), key=natural_order)
        if strays := [name for name in shards if name not in names]:
            raise CheckpointError(
                f"{folder}: {INDEX} does not name {few(strays)}; remove what does not belong"
            )
        return [_named_by_index(folder, name) for name in names], index
    if single is not None:
        if shards:
            raise CheckpointError(
                f"{folder}: {few(shards)} beside {SINGLE}, without {INDEX}: loaders take one or "
                "the other; remove what does not belong"
            )
        return [single], None
    weights = sorted(p.name for p in folder.iterdir() if p.name.endswith(".safetensors"))
    files = [file for name in weights if (file := source_file(folder, name)) is not None]
    if len(files) == 1:
        return files, None
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no {INDEX}; add the index, or name one "
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


def _index(path: Path) -> dict[str, str]:
    """The file of every tensor, as an index says."""
    index = typed(read_json(path), "weight_map", "an object", path)
    if not index:
        raise CheckpointError(f"{path}: weight_map names no tensor; fetch it again")
    for name in index:
        file = typed(index, name, "text", path)
        if not file or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{path}: {file!r} leaves the folder; fetch it again")
    return index


def _named_by_index(folder: Path, name: str) -> Path:
    file = source_file(folder, name)
    if file is None:
        raise CheckpointError(
            f"{folder / name}: missing, {INDEX} names it; fetch the checkpoint again"
        )
    return file


def _config(folder: Path) -> dict[str, Any] | None:
    """The config, its keys that a merge reads checked."""
    path = source_file(folder, "config.json")
    if path is None:
        return None
    config = read_json(path)
    parts = [config, *(typed(config, k, "an object", path) or {} for k in _PARTS)]
    for part in parts:
        for key, kind in _CONFIG_KEYS.items():
            typed(part, key, kind, path)
    for name in config.get("architectures") or ():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: architectures holds {_shown(name)}; it must be text")
    if config.get("quantization_config") or config.get("compression_config"):
        raise CheckpointError(
            f"{path}: quantization_config says that the weights are quantised, which cannot be "
            f"merged; {DEQUANTISE}"
        )
    return config


_PARTS = ("text_config", "vision_config", "audio_config")
_CONFIG_KEYS = {
    "architectures": "a list",
    "auto_map": "an object",
    "model_type": "text",
    "tie_word_embeddings": "true or false",
    "vocab_size": "a whole number",
}


def few(names: Sequence[str], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
