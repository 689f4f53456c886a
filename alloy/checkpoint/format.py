"""The safetensors format, read without loading a tensor: in which file each lies, and where.

A file is 8 bytes (length of the header, little-endian), the header (JSON), then the tensors' bytes
without gaps. Everything a header claims is checked against the file before anything trusts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from alloy.checkpoint.ranges.files import size_of
from alloy.checkpoint.reading import (
    few,
    parse_json,
    parse_object,
    read_json,
    require_regular,
    shown,
    source_file,
    typed,
)
from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from alloy.checkpoint.adapter.fold import Fold

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
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MODULES = "modules.json"
_WITHOUT_FILES = ".Normalize"  # a module without settings, whose empty folder git does not keep
ADAPTER = "adapter_config.json"
ON_ITS_BASE = "name it with its base, BASE+ADAPTER, two folders with a plus between them"
_ADAPTER_TENSOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w\d)\b")
_PACKED_TENSOR = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|quant_map|nested_absmax|weight_packed|weight_scale|weight_scale_inv"
    r"|weight_zero_point|weight_shape)$|\.quant_state\.|_proj_(blocks|scales)$"
)
_MASK = re.compile(r"(^|[._])(bias|mask)$")  # causal masks, as GPT-2 stores them
_NATIVE = "consolidated"  # opens the names of files as Mistral and Meta publish them
_UNREADABLE = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


class Entry(NamedTuple):
    """One stored tensor: its bytes are `file[start : start + num_bytes]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    fold: Fold | None = None
    """What an adapter changes of it; the bytes of the file are then the base's."""

    @property
    def num_elements(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, in its dtype."""
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def origin(self) -> str:
        """The file, and the adapter's, for messages."""
        parts = () if self.fold is None else self.fold.entries
        return " + ".join(dict.fromkeys(str(part.file) for part in (self, *parts)))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose headers were read and checked; no tensor was touched.

    `entries` are in file order: by file, then by offset.
    """

    path: Path
    entries: Mapping[str, Entry]
    config: Mapping | None
    """The parsed `config.json`, or None where there is none."""
    modules: tuple[str, ...] = ()
    """Folders of further modules, as sentence-transformers keeps them; `<folder>/<name>` are their
    tensors."""
    adapter: Path | None = None
    """The folder of the adapter on it; `path` is then its base."""
    notes: tuple[str, ...] = ()
    """What whoever merges it should know."""

    @property
    def files(self) -> list[Path]:
        """The files with its tensors: its own, then its adapter's."""
        entries = self.entries.values()
        own = (entry.file for entry in entries)
        folds = (entry.fold for entry in entries if entry.fold is not None)
        return list(dict.fromkeys([*own, *(part.file for fold in folds for part in fold.entries)]))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.entries.values())

    @property
    def title(self) -> str:
        """The source as a user writes it: `base`, or `base+adapter`."""
        return str(self.path) if self.adapter is None else f"{self.path}+{self.adapter}"


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and check a checkpoint's headers: a folder as of Hugging Face, or one safetensors file.

    Raises:
        CheckpointError: nothing there, no safetensors, a file that is truncated or corrupt, an
            index that names a missing file or disagrees with the files, a name stored twice.
    """
    path = Path(path)
    try:
        if path.is_dir():
            modules = sentence_modules(path)
            entries = _entries(path)
            for module in modules:
                entries |= _module_entries(path, module)
            return Checkpoint(path, entries, _config(path), modules)
        if path.exists():
            return Checkpoint(path, {e.name: e for e in _refuse_parts(read_header(path))}, None)
    except OSError as error:
        raise CheckpointError(f"{path!s:.200}: {error.strerror or error}") from error
    raise CheckpointError(
        f"{path}: no such folder or file; give a folder with config.json and safetensors "
        "(fetch models of a hub first)"
    )


def read_header(path: Path) -> list[Entry]:
    """The tensors of one safetensors file, ordered by offset.

    Raises:
        CheckpointError: the file is truncated or corrupt, with what was expected and found.
    """
    require_regular(path)
    size = size_of(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise CheckpointError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull`")
        if len(prefix) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: truncated or not safetensors: "
                f"{size} bytes, header of {length} announced; fetch it again"
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
                f"bytes, but lies at {start}:{stop} where {position} comes next; fetch it again"
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


def natural_order(name: str) -> list:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _span(name: str, value: Any, path: Path) -> tuple[str, str, tuple[int, ...], int, int]:
    """Read a header's entry: name, dtype, shape, first byte and the one after the last."""
    where = f"{path}: corrupt header: {name!r}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {shown(value)}, no object; fetch it again")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if isinstance(dtype, str) and dtype in QUANTISED:
        raise CheckpointError(
            f"{path}: {name!r} is {dtype}, a quantised type that cannot be merged; {DEQUANTISE}"
        )
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where} has dtype {shown(dtype)}; known are {sorted(ITEM_BYTES)}; fetch it again"
        )
    for what, sizes in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(sizes, list) or not all(_is_size(n) for n in sizes):
            raise CheckpointError(
                f"{where} has {what} {shown(sizes)}, no list of whole numbers from 0 on; fetch it "
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


def sentence_modules(folder: Path) -> tuple[str, ...]:
    """The folders that a sentence-transformers model has beside its transformer, in order."""
    path = source_file(folder, MODULES)
    if path is None:
        return ()
    modules = []
    for entry in parse_json(path.read_bytes(), str(path), list):
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise CheckpointError(f"{path}: {shown(entry)} is no module; each has path and type")
        name = entry["path"]
        typed(entry, "type", "text", path)
        if not name:
            continue
        if Path(name).name != name or name == ".." or "\0" in name:
            raise CheckpointError(f"{path}: {name!r} leaves the folder; fetch it again")
        if not (folder / name).exists() and str(entry.get("type")).endswith(_WITHOUT_FILES):
            continue
        if not (folder / name).is_dir() or (folder / name).is_symlink():
            raise CheckpointError(f"{folder / name}: no folder, {MODULES} names it; fetch it again")
        modules.append(name)
    return tuple(modules)


def _module_entries(folder: Path, module: str) -> dict[str, Entry]:
    """The tensors of a module, under its folder's name."""
    pickles = [p.name for p in (folder / module).iterdir() if p.suffix in _UNREADABLE]
    file = source_file(folder, f"{module}/{SINGLE}")
    if file is None:
        if pickles:
            raise CheckpointError(
                f"{folder / module}: {few(pickles)} and no {SINGLE}; load the model with "
                "sentence-transformers and save it again (Alloy executes no pickle)"
            )
        return {}
    return {
        f"{module}/{entry.name}": entry._replace(name=f"{module}/{entry.name}")
        for entry in _refuse_parts(read_header(file))
    }


def _refuse_parts(entries: list[Entry]) -> list[Entry]:
    """The entries, unless they are parts of weights that must not be averaged apart.

    Those are an adapter's low-rank factors, and the codes and scales of packed quantised weights.
    """
    packed = [e.name for e in entries if _PACKED_TENSOR.search(e.name) or _holds_codes(e)]
    if packed:
        raise CheckpointError(
            f"{entries[0].file}: {few(packed, 2)} hold codes and scales of quantised weights, "
            f"which cannot be merged apart; {DEQUANTISE}"
        )
    factors = [e.name for e in entries if _ADAPTER_TENSOR.search(e.name)]
    if factors:
        raise CheckpointError(
            f"{entries[0].file}: an adapter ({few(factors, 2)}), no whole weights; {ON_ITS_BASE}"
        )
    return entries


def _holds_codes(entry: Entry) -> bool:
    """True for matrices of 8-bit integers, which are codes of weights unless they mask something:
    their scales have other names in every library.
    """
    is_matrix = entry.dtype in ("I8", "U8") and len(entry.shape) > 1
    return is_matrix and not _MASK.search(entry.name)


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index if there is one."""
    if source_file(folder, ADAPTER) is not None:
        raise CheckpointError(
            f"{folder}: {ADAPTER} makes it an adapter, which loaders put on the weights; "
            f"{ON_ITS_BASE}"
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
    if native := [name for name in weights if name.startswith(_NATIVE)]:
        raise CheckpointError(
            f"{folder}: {few(native)}: weights under their trainer's own names, which "
            f"from_pretrained does not know; fetch {SINGLE}, too, or convert them with the script "
            "of transformers"
        )
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
            raise CheckpointError(f"{path}: architectures holds {shown(name)}; it must be text")
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
