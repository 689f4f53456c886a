"""An adapter's folder as PEFT saves it, whole or not at all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from alloy.adapters.threads import one_thread_each
from alloy.checkpoint.adapter.opened import PREFIX, WEIGHTS
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.places import INCOMPLETE, check_output
from alloy.checkpoint.format import ADAPTER, Checkpoint, encode_header
from alloy.checkpoint.hash import origin_of
from alloy.checkpoint.reading import few
from alloy.checkpoint.tensors import TORCH_DTYPES
from alloy.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, dtype

_MOST_PIECES = 1024
"""That one call writes (IOV_MAX)."""
_to_disk = getattr(os, "fdatasync", os.fsync)  # macOS lacks the cheaper one
_TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}


class Made(NamedTuple):
    """A tensor of the file, ready to be written."""

    name: str
    shape: tuple[int, ...]
    pieces: Sequence[Tensor]
    """Its values, which follow each other."""


@dataclass(frozen=True)
class Group:
    """Tensors of one dtype that a thread makes and writes together."""

    bounds: Mapping[str, tuple[int, ...]]
    """By name in the file's order the greatest shape that each may have."""
    dtype: dtype
    make: Callable[[], Sequence[Made]]
    """The tensors in that order; their memory is valid until the thread makes the next group."""

    @property
    def size(self) -> int:
        """Numbers in them, at most."""
        return sum(map(prod, self.bounds.values()))


def group_of(name: str, tensor: Tensor) -> Group:
    """A tensor that is there already."""
    shape = tuple(tensor.shape)
    return Group({name: shape}, tensor.dtype, lambda: [Made(name, shape, [tensor])])


def names_of_factors(module: str, *, embedding: bool) -> tuple[str, str]:
    """PEFT's names of B and A: [out, rank] and [rank, in], of an embedding's [width, rows]."""
    parts = "lora_embedding_{}" if embedding else "lora_{}.weight"
    return f"{PREFIX}{module}.{parts.format('B')}", f"{PREFIX}{module}.{parts.format('A')}"


def name_of_whole(name: str, modules: Collection[str]) -> str:
    """PEFT's name of a tensor that takes the base's place, in or beside these LoRA's modules."""
    module, _, parameter = name.rpartition(".")
    inner = ".base_layer" if module in modules else ""  # beside a LoRA: its bias
    return f"{PREFIX}{module}{inner}.{parameter}"


def config_of(
    ranks: Mapping[str, int],
    saved: Iterable[str],
    *,
    base: str | None,
    revision: str | None,
    task: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """`adapter_config.json`: alpha is the rank everywhere, so that nothing is scaled.

    Args:
        ranks: by module.
        saved: names of the tensors that take the base's place.
    """
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    pattern = {f"^{module}": r for module, r in ranks.items() if r != rank}
    owners = {name.rpartition(".")[0] for name in saved}
    biases = {name.rpartition(".")[0] for name in saved if name.endswith(".bias")}
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
        "fan_in_fan_out": fan_in_fan_out,
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


def write_adapter(
    groups: Iterable[Group],
    output: Path,
    config: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Any]],
    card: str,
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Write the folder, whole or not at all; its tensors' shapes by name, and their bytes.

    Args:
        config: makes `adapter_config.json` of the tensors' shapes by name.

    Raises:
        CheckpointError: an unfinished folder that is not ours.
    """
    unfinished = output.with_name(output.name + INCOMPLETE)
    ours = (WEIGHTS, ADAPTER, "README.md")
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
    made = [place for place in (unfinished, *unfinished.parents) if not place.exists()]
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        shapes, num_bytes = _write_tensors(groups, unfinished / WEIGHTS)
        (unfinished / ADAPTER).write_text(json.dumps(config(shapes), indent=2) + "\n")
        (unfinished / "README.md").write_text(card)
        with ThreadPoolExecutor(len(ours)) as pool:  # together: one commit of the journal
            list(pool.map(_sync, (unfinished / name for name in ours)))
        unfinished.replace(output)
    except BaseException:
        for name in ours:
            (unfinished / name).unlink(missing_ok=True)
        with suppress(OSError):  # others put something there
            for place in made:
                place.rmdir()
        raise
    return shapes, num_bytes


def _write_tensors(groups: Iterable[Group], path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Write a file of safetensors, each group by the thread that makes it; shapes and bytes.

    A group begins where the one before it ends, wide dtypes first, so that tensors are aligned, and
    of one dtype the largest first, so that threads end together and little is left to bring to the
    disk. Room for the header is left as if all shapes were the greatest.
    """
    groups = sorted(groups, key=lambda g: (-g.dtype.itemsize, -g.size))
    room = len(_header((n, g.dtype, shape) for g in groups for n, shape in g.bounds.items()))
    starts: list[Future[int]] = [Future() for _ in range(len(groups) + 1)]
    starts[0].set_result(room)

    def write(group: Group, start: Future[int], end: Future[int]) -> list[tuple]:
        try:
            made = group.make()
            pieces = [_bytes_of(piece) for tensor in made for piece in tensor.pieces]
            place = start.result()
            end.set_result(place + sum(map(len, pieces)))
        except BaseException as error:
            end.set_exception(error)  # whoever waits for it must not wait forever
            raise
        file.put(pieces, place)
        return [(tensor.name, group.dtype, tensor.shape) for tensor in made]

    with _File(path) as file:
        with one_thread_each() as pool:
            written = [
                tensor
                for of_group in pool.map(write, groups, starts, starts[1:])
                for tensor in of_group
            ]
        header = _header(written, room)
        file.put([memoryview(header)], 0)
    return {name: shape for name, _, shape in written}, starts[-1].result() - room


class _File:
    """A file that goes to the disk while more of it is written.

    The disk's own cache takes as long to empty as the disk to write, so the kernel's writing back
    alone would leave most of the wait to the end: a thread asks for all of it again and again.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._pool = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._syncing: Future[None] | None = None

    def __enter__(self) -> _File:
        return self

    def put(self, pieces: Sequence[memoryview], start: int) -> None:
        """Write all of these, one after the other."""
        for i in range(0, len(pieces), _MOST_PIECES):
            left = [*pieces[i : i + _MOST_PIECES]]
            while left:
                count = os.pwritev(self._descriptor, left, start)
                start += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if left:
                    left[0] = left[0][count:]
        with self._lock:
            if self._syncing is None or self._syncing.done():
                self._wait()
                self._syncing = self._pool.submit(_to_disk, self._descriptor)

    def _wait(self) -> None:
        """Raise what the last one met: the system tells it once."""
        if self._syncing is not None:
            self._syncing.result()

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)
        if kind is None:
            self._wait()


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _header(tensors: Iterable[tuple[str, dtype, tuple[int, ...]]], room: int = 0) -> bytes:
    """The header of these tensors, with spaces to this size."""
    header = encode_header((n, _dtype_name(dtype), shape) for n, dtype, shape in tensors)
    assert not room or len(header) <= room, "no shape is greater than its bound"
    padded = header[8:].ljust(room - 8)
    return len(padded).to_bytes(8, "little") + padded


def _dtype_name(dtype: dtype) -> str:
    return next(k for k, v in TORCH_DTYPES.items() if f"torch.{v}" == str(dtype))


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
