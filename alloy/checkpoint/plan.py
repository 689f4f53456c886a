"""Everything about a merge that can be known before a tensor is read: checked in full, then printed or run.

Every tensor of every source is accounted for: merged, copied, left out by name, or a problem. Problems
of files are told together, then problems of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alloy.checkpoint.config import (
    COPIED,
    TOKENIZER,
    compare_configs,
    compare_processors,
    files_like,
    flatten,
    result_config,
    stored_transposed,
    vocabulary_size,
)
from alloy.checkpoint.format import (
    DTYPE_NAMES,
    INDEX,
    ITEM_BYTES,
    MERGEABLE,
    SINGLE,
    Checkpoint,
    Entry,
    few,
    open_checkpoint,
)
from alloy.checkpoint.statistics import Measurements, open_statistics
from alloy.checkpoint.tokenizer import (
    POLICIES,
    Tokenizer,
    Vocabulary,
    combine_vocabularies,
    difference,
    read_tokenizer,
)
from alloy.errors import CheckpointError, MergeError, nearest
from alloy.merging import MERGE_METHODS, MergeSettings, oriented, validate

BASE = "base"
RECORD = "alloy_merge.json"
INCOMPLETE = ".incomplete"  # beside the output, where a merge keeps its work
"""The result's own account of how it was made, beside its card."""

Paths = Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result: what it is made from and how."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    how: str
    """The method's name, "copy", or "agree" (all sources hold the same bytes)."""
    sources: tuple[str, ...]
    inputs: tuple[Entry, ...]
    coefficients: tuple[float, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those that were given by pattern, with this tensor's values."""
    mapped: bool = False
    """Rows are looked up by token, because the vocabularies differ."""

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    @property
    def expected_seconds(self) -> float:
        """A rough forecast on two cores with the sources in the page cache."""
        moved = self.num_bytes + sum(entry.num_bytes for entry in self.inputs)
        return (
            _SECONDS_PER_ELEMENT.get(self.how, 60e-9) * self.num_elements
            + _SECONDS_PER_BYTE * moved
        )


@dataclass(frozen=True)
class MergePlan:
    """A merge that was checked and can be carried out. `str(plan)` is the table that `--dry-run` prints."""

    settings: MergeSettings
    sources: Mapping[str, Checkpoint]
    base: str | None
    output: Path
    tensors: tuple[PlannedTensor, ...]
    layout: Mapping[str, tuple[str, ...]]
    """Output file to names of tensors, in file order."""
    files: Mapping[str, Path | bytes]
    """What lies beside the weights: contents, or the file to copy."""
    vocabulary: Vocabulary | None
    statistics: Measurements | None
    notes: tuple[str, ...] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)
    """The engine's settings that are not the defaults, for the record."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What a method that runs the model was given to run: the module, batches."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """A SHA-256 that changes whenever the result might: what a resumed run must have in common."""
        text = json.dumps(
            {
                "method": self.settings.name,
                "options": {k: repr(v) for k, v in self.settings.options.items()},
                "tensors": [
                    (t.name, t.dtype, t.shape, t.how, t.sources, t.coefficients, t.mapped)
                    for t in self.tensors
                ],
                "layout": {k: list(v) for k, v in self.layout.items()},
                "choices": {k: repr(v) for k, v in self.choices.items()},
                "data": os.urandom(16).hex() if self.data else None,  # batches have no digest
                "files": [
                    (str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns)
                    for path in self._read_files()
                ],
            },
            sort_keys=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _read_files(self) -> list[Path]:
        weights = [f for source in self.sources.values() for f in source.files]
        beside = [p for p in self.files.values() if isinstance(p, Path)]
        return weights + beside + (self.statistics.files if self.statistics else [])

    @property
    def expected_seconds(self) -> float:
        """The sum of the tensors'."""
        return sum(t.expected_seconds for t in self.tensors)

    def __str__(self) -> str:
        rows = [
            (
                t.name,
                f"{t.dtype} {list(t.shape)}",
                t.how + (" (rows by token)" if t.mapped else ""),
                ", ".join(t.sources),
                ", ".join(
                    [f"{c:.4g}" for c in t.coefficients]
                    + [f"{key}={value}" for key, value in t.options.items()]
                ),
                f"{t.num_bytes:,}",
                f"{t.expected_seconds:.4f}",
            )
            for t in self.tensors
        ]
        head = ("tensor", "dtype and shape", "how", "from", "settings", "bytes", "s expected")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        options = ", ".join(f"{key}={value!r}" for key, value in self.settings.options.items())
        read = sum(source.num_bytes for source in self.sources.values())
        lines += [
            "",
            f"method   {self.settings.name}" + (f" ({options})" if options else ""),
            *(f"source   {name}: {source.path}" for name, source in self.sources.items()),
            *(f"note     {note}" for note in self.notes),
            f"files    {', '.join([*self.layout, *self.files])}",
            f"output   {self.output}: {len(self.tensors)} tensors, {self.num_bytes:,} bytes in {len(self.layout)} "
            f"file{'s' * (len(self.layout) > 1)}; {read:,} bytes to read; about {self.expected_seconds:.1f} s on two cores",
        ]
        return "\n".join(lines)


_SECONDS_PER_ELEMENT = {
    "copy": 0.1e-9, "agree": 0.1e-9, "linear": 0.3e-9, "task_arithmetic": 0.5e-9, "modality_arithmetic": 0.5e-9,
    "slerp": 1.5e-9, "nuslerp": 1.5e-9, "multislerp": 1.5e-9, "karcher": 1.5e-9, "model_stock": 1.5e-9,
    "ties": 2.8e-9, "dare_linear": 1.1e-9, "dare_ties": 1.4e-9, "breadcrumbs": 2.8e-9, "breadcrumbs_ties": 2.8e-9,
    "interpolation": 6e-9, "nearswap": 6e-9, "fisher": 20e-9,
}  # fmt: skip
"""Two cores together, as benchmarks/merge.py measures; the forecast of other methods is a guess."""
_SECONDS_PER_BYTE = 0.2e-9
"""Read from the page cache, or hashed and written."""


def plan_merge(
    method: str,
    sources: Paths,
    output: str | Path,
    *,
    base: str | Path | None = None,
    coefficients: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    statistics: Mapping[str, str | Path] | Sequence[str | Path] | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    tokenizer: str = "same",
    copy: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
    allow: Sequence[str] = (),
    **options: Any,
) -> MergePlan:
    """Check a merge and say what it would do; see `merge_checkpoints` for the arguments.

    Raises:
        MergeError, CheckpointError: everything that is wrong, with names and fixes.
    """
    _check_method(method)
    problems: list[str] = []
    paths = _named(sources)
    if base is not None:
        paths = {BASE: Path(base), **paths}
    opened = {name: _attempt(problems, open_checkpoint, path) for name, path in paths.items()}
    _check_choices(problems, paths, dtype, tokenizer, shard_bytes, Path(output))
    _raise(problems)
    checkpoints = {name: c for name, c in opened.items() if c is not None}

    reference = next(name for name in checkpoints if name != BASE)
    folders = {name: c.path for name, c in checkpoints.items() if c.path.is_dir()}
    allow = tuple(allow)
    configs = {name: c.config for name, c in checkpoints.items()}
    ordered = {reference: configs[reference], **configs}
    notes: list[str] = []
    for found, told in (
        compare_configs(ordered, allow),
        compare_processors({n: folders[n] for n in ordered if n in folders}, allow),
    ):
        problems += found
        notes += told
    vocabulary = _vocabulary(problems, notes, checkpoints, folders, reference, tokenizer)
    untied = _without_tied_copies(problems, notes, checkpoints)
    tensors = _tensors(
        problems, checkpoints, untied, reference, vocabulary, dict(copy or {}), tuple(drop), dtype
    )
    spec = MERGE_METHODS[method]
    if spec.scope == "model":
        problems += [
            f"{t.name} has rows by token, which method {method!r} cannot look up: it runs the models; "
            "give them one vocabulary first"
            for t in tensors
            if t.mapped
        ]
    _raise(problems)

    data = {key: options.pop(key) for key in spec.inputs if key in options}
    merged = [t.name for t in tensors if t.how == "merge"]
    if "transposed" in spec.options:
        options = oriented(options, stored_transposed(configs[reference]) & set(merged))
    measured = None
    if statistics is not None:
        measured = open_statistics(statistics, [n for n in checkpoints if n != BASE])
    settings = validate(
        method,
        merged,
        num_models=len(checkpoints) - (base is not None),
        base=base is not None,
        statistics=measured is not None,
        coefficients=coefficients,
        options=options,
        inputs=data,
    )
    if measured is not None:
        problems += measured.problems(
            settings.method.statistics, {t.name: t.shape for t in tensors if t.how == "merge"}
        )
    tensors = tuple(_with_method(t, settings) for t in tensors)
    notes += _unskipped(tensors, settings, reference, configs)
    layout = _layout(tensors, checkpoints[reference].entries, shard_bytes)
    _check_room(problems, Path(output), sum(t.num_bytes for t in tensors))
    _raise(problems)
    choices = {
        "dtype": dtype, "shard_bytes": shard_bytes, "tokenizer": tokenizer,
        "copy": dict(copy or {}), "drop": list(drop), "allow": list(allow),
        "statistics": {name: str(c.path) for name, c in measured.files_of.items()} if measured else {},
    }  # fmt: skip
    return MergePlan(
        settings=settings,
        sources=checkpoints,
        base=BASE if base is not None else None,
        output=Path(output),
        tensors=tensors,
        layout=layout,
        files=_files(checkpoints, folders, reference, tokenizer, vocabulary, tensors, dtype),
        vocabulary=vocabulary,
        statistics=measured,
        notes=tuple(notes),
        choices={
            key: value for key, value in choices.items() if value not in (None, "same", {}, [])
        },
        data=data,
    )


def _check_method(method: str) -> None:
    if method not in MERGE_METHODS:
        raise MergeError(f"method {method!r} is unknown: {nearest(method, MERGE_METHODS)}")


def _named(sources: Paths) -> dict[str, Path]:
    """The sources by name: as given, or after their folders (`#2` and so on where those repeat)."""
    if isinstance(sources, str | Path):
        raise MergeError("give several sources, as a list of paths or a mapping from name to path")
    if not sources:
        raise MergeError("no source: give at least one checkpoint")
    if isinstance(sources, Mapping):
        if BASE in sources:
            raise MergeError(
                f"a source is called {BASE!r}, which means the base; give it another name"
            )
        return {name: Path(path) for name, path in sources.items()}
    named: dict[str, Path] = {}
    for path in map(Path, sources):
        stem = path.stem if path.suffix == ".safetensors" else path.name
        count = sum(name == stem or name.startswith(f"{stem}#") for name in named)
        named[f"{stem}#{count + 1}" if count or stem == BASE else stem] = path
    return named


def _attempt(problems: list[str], function: Callable, *arguments):
    try:
        return function(*arguments)
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _raise(problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise MergeError(
            problems[0] if len(problems) == 1 else f"{len(problems)} problems:\n{lines}"
        )


def _check_choices(
    problems: list[str],
    paths: Mapping[str, Path],
    dtype: str | None,
    tokenizer: str,
    shard_bytes: int | None,
    output: Path,
) -> None:
    if dtype is not None and dtype not in DTYPE_NAMES:
        problems.append(f"dtype={dtype!r}: {nearest(str(dtype), DTYPE_NAMES)}")
    if tokenizer not in POLICIES:
        problems.append(f"tokenizer={tokenizer!r}: {nearest(str(tokenizer), POLICIES)}")
    if shard_bytes is not None and shard_bytes < 1:
        problems.append(f"shard_bytes={shard_bytes!r}: give a positive number of bytes")
    if output.is_symlink():
        problems.append(f"{output} is a link; name the folder itself")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        problems.append(f"{output} is not an empty folder; choose another output or remove it")
    _check_apart(problems, paths, output)


def _check_apart(problems: list[str], paths: Mapping[str, Path], output: Path) -> None:
    """No source may be, hold, or lie in what the merge writes, whatever links lead there."""
    unfinished = output.with_name(output.name + INCOMPLETE)
    for name, path in paths.items():
        source = path.resolve()
        for place in (output, unfinished):
            target = place.resolve()
            if target == source:
                problems.append(
                    f"{place}, which the merge writes, is the source {name!r}; choose another output"
                )
            elif target.is_relative_to(source):
                problems.append(
                    f"{place} lies inside the source {name!r}; choose a folder outside it"
                )
            elif source.is_relative_to(target):
                problems.append(
                    f"the source {name!r} lies inside {place}, which the merge writes; "
                    "choose another output"
                )


def _vocabulary(
    problems: list[str],
    notes: list[str],
    checkpoints: Mapping[str, Checkpoint],
    folders: Mapping[str, Path],
    reference: str,
    policy: str,
) -> Vocabulary | None:
    """The common vocabulary, or None where all sources number their tokens alike."""
    found = {name: _attempt(problems, read_tokenizer, folder) for name, folder in folders.items()}
    tokenizers: dict[str, Tokenizer] = {name: t for name, t in found.items() if t is not None}
    sizes = {name: vocabulary_size(c.config) for name, c in checkpoints.items()}
    owner = BASE if policy == "base" and BASE in tokenizers else reference
    if owner not in tokenizers:
        owner = next(iter(tokenizers), owner)
    differences = [
        text
        for name, other in tokenizers.items()
        if name != owner and (text := difference(owner, tokenizers[owner], name, other)) is not None
    ]
    known_sizes = {name: size for name, size in sizes.items() if size is not None}
    if not differences:
        if len(set(known_sizes.values())) > 1:
            if policy == "same" or not _all_known(checkpoints, tokenizers, sizes):
                problems.append(
                    f"vocab_size differs: {known_sizes}; take tokenizer='base' or 'union' (every source then needs "
                    "its tokenizer.json)"
                )
                return None
        else:
            if lacking := [n for n in folders if n not in tokenizers and tokenizers]:
                notes.append(f"{few(lacking)} has no tokenizer: its tokens were not compared")
            if policy != "same":
                notes.append(f"tokenizer={policy!r} changes nothing: the vocabularies are the same")
            return None
    elif policy == "same":
        problems += [
            f"{text}; merging rows of different tokens makes no sense: take tokenizer='union' (all tokens) "
            f"or tokenizer='base' (those of {BASE if BASE in tokenizers else reference!r})"
            for text in differences
        ]
        return None
    if not _all_known(checkpoints, tokenizers, sizes):
        lacking = [n for n in checkpoints if n not in tokenizers or sizes[n] is None]
        problems.append(
            f"tokenizer={policy!r} needs tokenizer.json and vocab_size of every source; {few(lacking)} lacks one"
        )
        return None
    ordered = {owner: tokenizers[owner], **tokenizers}
    return _attempt(problems, combine_vocabularies, policy, owner, ordered, known_sizes)


def _all_known(checkpoints, tokenizers, sizes) -> bool:
    return all(name in tokenizers and sizes[name] is not None for name in checkpoints)


def _without_tied_copies(
    problems: list[str], notes: list[str], checkpoints: Mapping[str, Checkpoint]
) -> dict[str, dict[str, Entry]]:
    """Every source's tensors, tied ones once: a head that its config ties to the embeddings is no tensor of its own."""
    result = {}
    for source, checkpoint in checkpoints.items():
        entries = dict(checkpoint.entries)
        size = vocabulary_size(checkpoint.config)
        if checkpoint.config is not None and checkpoint.config.get("tie_word_embeddings") and size:
            rows = [e for e in entries.values() if len(e.shape) == 2 and e.shape[0] == size]
            embeddings = [e for e in rows if _is_embedding(e.name)]
            for head in (e for e in rows if _is_head(e.name)):
                for embedding in embeddings:
                    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
                        continue
                    if _same_bytes(head, embedding):
                        del entries[head.name]
                        notes.append(
                            f"{source!r} stores {head.name} beside {embedding.name}, tied: stored once"
                        )
                        break
                else:
                    if embeddings:
                        problems.append(
                            f"tied weights untied: config.json of {source!r} ties its embeddings, but {head.name} and "
                            f"{embeddings[0].name} differ; save it with tie_word_embeddings=false or tie them"
                        )
        result[source] = entries
    return result


def _is_embedding(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "shared")) and not _is_head(name)


def _is_head(name: str) -> bool:
    return any(word in name for word in ("head", "predictions", "embed_out"))


def _has_row_per_token(
    name: str, found: Mapping[str, Entry], configs: Mapping[str, Mapping | None]
) -> bool:
    """Whether a tensor's rows are tokens: there are as many, and no other dimension of the model is that large."""
    sizes = {source: vocabulary_size(configs[source]) for source in found}
    if not all(entry.shape and entry.shape[0] == sizes[source] for source, entry in found.items()):
        return False
    others = {
        value
        for source in found
        for key, value in flatten(configs[source] or {})
        if not key.endswith("vocab_size") and value == sizes[source]
    }
    return not others or _is_embedding(name) or _is_head(name)


def _same_bytes(a: Entry, b: Entry) -> bool:
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        remaining = a.num_bytes
        while remaining:
            size = min(remaining, 1 << 20)
            if left.read(size) != right.read(size):
                return False
            remaining -= size
    return True


def _tensors(
    problems: list[str],
    checkpoints: Mapping[str, Checkpoint],
    entries: Mapping[str, Mapping[str, Entry]],
    reference: str,
    vocabulary: Vocabulary | None,
    copy: Mapping[str, str],
    drop: Sequence[str],
    dtype: str | None,
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the result; every tensor of every source is in one of them, or a problem."""
    names = list(dict.fromkeys([*entries[reference], *(n for e in entries.values() for n in e)]))
    for what, patterns in (("copy", copy), ("drop", drop)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                problems.append(
                    f"{what} pattern {pattern!r} matches no tensor: {nearest(pattern, names)}"
                )
    for pattern, source in copy.items():
        if source not in checkpoints:
            problems.append(
                f"copy[{pattern!r}]={source!r} is no source: {nearest(source, checkpoints)}"
            )
    if problems:
        return ()
    configs = {name: c.config for name, c in checkpoints.items()}
    out_dtype = None if dtype is None else DTYPE_NAMES[dtype]
    result: list[PlannedTensor] = []
    lacking: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in drop):
            continue
        owner = next((s for p, s in copy.items() if fnmatchcase(name, p)), None)
        if owner is not None:
            if name not in entries[owner]:
                problems.append(f"copy says {name!r} comes from {owner!r}, which lacks it")
                continue
            entry = entries[owner][name]
            if vocabulary is not None and _has_row_per_token(name, {owner: entry}, configs):
                problems.append(
                    f"copy says {name!r} comes from {owner!r}, whose rows are not the common vocabulary's; merge it"
                )
            result.append(
                PlannedTensor(
                    name, _dtype(entry, out_dtype), entry.shape, "copy", (owner,), (entry,)
                )
            )
            continue
        missing = tuple(source for source in entries if name not in entries[source])
        if missing:
            lacking.setdefault(missing, []).append(name)
            continue
        found = {source: entries[source][name] for source in entries}
        planned = _planned(problems, name, found, reference, configs, vocabulary, out_dtype)
        if planned is not None:
            result.append(planned)
    for missing, absent in lacking.items():
        holders = [source for source in entries if source not in missing]
        problems.append(
            f"{len(absent)} tensor{'s' * (len(absent) > 1)} missing in {few(missing)} that {few(holders)} "
            f"{'has' if len(holders) == 1 else 'have'}: {few(absent)}; are these one architecture? To keep them as they "
            f"are say copy={{{absent[0]!r}: {holders[0]!r}}}, to leave them out drop=[{absent[0]!r}] (patterns work)"
        )
    if not result and not problems:
        problems.append("drop leaves no tensor")
    return tuple(result)


def _planned(
    problems: list[str],
    name: str,
    found: Mapping[str, Entry],
    reference: str,
    configs: Mapping[str, Mapping | None],
    vocabulary: Vocabulary | None,
    dtype: str | None,
) -> PlannedTensor | None:
    """A tensor that every source has."""
    first = found[reference]
    sources, inputs = tuple(found), tuple(found.values())
    mapped = vocabulary is not None and _has_row_per_token(name, found, configs)
    shape = (vocabulary.size, *first.shape[1:]) if mapped and vocabulary else first.shape
    trailing = {e.shape[1:] if mapped else e.shape for e in inputs}
    if len(trailing) > 1:
        shapes = {source: list(entry.shape) for source, entry in found.items()}
        problems.append(
            f"shapes of {name!r} differ: {shapes}; align the widths first, or say copy={{{name!r}: {reference!r}}}"
        )
        return None
    dtypes = {source: entry.dtype for source, entry in found.items()}
    mergeable = all(d in MERGEABLE for d in dtypes.values())
    if len(set(dtypes.values())) > 1 and not (mergeable and dtype):
        problems.append(
            f"dtypes of {name!r} differ: {dtypes}; "
            + (
                "say which the result shall have, dtype='float32'"
                if mergeable
                else "save them alike"
            )
        )
        return None
    if any(d.startswith(("F8", "C64")) for d in dtypes.values()):
        problems.append(
            f"{name!r} is {first.dtype}: quantised or complex weights cannot be merged; dequantise them first"
        )
        return None
    if mapped and (len(set(dtypes.values())) > 1 or first.dtype not in ("BF16", "F16", "F32")):
        problems.append(
            f"{name!r} is {sorted(set(dtypes.values()))}: vocabularies are matched in one dtype of BF16, F16, F32"
        )
        return None
    how = "merge" if mergeable else "agree"
    return PlannedTensor(name, _dtype(first, dtype), shape, how, sources, inputs, mapped=mapped)


def _dtype(entry: Entry, dtype: str | None) -> str:
    return dtype if dtype is not None and entry.dtype in MERGEABLE else entry.dtype


def _with_method(tensor: PlannedTensor, settings: MergeSettings) -> PlannedTensor:
    if tensor.how != "merge":
        return tensor
    row = settings.coefficients.get(tensor.name, ())
    return replace(
        tensor,
        how=settings.name,
        coefficients=tuple(row),
        options=settings.patterned.get(tensor.name, {}),
    )


def _unskipped(
    tensors: Sequence[PlannedTensor],
    settings: MergeSettings,
    reference: str,
    configs: Mapping[str, Mapping | None],
) -> list[str]:
    """Notes about embeddings and heads that a method for matrices would take for layers, by their shape."""
    if "skip" not in settings.options:
        return []
    return [
        f"{t.name} has a row per token, and {settings.name} merges it as it does layers: add it to skip?"
        for t in tensors
        if t.how == settings.name
        and len(t.shape) == 2
        and _has_row_per_token(t.name, dict(zip(t.sources, t.inputs, strict=True)), configs)
        and not any(fnmatchcase(t.name, pattern) for pattern in settings.options["skip"])
    ]


def _layout(
    tensors: Sequence[PlannedTensor], reference: Mapping[str, Entry], shard_bytes: int | None
) -> dict[str, tuple[str, ...]]:
    """Which file holds which tensors: as the reference's files do, or files of at most `shard_bytes`."""
    groups: list[list[str]] = []
    last: Path | None = None
    size = 0
    for tensor in tensors:
        file = reference[tensor.name].file if tensor.name in reference else last
        full = size + tensor.num_bytes > shard_bytes if shard_bytes is not None else file != last
        if not groups or full:
            groups.append([])
            size = 0
        groups[-1].append(tensor.name)
        size += tensor.num_bytes
        last = file
    if len(groups) == 1:
        return {SINGLE: tuple(groups[0])}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": tuple(group)
        for i, group in enumerate(groups, 1)
    }


def _check_room(problems: list[str], output: Path, num_bytes: int) -> None:
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        problems.append(
            f"{folder} has {free:,} bytes free, the result needs {num_bytes:,}; make room"
        )


def _files(
    checkpoints: Mapping[str, Checkpoint],
    folders: Mapping[str, Path],
    reference: str,
    policy: str,
    vocabulary: Vocabulary | None,
    tensors: Sequence[PlannedTensor],
    dtype: str | None,
) -> dict[str, Path | bytes]:
    """What the result needs beside its weights."""
    result: dict[str, Path | bytes] = {}
    config = checkpoints[reference].config
    if reference in folders:
        speaker = (
            BASE if vocabulary is not None and policy == "base" and BASE in folders else reference
        )
        left_out = vocabulary.left_out if vocabulary is not None else ()
        for path in files_like(folders[reference], COPIED):
            result[path.name] = path
        for path in files_like(folders[speaker], TOKENIZER):
            if path.name not in left_out and path.name != INDEX:
                result[path.name] = path
        if config is not None and "auto_map" in json.dumps(config):
            for path in files_like(folders[reference], ("*.py",)):
                result[path.name] = path
    if vocabulary is not None:
        result |= vocabulary.files
    if config is not None:
        size = vocabulary.size if vocabulary is not None else None
        merged = result_config(config, dtype=dtype, vocab_size=size)
        result["config.json"] = (json.dumps(merged, indent=2) + "\n").encode()
    return result
