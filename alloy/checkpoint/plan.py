"""Plan a merge: all that can be known before a tensor is read, checked in full, then run.

`checks` says what must hold. Problems of files are reported together, then problems of what the
files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from alloy.checkpoint.checks.configs import (
    compare_configs,
    compare_processors,
    files_of_owners,
)
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.groups import kept_names, refuse_two_wishes
from alloy.checkpoint.checks.layers import COUNTS, count_keys, layer_lists, layered_config
from alloy.checkpoint.checks.modules import common_modules
from alloy.checkpoint.checks.names import common_names
from alloy.checkpoint.checks.places import check_output, check_room
from alloy.checkpoint.checks.rows import common_vocabulary, has_row_per_token
from alloy.checkpoint.checks.settings import TextSettings, common_settings
from alloy.checkpoint.checks.slices import Sliced, sliced
from alloy.checkpoint.checks.sources import BASE, Sources, open_sources
from alloy.checkpoint.checks.tensors import (
    PlannedTensor,
    Selection,
    any_row_merged,
    plan_tensors,
    without_tied_copies,
)
from alloy.checkpoint.config import (
    COPIED,
    TOKENIZER,
    files_like,
    result_config,
    stored_transposed,
)
from alloy.checkpoint.display import plan_table
from alloy.checkpoint.format import ADAPTER, INDEX, SINGLE, Checkpoint
from alloy.checkpoint.reading import few, source_file
from alloy.checkpoint.request import MergeRequest
from alloy.checkpoint.statistics import Measurements, open_statistics
from alloy.checkpoint.tokenizer import Vocabulary
from alloy.errors import MergeError, system_errors
from alloy.merging import MERGE_METHODS, MergeSettings, oriented, validate
from alloy.merging.check import is_matrix
from alloy.merging.method import Coefficients

Names = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class MergePlan:
    """A merge that was checked and can be carried out; `str(plan)` is its table."""

    settings: MergeSettings
    sources: Mapping[str, Checkpoint]
    base: str | None
    output: Path
    tensors: tuple[PlannedTensor, ...]
    layout: Mapping[str, tuple[str, ...]]
    """Output file to names of tensors, in file order."""
    files: Mapping[str, Path | bytes]
    """Files beside the weights: contents, or the file to copy."""
    vocabulary: Vocabulary | None
    statistics: Measurements | None
    notes: tuple[str, ...] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)
    """The engine's settings that are not the defaults, for the record."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of a method that runs the model: the module, batches."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that the merge writes."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def digest(self) -> str:
        """A SHA-256 that changes whenever the result might: a resumed run must have the same."""
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
        adapters = [s.adapter / ADAPTER for s in self.sources.values() if s.adapter is not None]
        beside = [p for p in self.files.values() if isinstance(p, Path)] + adapters
        return weights + beside + (self.statistics.files if self.statistics else [])

    def __str__(self) -> str:
        return plan_table(self)


def plan_merge(request: MergeRequest) -> MergePlan:
    """Check a merge and say what it would do.

    Raises:
        MergeError, CheckpointError: everything that is wrong, with names and fixes.
    """
    with system_errors():
        return _plan(request)


def _plan(request: MergeRequest) -> MergePlan:
    findings = Findings()
    request = request.checked(findings)
    findings.stop()
    output = Path(request.output)
    paths = _paths(request)
    sources = open_sources(findings, paths, request.allow)
    check_output(findings, paths | _parts(sources), output)
    findings.stop()

    sources = without_tied_copies(findings, sources)
    spared = (*request.drop, *request.copy)
    sources = common_names(findings, sources, cast("Names", request.names), spared)
    kept = kept_names(findings, request.kept, sources.checkpoints[sources.reference])
    refuse_two_wishes(findings, kept, request.copy, request.drop)
    if request.stack is not None and not request.slices:
        findings.problem(f"stack={request.stack!r} says where slices lie, and there are none")
    selection = Selection(
        request.copy,
        request.drop,
        request.dtype,
        kept,
        sources.reference,
        scaled=request.method == "passthrough",
    )
    layers: Sliced | None = None
    allow = tuple(request.allow)
    if request.slices:
        names = list(sources.checkpoints[sources.reference].entries)
        layers = findings.attempt(sliced, findings, sources, request.slices, request.stack)
        findings.stop()
        assert layers is not None, "nothing was found against it"
        sources = layers.sources
        config = sources.configs[sources.reference]
        counts = findings.attempt(count_keys, config, names, layers.stack) or []
        layers = replace(layers, counts=tuple(counts))
        keys = {*COUNTS, *(key[-1] for key in (*counts, *layer_lists(config, counts)))}
        allow += tuple(f"*{key}" for key in sorted(keys))
    compare_configs(findings, sources.configs, allow)
    models = {n: sources.folders[n] for n in sources.models if n in sources.folders}
    files_of = files_of_owners(
        findings, sources.folders, request.processor, request.generation_config
    )
    processors = compare_processors(findings, models, request.allow, tuple(files_of))
    modules = common_modules(findings, sources, request.allow)
    merges_rows = any_row_merged(sources, selection)
    vocabulary = None
    if merges_rows:
        vocabulary = common_vocabulary(
            findings, sources, request.tokenizer, request.tokens, request.pad_vocabulary_to
        )
    elif request.tokenizer != "same":
        findings.note(
            f"tokenizer={request.tokenizer!r} changes nothing: no row of a token is merged"
        )
    by_base = vocabulary is not None and request.tokenizer == "base" and BASE in sources.folders
    speaker = BASE if by_base else sources.reference
    text_settings = common_settings(
        findings,
        sources.folders,
        speaker,
        sources.models,
        None if request.chat_template is None else str(request.chat_template),
        request.allow,
        compared=merges_rows,
        vocabulary=vocabulary,
    )
    owners = None if layers is None else layers.owners
    tensors = plan_tensors(findings, sources, vocabulary, selection, owners)
    _check_scope(findings, request.method, tensors)
    if kept and not request.slices and all(t.how != "merge" for t in tensors):
        findings.problem(f"kept={list(request.kept)} leaves nothing to merge")
    findings.stop()

    settings, measured, data = _settings(findings, request, sources, tensors)
    tensors = tuple(_with_method(tensor, settings) for tensor in tensors)
    _note_unskipped(findings, tensors, settings, sources)
    _note_averaged(findings, tensors, settings, measured)
    check_room(findings, output, sum(t.num_bytes for t in tensors))
    findings.stop()
    opened_statistics = {} if measured is None else measured.files_of
    statistics = {name: str(opened.path) for name, opened in opened_statistics.items()}
    shapes = {t.name: t.shape for t in tensors}
    return MergePlan(
        settings=settings,
        sources=sources.checkpoints,
        base=BASE if sources.has_base else None,
        output=output,
        tensors=tensors,
        layout=_layout(tensors, sources, _shard_bytes(request, sources)),
        files=processors
        | modules
        | _files(
            sources, speaker, files_of, vocabulary, text_settings, request.dtype, layers, shapes
        ),
        vocabulary=vocabulary,
        statistics=measured,
        notes=tuple(findings.notes),
        choices=request.choices | ({"statistics": statistics} if statistics else {}),
        data=data,
    )


def _paths(request: MergeRequest) -> dict[str, Path]:
    """Every checkpoint of a checked request, the base first."""
    base = {} if request.base is None else {BASE: Path(request.base)}
    assert isinstance(request.sources, Mapping), "a checked request names its sources"
    return base | {name: Path(path) for name, path in request.sources.items()}


def _parts(sources: Sources) -> dict[str, Path]:
    """The base and the adapter of each source that has one, by name."""
    parts = {}
    for name, source in sources.checkpoints.items():
        if source.adapter is not None:
            parts |= {name: source.path, f"adapter of {name}": source.adapter}
    return parts


def _check_scope(findings: Findings, method: str, tensors: Sequence[PlannedTensor]) -> None:
    """A method that runs the models looks up no rows."""
    if MERGE_METHODS[method].scope != "model":
        return
    for tensor in tensors:
        if tensor.mapped:
            findings.problem(
                f"{tensor.name} has rows by token, which method {method!r} cannot look up: it runs "
                "the models; give them one vocabulary first"
            )


def _settings(
    findings: Findings,
    request: MergeRequest,
    sources: Sources,
    tensors: Sequence[PlannedTensor],
) -> tuple[MergeSettings, Measurements | None, dict[str, Any]]:
    """The method's settings, what was measured for it, and what it is given to run."""
    method = MERGE_METHODS[request.method]
    options = dict(request.options)
    data = {key: options.pop(key) for key in method.inputs if key in options}
    merged = {t.name: t.shape for t in tensors if t.how == "merge"}
    if "transposed" in method.options:
        config = sources.configs[sources.reference]
        options = oriented(options, stored_transposed(config, merged))
    measured = None
    if request.statistics is not None:
        measured = open_statistics(request.statistics, sources.models)
    settings = validate(
        request.method,
        list(merged),
        num_models=len(sources.models),
        base=sources.has_base,
        statistics=measured is not None,
        coefficients=cast("Coefficients | None", request.coefficients),  # checked
        options=options,
        inputs=data,
        members=sources.models,
        counts=[_num_models(t) for t in tensors if t.how == "merge"] or None,
    )
    settings = _for_fewer(settings, tensors, sources.models)
    if measured is not None:
        for problem in measured.problems(method.statistics, merged):
            findings.problem(problem)
    return settings, measured, data


def _num_models(tensor: PlannedTensor) -> int:
    return sum(source != BASE for source in tensor.sources)


def _for_fewer(
    settings: MergeSettings, tensors: Sequence[PlannedTensor], models: Sequence[str]
) -> MergeSettings:
    """The settings where a tensor is made of some of the models: coefficients and values of those.

    Weights of a mean are divided by their sum anew.
    """
    coefficients, patterned = dict(settings.coefficients), dict(settings.patterned)
    for tensor in tensors:
        if tensor.how != "merge" or _num_models(tensor) == len(models):
            continue
        places = [models.index(source) for source in tensor.sources if source != BASE]
        if tensor.name in coefficients:
            row = [coefficients[tensor.name][i] for i in places]
            averaged = settings.method.coefficients != "scales"
            if averaged and settings.options_of(tensor.name).get("normalize", True):
                if not (total := sum(row)):
                    raise MergeError(
                        f"coefficients of {tensor.name}: those of {few(tensor.sources)} sum to 0; "
                        "give them weights"
                    )
                row = [c / total for c in row]
            coefficients[tensor.name] = tuple(row)
        patterned[tensor.name] = {
            option: tuple(value[i] for i in places)
            if settings.method.options[option].by_model and isinstance(value, tuple)
            else value
            for option, value in patterned.get(tensor.name, {}).items()
        }
    return replace(settings, coefficients=coefficients, patterned=patterned)


def _with_method(tensor: PlannedTensor, settings: MergeSettings) -> PlannedTensor:
    if tensor.how != "merge":
        return tensor
    return replace(
        tensor,
        how=settings.name,
        coefficients=tuple(settings.coefficients.get(tensor.name, ())),
        options=settings.patterned.get(tensor.name, {}),
    )


def _note_unskipped(
    findings: Findings,
    tensors: Sequence[PlannedTensor],
    settings: MergeSettings,
    sources: Sources,
) -> None:
    """Name embeddings and heads that a method for matrices takes for layers, by their shape."""
    if "skip" not in settings.options:
        return
    for t in tensors:
        entries = dict(zip(t.sources, t.inputs, strict=True))
        if (
            t.how == settings.name
            and len(t.shape) == 2
            and has_row_per_token(t.name, entries, sources.configs)
            and not any(fnmatchcase(t.name, pattern) for pattern in settings.options["skip"])
        ):
            findings.note(
                f"{t.name} has a row per token, and {settings.name} merges it as it does layers: "
                "add it to skip?"
            )


def _note_averaged(
    findings: Findings,
    tensors: Sequence[PlannedTensor],
    settings: MergeSettings,
    measured: Measurements | None,
) -> None:
    """Say of what share of the weights a method for matrices takes the mean, and of which."""
    if not settings.method.matrices_only:
        return
    ours = [t for t in tensors if t.how == settings.name and t.num_elements]
    skip = settings.options.get("skip", ())
    averaged = [
        t
        for t in ours
        if not is_matrix(t.name, t.shape)
        or any(fnmatchcase(t.name, pattern) for pattern in skip)
        or (measured is not None and not measured.has(settings.method.statistics, t.name))
    ]
    if not averaged:
        return
    largest = sorted(averaged, key=lambda t: -t.num_elements)[:3]
    share = sum(t.num_elements for t in averaged) / sum(t.num_elements for t in ours)
    findings.note(
        f"{settings.name} merges matrices: {len(averaged)} of {len(ours)} tensors, {share:.1%} of "
        f"the entries, are averaged instead, the largest {few([t.name for t in largest])}"
    )


def _shard_bytes(request: MergeRequest, sources: Sources) -> int | str | None:
    """The most that a file holds: as asked, or of slices as much as a file of the first source."""
    if request.shard_bytes is not None or not request.slices:
        return request.shard_bytes
    of_file: dict[Path, int] = {}
    for entry in sources.checkpoints[sources.reference].entries.values():
        of_file[entry.file] = of_file.get(entry.file, 0) + entry.num_bytes
    return max(of_file.values())


def _layout(
    tensors: Sequence[PlannedTensor], sources: Sources, shard_bytes: int | str | None
) -> dict[str, tuple[str, ...]]:
    """Divide tensors into files: like the reference's, or at most `shard_bytes` each."""
    assert not isinstance(shard_bytes, str), "a checked request has a number"
    reference = sources.checkpoints[sources.reference].entries
    groups: list[list[str]] = []
    last: tuple[str, Path | None] = ("", None)
    size = 0
    for tensor in tensors:
        module = tensor.name.rpartition("/")[0] if sources.modules else ""
        file = reference[tensor.name].file if tensor.name in reference else last[1]
        full = size + tensor.num_bytes > shard_bytes if shard_bytes is not None else file != last[1]
        if not groups or (full and not module) or module != last[0]:
            groups.append([])
            size = 0
        groups[-1].append(tensor.name)
        size += tensor.num_bytes
        last = module, file
    of_modules = {
        f"{group[0].rpartition('/')[0]}/{SINGLE}": tuple(group)
        for group in groups
        if sources.modules and "/" in group[0]
    }
    plain = [tuple(group) for group in groups if tuple(group) not in of_modules.values()]
    if len(plain) == 1:
        return {SINGLE: plain[0]} | of_modules
    return {
        f"model-{i:05d}-of-{len(plain):05d}.safetensors": group for i, group in enumerate(plain, 1)
    } | of_modules


def _files(
    sources: Sources,
    speaker: str,
    owners: Mapping[str, str],
    vocabulary: Vocabulary | None,
    text_settings: TextSettings,
    dtype: str | None,
    layers: Sliced | None,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Path | bytes]:
    """Collect what the result needs besides its weights."""
    result: dict[str, Path | bytes] = {}
    reference, folders = sources.reference, sources.folders
    config = sources.configs[reference]
    if reference in folders:
        left_out = (
            *(vocabulary.left_out if vocabulary is not None else ()),
            *text_settings.left_out,
        )
        for path in files_like(folders[reference], COPIED):
            if path.name not in owners:
                result[path.name] = path
        for name, owner in owners.items():
            if owner in folders and (path := source_file(folders[owner], name)) is not None:
                result[name] = path
        for path in files_like(folders[speaker], TOKENIZER):
            if path.name not in left_out and path.name != INDEX:
                result[path.name] = path
        if config is not None and "auto_map" in json.dumps(config):
            for path in files_like(folders[reference], ("*.py",)):
                result[path.name] = path
    if vocabulary is not None:
        result |= vocabulary.files
    result |= text_settings.files
    if config is not None:
        size = vocabulary.size if vocabulary is not None else None
        merged = result_config(config, dtype=dtype, vocab_size=size)
        if layers is not None:
            merged = layered_config(merged, shapes, layers)
        result["config.json"] = (json.dumps(merged, indent=2) + "\n").encode()
    return result
