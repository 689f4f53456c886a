"""An adapter's folder as PEFT saves it, whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alloy.adapters.threads import Later, one_thread_each
from alloy.checkpoint.adapter.opened import PREFIX, WEIGHTS
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.places import INCOMPLETE, check_output
from alloy.checkpoint.engine.writing import start_flush
from alloy.checkpoint.format import ADAPTER, Checkpoint, encode_header
from alloy.checkpoint.hash import origin_of
from alloy.checkpoint.reading import few
from alloy.checkpoint.tensors import TORCH_DTYPES
from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_FLUSH_BYTES = 16 << 20
"""What the kernel is told to bring to the disk at a time."""
_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


@dataclass
class NewAdapter:
    """The contents of an adapter, gathered module by module."""

    factors: dict[str, tuple[Tensor | Later, Tensor | Later]] = field(default_factory=dict)
    """By module B [out, rank] and A [rank, in]; the scaling is 1."""
    embeddings: set[str] = field(default_factory=set)
    """The modules among them that are embeddings: B [width, rank], A [rank, rows]."""
    saved: dict[str, Tensor] = field(default_factory=dict)
    """By name the tensors that take the base's place."""
    fan_in_fan_out: bool = False

    @property
    def tensors(self) -> dict[str, Tensor | Later]:
        """Every tensor under the name that PEFT gives it."""
        result: dict[str, Tensor | Later] = {}
        for name, value in self.saved.items():
            module, _, parameter = name.rpartition(".")
            inner = ".base_layer" if module in self.factors else ""  # beside a LoRA: its bias
            result[f"{PREFIX}{module}{inner}.{parameter}"] = value
        for module, (left, right) in self.factors.items():
            if module in self.embeddings:
                pair = {"lora_embedding_A": right, "lora_embedding_B": left}
            else:
                pair = {"lora_A.weight": right, "lora_B.weight": left}
            for part, value in pair.items():
                result[f"{PREFIX}{module}.{part}"] = value
        return result

    def config(self, base: str | None, revision: str | None, task: str | None) -> dict[str, Any]:
        """`adapter_config.json`: alpha is the rank everywhere, so that nothing is scaled."""
        ranks = {module: right.shape[0] for module, (_, right) in self.factors.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
        pattern = {f"^{module}": r for module, r in ranks.items() if r != rank}
        owners = {name.rpartition(".")[0] for name in self.saved}
        biases = {n.rpartition(".")[0] for n in self.saved if n.endswith(".bias")}
        return {
            "peft_type": "LORA",
            "task_type": task,
            "base_model_name_or_path": base,
            "revision": revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(ranks),
            "modules_to_save": sorted(owners - ranks.keys()) or None,
            "bias": "all" if biases & ranks.keys() else "none",
            "fan_in_fan_out": self.fan_in_fan_out,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
        }


def refuse_output(output: Path, sources: Mapping[str, Path]) -> None:
    """Refuse an output that stands, or lies in a source.

    Raises:
        MergeError: with what stands there.
    """
    findings = Findings()
    check_output(findings, sources, output)
    findings.stop()


def write_adapter(adapter: NewAdapter, output: Path, config: Mapping[str, Any], card: str) -> int:
    """Write the folder; its bytes of weights.

    Raises:
        CheckpointError: an unfinished folder that is not ours.
    """
    unfinished = output.with_name(output.name + INCOMPLETE)
    ours = (ADAPTER, WEIGHTS, "README.md")
    if unfinished.exists() or unfinished.is_symlink():
        others = (
            sorted(p.name for p in unfinished.iterdir() if p.name not in ours)
            if unfinished.is_dir() and not unfinished.is_symlink()
            else [unfinished.name]
        )
        if others:
            raise CheckpointError(
                f"{unfinished}: {few(others)} is not ours; move or remove it, or choose another "
                "output"
            )
    unfinished.mkdir(parents=True, exist_ok=True)
    tensors = adapter.tensors
    _write_tensors(tensors, unfinished / WEIGHTS)
    (unfinished / ADAPTER).write_text(json.dumps(config, indent=2) + "\n")
    (unfinished / "README.md").write_text(card)
    for name in ours:
        _sync(unfinished / name)
    unfinished.replace(output)
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_tensors(tensors: Mapping[str, Tensor | Later], path: Path) -> None:
    """Write a file of safetensors, each tensor to its place by the thread that makes it."""
    import torch

    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = encode_header((n, _dtype_name(tensors[n]), tuple(tensors[n].shape)) for n in names)
    starts = accumulate((tensors[name].nbytes for name in names[:-1]), initial=len(header))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(name: str, start: int) -> None:
        value = tensors[name]
        for piece in value.make() if isinstance(value, Later) else [value]:
            data = memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy())
            start += _put(descriptor, data, start)

    try:
        _put(descriptor, memoryview(header), 0)
        with one_thread_each() as pool:
            list(pool.map(write, names, starts))
    finally:
        os.close(descriptor)


def _put(descriptor: int, data: memoryview, start: int) -> int:
    """Write all of it, and let the kernel begin to bring it to the disk; its bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)
    for block in range(start // _FLUSH_BYTES, (start + done) // _FLUSH_BYTES):
        start_flush(descriptor, block * _FLUSH_BYTES, _FLUSH_BYTES)
    return done


def _dtype_name(tensor: Tensor | Later) -> str:
    return next(k for k, v in TORCH_DTYPES.items() if f"torch.{v}" == str(tensor.dtype))


def identity_of(base: Checkpoint) -> tuple[str, str | None]:
    """`base_model_name_or_path` and revision of a base: the hub's where it is from there."""
    origin = origin_of(base.path, base.files, trust_manifest=False)
    if origin.source.startswith("hf://"):
        return origin.source.removeprefix("hf://"), origin.revision
    return str(base.path), None


def task_of(base: Checkpoint) -> str | None:
    """PEFT's `task_type` where the architecture tells it."""
    names: Sequence[str] = (base.config or {}).get("architectures") or ()
    return next(
        (task for name in names for end, task in _TASKS.items() if name.endswith(end)), None
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
