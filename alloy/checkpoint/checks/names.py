"""Sources under one set of names: the first one's, which are the result's.

A language model is a part of a vision-language model under another prefix, and two versions of
transformers store one model under two sets of names. Prefixes are given or found; names of versions
are those that transformers itself renames as it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.rows import is_head
from alloy.checkpoint.checks.sources import Sources, open_sources
from alloy.checkpoint.checks.tensors import without_tied_copies
from alloy.checkpoint.config import model_names, vocabulary_size
from alloy.checkpoint.format import Checkpoint
from alloy.checkpoint.names import find_renamings, renamed
from alloy.checkpoint.reading import few
from alloy.errors import MergeError, nearest

EVERY = "*"
"""In place of a source: every source but the first that has names which the first lacks."""


def common_names(
    findings: Findings,
    sources: Sources,
    given: Mapping[str, Mapping[str, str]],
    spared: Sequence[str] = (),
) -> Sources:
    """The sources with the reference's names, as far as there is one way to give them.

    Args:
        given: by source or for `EVERY`, changes of prefix that are not to be found.
        spared: patterns of names that need no place: they are left out or copied.
    """
    reference = sources.checkpoints[sources.reference]
    for source, prefixes in given.items():
        of = sources.checkpoints.values() if source == EVERY else [sources.checkpoints[source]]
        _refuse_idle(findings, prefixes, [n for checkpoint in of for n in checkpoint.entries])
    result = {}
    for source, checkpoint in sources.checkpoints.items():
        names: Mapping[str, str] = {}
        if source in given:
            names = {n: renamed(n, given[source]) for n in checkpoint.entries}
        elif any(n not in reference.entries for n in checkpoint.entries):
            if EVERY in given:
                names = {n: renamed(n, given[EVERY]) for n in checkpoint.entries}
            else:
                names = _found(findings, source, checkpoint, reference, spared)
        entries = {
            names.get(n, n): entry._replace(name=names.get(n, n))
            for n, entry in checkpoint.entries.items()
        }
        if len(entries) < len(checkpoint.entries):
            findings.problem(
                f"names={dict(given.get(source) or given[EVERY])} gives two tensors of {source!r} "
                "one name; give a longer prefix for one of them"
            )
        result[source] = replace(checkpoint, entries=entries) if names else checkpoint
    return Sources(result)


def open_members(
    paths: Mapping[str, str | Path],
    names: Mapping[str, str] | Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Checkpoint]:
    """Checkpoints, each tensor under the name that the first one gives it.

    Args:
        names: changes of prefix as `merge_checkpoints` takes them; without, they are found.

    Raises:
        MergeError: one that cannot be opened, or names that several changes of prefix would give.
    """
    findings = Findings()
    opened = open_sources(findings, {name: Path(path) for name, path in paths.items()})
    findings.stop()
    given = changes_by_source(names or {}, list(paths))
    members = common_names(findings, without_tied_copies(findings, opened), given).checkpoints
    findings.stop()
    return dict(members)


def changes_by_source(value: object, sources: Sequence[str]) -> dict[str, dict[str, str]]:
    """Changes of prefix by source: given so, or once for `EVERY` other."""
    if not isinstance(value, Mapping):
        raise MergeError(f"names={value!r:.80}: give a mapping, names={{'old.': 'new.'}}")
    if not any(isinstance(prefixes, Mapping) for prefixes in value.values()):
        return {EVERY: _prefixes(value)} if value else {}
    for source in value:
        if source not in sources:
            raise MergeError(f"names={source!r}: {nearest(str(source), sources)}")
        if source == sources[0]:
            raise MergeError(
                f"names of {source!r}: it is the first source, whose names the result has; "
                "change those of the others"
            )
    return {str(source): _prefixes(prefixes) for source, prefixes in value.items()}


def _prefixes(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(
        isinstance(prefix, str) for pair in value.items() for prefix in pair
    ):
        raise MergeError(f"names={value!r:.80}: give prefixes, names={{'old.': 'new.'}}")
    return {str(old): str(new) for old, new in value.items()}


def _refuse_idle(findings: Findings, prefixes: Mapping[str, str], names: Sequence[str]) -> None:
    """A prefix that nothing begins with is a slip."""
    for old in prefixes:
        if not any(name.startswith(old) for name in names):
            known = {f"{name.partition('.')[0]}." for name in names}
            findings.problem(f"names: no tensor begins with {old!r}: {nearest(old, known)}")


def _found(
    findings: Findings,
    source: str,
    checkpoint: Checkpoint,
    reference: Checkpoint,
    spared: Sequence[str],
) -> Mapping[str, str]:
    """The reference's names of a source's tensors; empty where it has them or nothing is sure."""
    ours, theirs = reference.entries, checkpoint.entries
    names = [n for n in theirs if not any(fnmatchcase(n, pattern) for pattern in spared)]
    if all(name in ours for name in names):
        return {}
    rows = vocabulary_size(checkpoint.config), vocabulary_size(reference.config)

    def fits(name: str, target: str) -> bool:
        a, b = theirs[name].shape, ours[target].shape
        return a == b or (len(a) > 1 and a[1:] == b[1:] and (a[0], b[0]) == rows)

    found = find_renamings(names, ours, fits)
    if not found:  # a head that the first source ties to its embeddings has no place
        others = [n for n in names if not is_head(n)]
        found = find_renamings(others, ours, fits) if others else []
    if len(found) > 1:
        ways = [str(way.changes) for way in found]
        findings.problem(
            f"tensors of {source!r} have other names than the first source's, and "
            f"{len(found)} changes of prefix would place them: {few(ways, 2)}; say which: "
            f"names={found[0].changes}"
        )
    if len(found) == 1:
        changes = ", ".join(
            f"{old!r} becomes {new!r}" if old else f"{new!r} goes in front"
            for old, new in found[0].changes.items()
        )
        findings.note(f"names of {source!r} as the first source has them: {changes}")
        return found[0].names
    return {} if found else _of_versions(findings, source, checkpoint, reference)


def _of_versions(
    findings: Findings, source: str, checkpoint: Checkpoint, reference: Checkpoint
) -> dict[str, str]:
    """Names of one architecture as another version of transformers stores them."""
    configs = reference.config, checkpoint.config
    if not all(configs) or len({(c or {}).get("model_type") for c in configs}) > 1:
        return {}
    ours, theirs = (model_names(c.config, list(c.entries)) for c in (reference, checkpoint))
    stored = {own: name for name, own in ours.items()}
    if not theirs or len(stored) < len(ours) or not {*theirs.values()} <= stored.keys():
        return {}
    names = {name: stored[own] for name, own in theirs.items()}
    other = next(name for name, new in names.items() if name != new)
    findings.note(
        f"{source!r} has the names of another version of transformers: {other!r} is "
        f"{names[other]!r} in the first source"
    )
    return names
