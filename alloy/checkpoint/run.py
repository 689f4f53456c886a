"""Merge checkpoints on disk, larger than memory, into one that loads."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alloy.checkpoint.card import model_card, origins_of, record
from alloy.checkpoint.checks.places import INCOMPLETE
from alloy.checkpoint.checks.sources import BASE
from alloy.checkpoint.checks.tensors import PlannedTensor
from alloy.checkpoint.engine.accelerator import Accelerator
from alloy.checkpoint.engine.execute import chunk_bytes_for, execute
from alloy.checkpoint.engine.steps import Shard, Step
from alloy.checkpoint.engine.underflow import Underflows
from alloy.checkpoint.engine.work import Copy, Function, Held, Tensors, merged_whole, work_for
from alloy.checkpoint.format import INDEX
from alloy.checkpoint.hash import sha256
from alloy.checkpoint.journal import (
    LOCK,
    Journal,
    locked,
    remove_ours,
    sync_folder,
    write_through,
)
from alloy.checkpoint.plan import MergePlan, plan_merge
from alloy.checkpoint.ranges.files import elsewhere
from alloy.checkpoint.reading import few
from alloy.checkpoint.request import Coefficients, MergeRequest, Paths, num_threads
from alloy.errors import CheckpointError, MergeError, system_errors

RECORD = "alloy_merge.json"
"""The result's own account of how it was made, beside its card."""


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge: what it wrote."""

    output: Path
    files: Mapping[str, str]
    """File name to SHA-256."""
    num_tensors: int
    num_bytes: int
    seconds: float
    resumed: tuple[str, ...]
    """Files that an earlier, interrupted run had finished."""
    notes: tuple[str, ...]


def merge_checkpoints(
    method: str,
    sources: Paths,
    output: str | Path,
    *,
    base: str | Path | None = None,
    coefficients: Coefficients | None = None,
    statistics: Paths | None = None,
    dtype: str | None = None,
    shard_bytes: int | str | None = None,
    tokenizer: str = "same",
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_vocabulary_to: int | None = None,
    chat_template: str | Path | None = None,
    processor: str | None = None,
    generation_config: str | None = None,
    names: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None = None,
    kept: Sequence[str] = (),
    slices: Sequence[Mapping[str, Sequence[int]]] = (),
    stack: str | None = None,
    copy: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    allow: Sequence[str] = (),
    threads: int | None = None,
    device: str | None = None,
    hash_sources: bool = False,
    command: str | None = None,
    title: str | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
    **options: Any,
) -> MergeReport:
    """Merge checkpoints into a new one, whatever their size, in bounded memory.

    Everything is checked before a tensor is read. The result takes its place when it is complete
    and on the disk; an interrupted run goes on, by file, where it stopped. Equal inputs and
    settings give equal bytes, whatever the number of threads.

    Args:
        method: a name in `alloy.merging.MERGE_METHODS`.
        sources: folders in the Hugging Face layout, single safetensors files, or "BASE+ADAPTER",
            a folder of PEFT on its base, in order or by name. The first one's names, order,
            sharding, config and tokenizer are those of the result.
        output: a folder that does not exist or is empty.
        base: the checkpoint that the sources were trained from, for methods with task vectors.
        coefficients: one per source, or by glob pattern of tensor names; the first pattern that
            matches decides.
        statistics: one safetensors file per source, for RegMean (Grams) and Fisher, as
            `alloy.checkpoint.save_statistics` writes it.
        dtype: of the result: float32, float16, bfloat16, float64; by default that of the sources.
        shard_bytes: the most that a file holds; by default as many files as the first source has.
        tokenizer: what to do where vocabularies differ: "same" refuses, "base" keeps the base's
            (else the first source's), "union" takes every token of every source. A row that a
            source lacks counts as the base's, or as the mean of those that have it.
        tokens: by token the row that stands in where a source lacks it: `{"source": NAME}` with
            another `token` of that source (text or id) if wanted, or `{"zero": True}`; with
            `"force": True` for every source.
        pad_vocabulary_to: the number of rows is a multiple of this; rows that are added are zeros.
        chat_template: where the sources' chat templates differ, the source whose template is
            taken, a file that holds one, the template itself, or "auto", the commonest.
        processor: the source whose files these are; by default the first.
        generation_config: the source whose settings these are; by default the first.
        names: changes of prefix that give a source the first one's names, where a language model is
            merged into the one of a vision-language model: `{"model.": "model.language_model."}`
            for all sources but the first, or such mappings by source. Where one smallest change
            places every tensor, it is found.
        kept: tensors that stay the first source's, by glob pattern or as a group of
            `alloy.checkpoint.checks.groups.GROUPS`: vision_tower, audio_tower, projector,
            embeddings, head, norms. Other sources may lack them, or have them in other shapes.
        slices: the layers of the result, in order: each a mapping from source to the first layer
            and the one after the last; one source's are copied, several sources' are merged.
        stack: what the names of these layers begin with, where a model has several stacks.
        copy: glob pattern of tensor names to the source whose tensors are taken as they are.
        drop: glob patterns of tensors that the result shall not have.
        allow: glob patterns of config keys (and processor files) that may differ.
        threads: workers; by default the cores this process may use.
        device: where methods that need whole tensors compute (`cuda`, `cuda:1`): decompositions,
            selections, Grams. What is merged entry by entry stays on the cores, and by default all
            does. Equal bytes are promised on one device.
        hash_sources: also record the SHA-256 of source files that the hub's cache does not name
            by it.
        command: how this was called, for the model card.
        title: of the model card; by default the output's name.
        on_bytes: called with the number of bytes just computed, from the workers.
        options: the method's settings, each a value or the values by glob pattern of tensor names;
            for a method that runs the model also what it runs, as in `alloy.merge`. Such a method
            holds the merged model in memory, the sources stay mapped files, and an interrupted run
            starts anew.

    Raises:
        MergeError, CheckpointError: anything wrong, with names and fixes, before anything is
            written; NaN or Inf in an input or in the result, and integer tensors that differ, when
            they are met.
        DeviceError: a device that is not there; DeviceMemoryError where a tensor does not fit it.
    """
    plan = plan_merge(
        MergeRequest(
            method, sources, output, base=base, coefficients=coefficients, statistics=statistics,
            dtype=dtype, shard_bytes=shard_bytes, tokenizer=tokenizer, tokens=tokens or {},
            pad_vocabulary_to=pad_vocabulary_to,
            chat_template=chat_template, processor=processor,
            generation_config=generation_config, names=names or {}, kept=kept,
            slices=slices, stack=stack, copy=copy or {}, drop=drop, allow=allow, options=options,
        )
    )  # fmt: skip
    return run_plan(
        plan,
        threads=threads,
        device=device,
        hash_sources=hash_sources,
        command=command,
        title=title,
        on_bytes=on_bytes,
    )


def run_plan(
    plan: MergePlan,
    *,
    threads: int | None = None,
    device: str | None = None,
    hash_sources: bool = False,
    trust_manifests: bool = False,
    command: str | None = None,
    title: str | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
    chunk_bytes: int | None = None,
    compiled: bool = True,
) -> MergeReport:
    """Carry out a plan.

    The other arguments are those of `merge_checkpoints`.

    Args:
        trust_manifests: the `manifest.json` beside a source was written by the caller's own fetch,
            which verified the files: its source, revision and hashes go into the record.
        compiled: whether compiled loops are used; without, the methods' own functions, in torch.
    """
    start = time.perf_counter()
    if not callable(on_bytes):
        raise MergeError(f"on_bytes={on_bytes!r}: give a function of the number of bytes")
    threads = num_threads(threads) or _num_cores()
    accelerator = None if device is None else _accelerator(plan, device)
    if hash_sources:
        _refuse_ranges(plan)
    folder = plan.output.with_name(plan.output.name + INCOMPLETE)
    underflows = Underflows()
    with system_errors(), locked(folder):
        origins = origins_of(plan, trust_manifests=trust_manifests)
        try:
            digest = plan.digest + ("" if accelerator is None else f" on {accelerator.device.type}")
            journal = Journal(folder, digest, _files_of(plan))
            shards = _shards(plan, compiled, accelerator)
            with _single_threaded_torch(shards):
                execute(
                    [underflows.watch(s) for s in shards if s.file not in journal.finished],
                    folder,
                    threads=threads,
                    chunk_bytes=chunk_bytes or chunk_bytes_for(threads),
                    on_shard=journal.add,
                    on_bytes=on_bytes,
                )
            files = {shard.file: journal.finished[shard.file] for shard in shards}
            files |= _write_beside(plan, folder, shards)
            notes = (*plan.notes, *underflows.notes())
            if accelerator is not None and not _runs(Function, shards, whole=True):
                notes += (f"device={device!r} changes nothing: no tensor is needed as a whole",)
            account = record(
                plan, files, origins, hash_sources=hash_sources, command=command, notes=notes
            )
            write_through(folder / RECORD, (json.dumps(account, indent=2) + "\n").encode())
            card = model_card(plan, account, origins, title or plan.output.name)
            write_through(folder / "README.md", card.encode())
            journal.remove()
            _put_in_place(folder, plan.output)
        except (MergeError, CheckpointError):
            remove_ours(folder)  # trying again changes nothing; an interrupted run stays
            folder.rmdir()
            raise
    return MergeReport(
        plan.output,
        files,
        len(plan.tensors),
        plan.num_bytes,
        time.perf_counter() - start,
        journal.resumed,
        notes,
    )


def _refuse_ranges(plan: MergePlan) -> None:
    """A file that is read by ranges is never here as a whole, to be hashed."""
    files = [f for s in plan.sources.values() for f in s.files if elsewhere(f) is not None]
    if files:
        raise MergeError(
            f"hash_sources=True: {few([str(file) for file in files], 2)} are read by ranges and "
            "never here as a whole; bring the sources first"
        )


def _accelerator(plan: MergePlan, device: str) -> Accelerator | None:
    """The device, or None for the CPU."""
    from alloy.devices import device_named

    if plan.settings.method.scope == "model":
        raise MergeError(
            f"device={device!r}: {plan.settings.name} computes where the module is; move that"
        )
    chosen = device_named(str(device), "device")
    if chosen.type == "mps":
        raise MergeError(
            "device='mps' has no float64, in which Grams and spectra are computed; leave it out"
        )
    return None if chosen.type == "cpu" else Accelerator(chosen)


def _num_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shards(plan: MergePlan, compiled: bool, accelerator: Accelerator | None) -> list[Shard]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    whole = None
    if plan.settings.method.scope == "model":
        merged = [_about(t) for t in plan.tensors if t.how == plan.settings.name]
        whole = merged_whole(merged, plan.settings, plan.data, base=plan.base is not None)
    return [
        Shard(
            file,
            tuple(_step(plan, tensors[name], compiled, whole, accelerator) for name in names),
        )
        for file, names in plan.layout.items()
    ]


def _about(tensor: PlannedTensor) -> Tensors:
    return Tensors(
        tensor.name, tensor.inputs, tensor.sources, tensor.dtype, tensor.shape, tensor.mapped
    )


def _step(
    plan: MergePlan,
    tensor: PlannedTensor,
    compiled: bool,
    whole: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
) -> Step:
    about = _about(tensor)
    if whole is not None and tensor.name in whole:
        return Step(tensor.name, tensor.dtype, tensor.shape, (), partial(Held, about, whole))
    row_maps, borrowed = None, {}
    if tensor.mapped and plan.vocabulary is not None:
        row_maps = tuple(plan.vocabulary.row_maps[source] for source in tensor.sources)
        place = {source: i for i, source in enumerate(tensor.sources)}
        borrowed = {
            row: (None if source is None else place[source], theirs)
            for row, (source, theirs) in plan.vocabulary.borrowed.items()
            if source is None or source in place
        }
    measured = None
    if plan.statistics is not None:
        measured = partial(plan.statistics.of, plan.settings.method.statistics)
    if tensor.how in ("copy", "agree"):
        work = partial(Copy, about)
    else:
        work = work_for(
            about,
            plan.settings,
            base=BASE in tensor.sources,
            statistics=measured,
            compiled=compiled,
            accelerator=accelerator,
        )
    return Step(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        tensor.inputs,
        work,
        row_maps,
        BASE in tensor.sources,
        borrowed,
    )


def _files_of(plan: MergePlan) -> list[str]:
    """Every file that the result will have."""
    return [*plan.layout, *plan.files, INDEX, RECORD, "README.md"]


def _runs(kind: type, shards: Sequence[Shard], *, whole: bool = False) -> bool:
    """True if a tensor is computed by works of this kind (`whole`: that do not cut it)."""
    works = [s.work for shard in shards for s in shard.steps if s.work.func is kind]
    return any(not work().chunked for work in works) if whole else bool(works)


@contextmanager
def _single_threaded_torch(shards: Sequence[Shard]) -> Generator[None]:
    """Workers are the parallelism: torch's threads would compete and change the order of sums."""
    if not _runs(Function, shards):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_beside(plan: MergePlan, folder: Path, shards: Sequence[Shard]) -> dict[str, str]:
    """Config, tokenizer and the like, and the index; their hashes."""
    contents = {
        name: value.read_bytes() if isinstance(value, Path) else value
        for name, value in plan.files.items()
    }
    plain = [shard for shard in shards if "/" not in shard.file]
    if len(plain) > 1:
        weight_map = {step.name: shard.file for shard in plain for step in shard.steps}
        total = sum(step.num_bytes for shard in plain for step in shard.steps)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        contents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    for name, content in contents.items():
        write_through(folder / name, content)
    return {name: sha256(folder / name) for name in contents}


def _put_in_place(folder: Path, output: Path) -> None:
    """The finished folder takes the place of the (absent or empty) output."""
    (folder / LOCK).unlink()
    sync_folder(folder)
    folder.replace(output)
    sync_folder(output.parent)
