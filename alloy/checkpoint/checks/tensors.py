"""Account for every tensor of every source.

It is merged, copied, left out by name, or a problem. Tied weights count once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.groups import covering
from alloy.checkpoint.checks.rows import (
    has_row_per_token,
    is_embedding,
    is_head,
    ties_embeddings,
)
from alloy.checkpoint.checks.sources import Sources
from alloy.checkpoint.config import vocabulary_size
from alloy.checkpoint.format import DTYPE_NAMES, ITEM_BYTES, MERGEABLE, Entry
from alloy.checkpoint.ranges.blocks import BLOCK_BYTES
from alloy.checkpoint.ranges.files import open_file
from alloy.checkpoint.reading import few
from alloy.checkpoint.tokenizer import Vocabulary
from alloy.errors import nearest, nearest_tensors


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
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Selection:
    """The user's wishes for tensors beyond merging them."""

    copy: Mapping[str, str]
    """Glob pattern to the source whose tensors are taken as they are; the first that matches."""
    drop: Sequence[str]
    dtype: str | None
    kept: frozenset[str] = frozenset()
    """Names that stay the reference's."""
    reference: str = ""
    scaled: bool = False
    """What has a single source is scaled by the method, not copied."""

    def dropped(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.drop)

    def owner(self, name: str) -> str | None:
        owner = next((s for p, s in self.copy.items() if fnmatchcase(name, p)), None)
        return self.reference if owner is None and name in self.kept else owner

    def stored(self, entry: Entry) -> str:
        """The dtype of the result for what is stored so."""
        if self.dtype is None or entry.dtype not in MERGEABLE:
            return entry.dtype
        return DTYPE_NAMES[self.dtype]


def any_row_merged(sources: Sources, selection: Selection) -> bool:
    """True unless every tensor with rows by token stays the first source's, or is left out."""
    reference = sources.checkpoints[sources.reference].entries
    rows = {
        name
        for source, checkpoint in sources.checkpoints.items()
        for name, entry in checkpoint.entries.items()
        if has_row_per_token(name, {source: entry}, sources.configs)
    }
    return not rows or any(
        not selection.dropped(name) and (name not in reference or name not in selection.kept)
        for name in rows
    )


def plan_tensors(
    findings: Findings,
    sources: Sources,
    vocabulary: Vocabulary | None,
    selection: Selection,
    owners: Mapping[str, Sequence[str]] | None = None,
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the result; every tensor of every source is in one of them, or a problem.

    Args:
        owners: by tensor, in order, the sources that it is made of; by default all of them. One
            that has a single source is copied.
    """
    entries = {source: dict(c.entries) for source, c in sources.checkpoints.items()}
    reference = sources.reference
    names = list(dict.fromkeys([*entries[reference], *(n for e in entries.values() for n in e)]))
    names = names if owners is None else list(owners)
    _check_selection(findings, selection, names, sources)
    if findings.problems:
        return ()
    result: list[PlannedTensor] = []
    lacking: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if selection.dropped(name):
            continue
        wanted = tuple(entries) if owners is None else owners[name]
        stored = {source: entries[source][name] for source in wanted if name in entries[source]}
        owner = selection.owner(name)
        if owner is None and len(wanted) == 1 and owners is not None and not selection.scaled:
            owner = wanted[0]
        if owner is not None:
            planned = _copied(findings, name, owner, stored, sources, vocabulary, selection)
        elif missing := tuple(source for source in wanted if source not in stored):
            lacking.setdefault(missing, []).append(name)
            continue
        else:
            planned = _merged(findings, name, stored, sources, vocabulary, selection)
        if planned is not None:
            result.append(planned)
    _report_lacking(findings, sources, lacking)
    if not result and not findings.problems:
        findings.problem("drop leaves no tensor")
    _note_dtypes(findings, result, selection)
    if not findings.problems:
        _check_agreement(findings, result, reference)
    return tuple(result)


def without_tied_copies(findings: Findings, sources: Sources) -> Sources:
    """Every source with its tensors, tied ones once.

    A head that its config ties to the embeddings is no tensor of its own, and neither are the
    embeddings of an encoder beside those that it shares with its decoder.
    """
    result = {}
    for source, checkpoint in sources.checkpoints.items():
        entries = dict(checkpoint.entries)
        result[source] = replace(checkpoint, entries=entries)
        size = vocabulary_size(checkpoint.config)
        if not (size and ties_embeddings(checkpoint.config)):
            continue
        rows = [e for e in entries.values() if len(e.shape) == 2 and e.shape[0] == size]
        embeddings = [e for e in rows if is_embedding(e.name)]
        for head in (e for e in rows if is_head(e.name) or _is_shared(e.name, entries)):
            others = [e for e in embeddings if e is not head]
            alike = [e for e in others if (e.shape, e.dtype) == (head.shape, head.dtype)]
            tied = next((e for e in alike if _same_bytes(head, e)), None)
            if tied is not None:
                del entries[head.name]
                findings.note(
                    f"{source!r} stores {head.name} beside {tied.name}, tied: stored once"
                )
            elif others:
                findings.problem(
                    f"tied weights untied: config.json of {source!r} ties its embeddings, but "
                    f"{head.name} and {others[0].name} differ; save it with "
                    "tie_word_embeddings=false or tie them"
                )
    return Sources(result)


def _is_shared(name: str, entries: Mapping[str, Entry]) -> bool:
    """True for embeddings of an encoder or decoder beside `shared` ones."""
    prefix, _, rest = name.rpartition("coder.embed_tokens.")
    return bool(prefix) and f"{prefix.rpartition('.')[0]}.shared.{rest}".lstrip(".") in entries


def _same_bytes(a: Entry, b: Entry) -> bool:
    files = [open_file(entry.file) for entry in (a, b)]
    pieces = [bytearray(min(a.num_bytes, BLOCK_BYTES)) for _ in files]
    try:
        for offset in range(0, a.num_bytes, BLOCK_BYTES):
            views = [memoryview(piece)[: a.num_bytes - offset] for piece in pieces]
            for file, entry, view in zip(files, (a, b), views, strict=True):
                file.read_into(view, entry.start + offset)
            if views[0] != views[1]:
                return False
    finally:
        for file in files:
            file.close()
    return True


def _report_lacking(
    findings: Findings,
    sources: Sources,
    lacking: Mapping[tuple[str, ...], Sequence[str]],
) -> None:
    """Tensors that some sources lack, or one model's under names that nothing relates."""
    entries = {source: checkpoint.entries for source, checkpoint in sources.checkpoints.items()}
    reference = sources.checkpoints[sources.reference]
    for missing, absent in lacking.items():
        holders = [source for source in entries if source not in missing]
        others = [names for other, names in lacking.items() if set(other) == set(holders)]
        if others and _shapes(entries[holders[0]], absent) == _shapes(
            entries[missing[0]], others[0]
        ):
            if holders[0] == next(iter(entries)):
                findings.problem(
                    f"{len(absent)} tensors have other names in {few(missing)} ({others[0][0]!r}) "
                    f"than in {few(holders)} ({absent[0]!r}) and the same shapes: one architecture "
                    "as two versions of a library save it; load and save all with one version, or "
                    "say which prefixes change, names={'old.': 'new.'}"
                )
            continue
        keep = f"copy={{{absent[0]!r}: {holders[0]!r}}}"
        if holders == [sources.reference] and (groups := covering(absent, reference)):
            keep = f"kept={groups}"
        findings.problem(
            f"{len(absent)} tensor{'s' * (len(absent) > 1)} missing in {few(missing)} that "
            f"{few(holders)} {'has' if len(holders) == 1 else 'have'}: {few(absent)}; are these "
            f"one architecture? To keep them as they are say {keep}, "
            f"to leave them out drop=[{absent[0]!r}] (patterns work)"
        )


def _shapes(entries: Mapping[str, Entry], names: Sequence[str]) -> list[tuple[int, ...]]:
    return sorted(entries[name].shape for name in names)


def _check_agreement(findings: Findings, tensors: Sequence[PlannedTensor], reference: str) -> None:
    """Tensors that cannot be merged hold the same bytes in all sources."""
    differing = {
        t.name: source
        for t in tensors
        if t.how == "agree"
        for source, entry in zip(t.sources[1:], t.inputs[1:], strict=True)
        if not _same_bytes(t.inputs[0], entry)
    }
    if not differing:
        return
    name, source = next(iter(differing.items()))
    tensor = next(t for t in tensors if t.name == name)
    patterns = dict.fromkeys(_pattern(n, tensors) for n in differing)
    more = f", {len(differing) - 1} more such tensors too" if len(differing) > 1 else ""
    findings.problem(
        f"{name} is {tensor.dtype} and differs between {tensor.sources[0]!r} and {source!r}{more}; "
        f"say whose to take: copy={dict.fromkeys(patterns, reference)}"
    )


def _pattern(name: str, tensors: Sequence[PlannedTensor]) -> str:
    """A pattern for the tensors of every layer that are called so, if it hits no merged ones."""
    pattern = f"*{name.rpartition('.')[2]}"
    hit = [t for t in tensors if fnmatchcase(t.name, pattern)]
    return pattern if len(hit) > 1 and all(t.how == "agree" for t in hit) else name


def _note_dtypes(
    findings: Findings, tensors: Sequence[PlannedTensor], selection: Selection
) -> None:
    """Say once that sources of several dtypes become one of one dtype."""
    mixed = [t for t in tensors if t.how == "merge" and len({e.dtype for e in t.inputs}) > 1]
    if not mixed:
        return
    dtypes: dict[str, set[str]] = {}
    for tensor in mixed:
        for source, entry in zip(tensor.sources, tensor.inputs, strict=True):
            dtypes.setdefault(source, set()).add(entry.dtype)
    each = ", ".join(f"{source!r} {'/'.join(sorted(of))}" for source, of in dtypes.items())
    whose = "asked for" if selection.dtype else f"that of {selection.reference!r}"
    findings.note(
        f"dtypes of {len(mixed)} tensor{'s' * (len(mixed) > 1)} differ: {each}; the result is "
        f"{'/'.join(sorted({t.dtype for t in mixed}))}, {whose}"
    )


def _check_selection(
    findings: Findings, selection: Selection, names: Sequence[str], sources: Sources
) -> None:
    """Every pattern matches a tensor, every source that is copied from exists."""
    for what, patterns in (("copy", selection.copy), ("drop", selection.drop)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                findings.problem(
                    f"{what} pattern {pattern!r} matches no tensor: "
                    f"{nearest_tensors(pattern, names)}"
                )
    for pattern, source in selection.copy.items():
        if source not in sources.checkpoints:
            findings.problem(
                f"copy[{pattern!r}]={source!r} is no source: {nearest(source, sources.checkpoints)}"
            )


def _copied(
    findings: Findings,
    name: str,
    owner: str,
    stored: Mapping[str, Entry],
    sources: Sources,
    vocabulary: Vocabulary | None,
    selection: Selection,
) -> PlannedTensor | None:
    """A tensor taken as it is from one source."""
    if owner not in stored:
        findings.problem(f"copy says {name!r} comes from {owner!r}, which lacks it")
        return None
    entry = stored[owner]
    if vocabulary is not None and has_row_per_token(name, {owner: entry}, sources.configs):
        findings.problem(
            f"copy says {name!r} comes from {owner!r}, whose rows are not the common vocabulary's; "
            "merge it"
        )
    return PlannedTensor(name, selection.stored(entry), entry.shape, "copy", (owner,), (entry,))


def _merged(
    findings: Findings,
    name: str,
    stored: Mapping[str, Entry],
    sources: Sources,
    vocabulary: Vocabulary | None,
    selection: Selection,
) -> PlannedTensor | None:
    """A tensor that every source has."""
    main = next(source for source in (sources.reference, *stored) if source in stored)
    first = stored[main]
    mapped = vocabulary is not None and has_row_per_token(name, stored, sources.configs)
    shape = (vocabulary.size, *first.shape[1:]) if mapped and vocabulary else first.shape
    if len({e.shape[1:] if mapped else e.shape for e in stored.values()}) > 1:
        shapes = {source: list(entry.shape) for source, entry in stored.items()}
        findings.problem(
            f"shapes of {name!r} differ: {shapes}; align the widths first, or say "
            f"copy={{{name!r}: {sources.reference!r}}}"
        )
        return None
    dtypes = {source: entry.dtype for source, entry in stored.items()}
    mergeable = all(d in MERGEABLE for d in dtypes.values())
    if len(set(dtypes.values())) > 1 and not mergeable:
        findings.problem(f"dtypes of {name!r} differ: {dtypes}; save them alike")
        return None
    if any(d.startswith(("F8", "C64")) for d in dtypes.values()):
        findings.problem(
            f"{name!r} is {first.dtype}: quantised or complex weights cannot be merged; "
            "dequantise them first"
        )
        return None
    if mapped and not mergeable:
        findings.problem(
            f"{name!r} is {first.dtype} with a row for each token: vocabularies are matched in one "
            f"of {', '.join(MERGEABLE)}"
        )
        return None
    return PlannedTensor(
        name,
        selection.stored(first),
        shape,
        "merge" if mergeable else "agree",
        tuple(stored),
        tuple(stored.values()),
        mapped=mapped,
    )
