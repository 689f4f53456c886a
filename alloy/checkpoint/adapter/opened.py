"""An adapter on disk, its headers read: which weight each of its tensors changes, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alloy.checkpoint.adapter.config import MERGE_AND_UNLOAD, AdapterConfig, read_config
from alloy.checkpoint.adapter.fold import Fold
from alloy.checkpoint.format import MERGEABLE, Entry, read_header
from alloy.checkpoint.reading import few, source_file
from alloy.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of every tensor that PEFT saves of a model."""
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(\.weight)?)"
)
_BASE_LAYER = ".base_layer."


@dataclass(frozen=True)
class Adapter:
    """An adapter whose headers were read and checked; no tensor was touched."""

    path: Path
    config: AdapterConfig
    entries: tuple[Entry, ...]
    folds: Mapping[str, Fold]
    """By name of the weight, as the model has it that the adapter was trained on."""


def open_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter's config and headers.

    Raises:
        CheckpointError: no adapter as PEFT saves it, or one that cannot be folded exactly.
    """
    folder = Path(folder)
    config = read_config(folder)
    file = source_file(folder, WEIGHTS)
    if file is None:
        pickles = [p.name for p in folder.iterdir() if p.suffix == ".bin"]
        raise CheckpointError(
            f"{folder}: no {WEIGHTS}"
            + (
                f", only {few(pickles)}; load it with peft and call save_pretrained "
                "(Alloy executes no pickle)"
                if pickles
                else "; fetch it again"
            )
        )
    entries = read_header(file)
    if not entries:
        raise CheckpointError(f"{file}: it holds no tensor; save the adapter again")
    return Adapter(folder, config, tuple(entries), _folds(entries, config, file))


def _folds(entries: list[Entry], config: AdapterConfig, file: Path) -> dict[str, Fold]:
    """Every tensor of the file has its place in a fold."""
    onto: dict[str, Entry] = {}
    parts: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        if not entry.name.startswith(PREFIX):
            raise CheckpointError(
                f"{file}: {entry.name!r} is not named as PEFT names the tensors of an adapter, "
                f"{PREFIX}...; save it with peft's save_pretrained"
            )
        if entry.dtype not in MERGEABLE:
            raise CheckpointError(
                f"{file}: {entry.name!r} is {entry.dtype}; an adapter's tensors are one of "
                f"{list(MERGEABLE)}; {MERGE_AND_UNLOAD}"
            )
        name = entry.name.removeprefix(PREFIX)
        match = _PART.fullmatch(name)
        if match is None:
            onto[name.replace(_BASE_LAYER, ".")] = entry
        else:
            part = match["part"].removesuffix(".weight").replace("_embedding", "")
            kind = {"embedding": entry} if "embedding" in match["part"] else {}
            parts.setdefault(match["module"], {}).update({part: entry, **kind})
    folds = {name: Fold(onto=entry) for name, entry in onto.items()}
    for module, of_module in parts.items():
        weight, bias = f"{module}.weight", f"{module}.bias"
        folds[weight] = _low_rank(module, of_module, onto.get(weight), config, file)
        if "lora_B.bias" in of_module:
            folds[bias] = Fold(
                onto=onto.get(bias),
                left=of_module["lora_B.bias"],
                scaling=config.scaling(module),
            )
    return folds


def _low_rank(
    module: str, parts: Mapping[str, Entry], onto: Entry | None, config: AdapterConfig, file: Path
) -> Fold:
    """B and A of one module, of the rank that the config says."""
    left, right = parts.get("lora_B"), parts.get("lora_A")
    if left is None or right is None:
        raise CheckpointError(
            f"{file}: {module} has {few(sorted(parts))} alone; a LoRA has lora_A and lora_B: fetch "
            "it again"
        )
    rank = config.rank_of(module)
    shapes: Any = left.shape, right.shape
    if any(len(shape) < 2 for shape in shapes) or not left.shape[1] == right.shape[0] == rank:
        raise CheckpointError(
            f"{file}: {module} has lora_B {list(left.shape)} and lora_A {list(right.shape)}; by "
            f"{config.path.name} both have the rank {rank}"
            + ("; grouped convolutions cannot be folded" if len(left.shape) > 2 else "")
        )
    magnitude = parts.get("lora_magnitude_vector")
    if config.use_dora != (magnitude is not None):
        raise CheckpointError(
            f"{file}: {module} has {'a' if magnitude else 'no'} lora_magnitude_vector, and "
            f"use_dora is {config.use_dora} in {config.path.name}; fetch it again"
        )
    if magnitude is not None and magnitude.num_elements != left.shape[0]:
        raise CheckpointError(
            f"{file}: lora_magnitude_vector of {module} is {list(magnitude.shape)}; "
            f"{left.shape[0]} are due"
        )
    return Fold(
        onto=onto,
        left=left,
        right=right,
        scaling=config.scaling(module),
        magnitude=magnitude,
        turned="embedding" in parts,
    )
