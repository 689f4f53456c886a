"""Merge checkpoints on disk, larger than memory, into one that loads."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alloy.checkpoint.card import model_card, origins_of, record
from alloy.checkpoint.checks.places import INCOMPLETE
from alloy.checkpoint.checks.tensors import PlannedTensor
from alloy.checkpoint.engine.execute import chunk_bytes_for, execute
from alloy.checkpoint.engine.steps import Shard, Step
from alloy.checkpoint.engine.underflow import Underflows
from alloy.checkpoint.engine.work import Copy, Function, Held, Tensors, merged_whole, work_for
from alloy.checkpoint.format import INDEX
from alloy.checkpoint.hash import sha256
from alloy.checkpoint.plan import MergePlan, plan_merge
from alloy.checkpoint.request import Coefficients, MergeRequest, Paths, num_threads
from alloy.errors import CheckpointError, MergeError, system_errors

RECORD = "alloy_merge.json"
"""The result's own account of how it was made, beside its card."""
_JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

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
    chat_template: str | Path | None = None,
    copy: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    allow: Sequence[str] = (),
    threads: int | None = None,
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
        sources: folders in the Hugging Face layout or single safetensors files, in order or by
            name. The first one's names, order, sharding, config and tokenizer are those of the
            result.
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
        chat_template: where the sources' chat templates differ, the source whose template is
            taken, or a file that holds one.
        copy: glob pattern of tensor names to the source whose tensors are taken as they are.
        drop: glob patterns of tensors that the result shall not have.
        allow: glob patterns of config keys (and processor files) that may differ.
        threads: workers; by default the cores this process may use.
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
    """
    plan = plan_merge(
        MergeRequest(
            method, sources, output, base=base, coefficients=coefficients, statistics=statistics,
            dtype=dtype, shard_bytes=shard_bytes, tokenizer=tokenizer,
            chat_template=chat_template, copy=copy or {}, drop=drop,
            allow=allow, options=options,
        )
    )  # fmt: skip
    return run_plan(
        plan,
        threads=threads,
        hash_sources=hash_sources,
        command=command,
        title=title,
        on_bytes=on_bytes,
    )


def run_plan(
    plan: MergePlan,
    *,
    threads: int | None = None,
    hash_sources: bool = False,
    trust_manifests: bool = False,
    command: str | None = None,
    title: str | None = None,
    on_bytes: Callable[[int], None] = lambda _: None,
    chunk_bytes: int | None = None,
    compiled: bool = True,
) -> MergeReport:
    """Carry out a plan.

    Args:
        trust_manifests: the `manifest.json` beside a source was written by the caller's own fetch,
            which verified the files: its source, revision and hashes go into the record.
        compiled: whether compiled loops are used; without, the methods' own functions, in torch.
        threads, hash_sources, command, title, on_bytes: as `merge_checkpoints`.
    """
    start = time.perf_counter()
    if not callable(on_bytes):
        raise MergeError(f"on_bytes={on_bytes!r}: give a function of the number of bytes")
    threads = num_threads(threads) or _num_cores()
    folder = plan.output.with_name(plan.output.name + INCOMPLETE)
    underflows = Underflows()
    with system_errors(), _locked(folder):
        origins = origins_of(plan, trust_manifests=trust_manifests)
        try:
            journal = _Journal(folder, plan.digest, _files_of(plan))
            shards = _shards(plan, compiled)
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
            account = record(
                plan, files, origins, hash_sources=hash_sources, command=command, notes=notes
            )
            _write(folder / RECORD, (json.dumps(account, indent=2) + "\n").encode())
            card = model_card(plan, account, title or plan.output.name)
            _write(folder / "README.md", card.encode())
            journal.remove()
            _put_in_place(folder, plan.output)
        except (MergeError, CheckpointError):
            _remove_ours(folder)  # trying again changes nothing; an interrupted run stays
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


def _num_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shards(plan: MergePlan, compiled: bool) -> list[Shard]:
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    whole = None
    if plan.settings.method.scope == "model":
        merged = [_about(t) for t in plan.tensors if t.how == plan.settings.name]
        whole = merged_whole(merged, plan.settings, plan.data, base=plan.base is not None)
    return [
        Shard(
            file,
            tuple(_step(plan, tensors[name], compiled, whole) for name in names),
        )
        for file, names in plan.layout.items()
    ]


def _about(tensor: PlannedTensor) -> Tensors:
    return Tensors(tensor.name, tensor.inputs, tensor.sources, tensor.dtype, tensor.shape)


def _step(
    plan: MergePlan,
    tensor: PlannedTensor,
    compiled: bool,
    whole: Mapping[str, Any] | None = None,
) -> Step:
    about = _about(tensor)
    if whole is not None and tensor.name in whole:
        return Step(tensor.name, tensor.dtype, tensor.shape, (), partial(Held, about, whole))
    row_maps = None
    if tensor.mapped and plan.vocabulary is not None:
        row_maps = tuple(plan.vocabulary.row_maps[source] for source in tensor.sources)
    measured = None
    if plan.statistics is not None:
        measured = partial(plan.statistics.of, plan.settings.method.statistics)
    if tensor.how in ("copy", "agree"):
        work = partial(Copy, about)
    else:
        work = work_for(
            about, plan.settings, base=plan.base is not None, statistics=measured, compiled=compiled
        )
    return Step(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        tensor.inputs,
        work,
        row_maps,
        plan.base is not None,
    )


class _Journal:
    """The record of an unfinished result: every file's name first, then each finished one's hash.

    The names are what makes a folder ours: another merge may remove these files and nothing else.
    """

    def __init__(self, folder: Path, plan: str, files: Sequence[str]):
        self.path = folder / _JOURNAL
        self.finished: dict[str, str] = {}
        entries = _journal_entries(folder)
        if entries and entries[0]["plan"] == plan:
            for entry in entries[1:]:
                file = folder / entry["file"]
                if file.is_file() and sha256(file) == entry["sha256"]:
                    self.finished[entry["file"]] = entry["sha256"]
        else:
            _remove_ours(folder, keep=_LOCK)
            self._append({"plan": plan, "files": list(files)})
        self.resumed = tuple(self.finished)

    def add(self, file: str, digest: str) -> None:
        self._append({"file": file, "sha256": digest})
        self.finished[file] = digest

    def _append(self, entry: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        self.path.unlink()


def _journal_entries(folder: Path) -> list[dict[str, Any]]:
    """The journal's whole lines; a last line that a crash cut short is left out.

    Raises:
        CheckpointError: the journal is not one of ours.
    """
    path = folder / _JOURNAL
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, so it is not ours; {_MOVE_IT}")
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        entry: Any = None
        with suppress(ValueError):
            entry = json.loads(line)
        if not _is_entry(entry, first=number == 1):
            raise CheckpointError(
                f"{path}: line {number} is not a line of a merge's journal; {_MOVE_IT}"
            )
        entries.append(entry)
    return entries


def _is_entry(entry: Any, *, first: bool) -> bool:
    if not isinstance(entry, dict):
        return False
    if first:
        files = entry.get("files")
        plain = isinstance(files, list) and all(_is_plain_name(name) for name in files)
        return plain and isinstance(entry.get("plan"), str)
    return _is_plain_name(entry.get("file")) and isinstance(entry.get("sha256"), str)


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _remove_ours(folder: Path, keep: str | None = None) -> None:
    """Remove what the folder's journal names, itself last; a file that is not ours stays."""
    entries = _journal_entries(folder)
    for name in (*(entries[0]["files"] if entries else ()), _JOURNAL, _LOCK):
        if name != keep:
            (folder / name).unlink(missing_ok=True)


_LOCK = "lock"
_MOVE_IT = "move or remove it, or choose another output"


def refuse_foreign(folder: Path) -> None:
    """Refuse an unfinished folder unless it is absent, empty, or holds only what its journal names.

    Raises:
        CheckpointError: a link, a file, or a folder with anything that an earlier merge did not
            write.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, and a merge would write through it; {_MOVE_IT}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file where a merge keeps its work; {_MOVE_IT}")
    entries = _journal_entries(folder)
    ours = {_JOURNAL, *(entries[0]["files"] if entries else ())}
    for path in sorted(folder.iterdir()):
        is_lock = path.name == _LOCK and path.stat(follow_symlinks=False).st_size == 0
        if not (is_lock or path.name in ours) or path.is_symlink() or not path.is_file():
            raise CheckpointError(
                f"{folder} holds {path.name!r}, which no earlier merge wrote; {_MOVE_IT}"
            )


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """The unfinished folder, ours alone; what it holds stays for the next run if this one dies."""
    refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: another run is writing it; wait for it or stop it"
            ) from error
        yield


def _files_of(plan: MergePlan) -> list[str]:
    """Every file that the result will have."""
    return [*plan.layout, *plan.files, INDEX, RECORD, "README.md"]


@contextmanager
def _single_threaded_torch(shards: Sequence[Shard]) -> Generator[None]:
    """Workers are the parallelism: torch's threads would compete and change the order of sums."""
    if not any(step.work.func is Function for shard in shards for step in shard.steps):
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
    if len(shards) > 1:
        weight_map = {step.name: shard.file for shard in shards for step in shard.steps}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        contents[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    for name, content in contents.items():
        _write(folder / name, content)
    return {name: sha256(folder / name) for name in contents}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(folder: Path, output: Path) -> None:
    """The finished folder takes the place of the (absent or empty) output."""
    (folder / _LOCK).unlink()
    _sync_folder(folder)
    folder.replace(output)
    _sync_folder(output.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
