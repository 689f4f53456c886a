"""Modules of sentence-transformers beside the transformer: settings compared, weights merged.

`modules.json` names them; pooling has settings alone, a dense layer weights as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.sources import Sources
from alloy.checkpoint.format import MODULES
from alloy.checkpoint.reading import few, parse_json, read_json, source_file

_ROOT_SETTINGS = ("config_sentence_transformers.json", "sentence_bert_config.json")
_NO_MATTER = ("__version__",)


def common_modules(
    findings: Findings, sources: Sources, allow: Sequence[str]
) -> dict[str, Path | bytes]:
    """The files that the result needs for its modules; a problem where the sources' differ."""
    folders = {
        name: sources.folders[name]
        for name in sources.models
        if name in sources.folders and source_file(sources.folders[name], MODULES) is not None
    }
    if not folders:
        return {}
    (owner, first), *others = folders.items()
    lacking = [name for name in sources.models if name in sources.folders and name not in folders]
    if lacking:
        findings.note(f"{MODULES} is that of {owner!r}: {few(lacking)} has none")
    modules = sources.checkpoints[owner].modules
    for name, folder in others:
        _compare(findings, (owner, first), (name, folder), modules, allow)
    files = [MODULES, *_ROOT_SETTINGS, *(f"{module}/config.json" for module in modules)]
    found = {name: source_file(first, name) for name in files}
    return {name: path for name, path in found.items() if path is not None}


def _compare(
    findings: Findings,
    ours: tuple[str, Path],
    theirs: tuple[str, Path],
    modules: Sequence[str],
    allow: Sequence[str],
) -> None:
    """Equal modules in equal order, with equal settings."""
    (owner, first), (name, folder) = ours, theirs
    a, b = _steps(first), _steps(folder)
    if a != b and not _allowed(MODULES, allow):
        findings.problem(
            f"{MODULES} of {owner!r} and {name!r} differ: {a} and {b}; take models that pool "
            f"alike, or say allow=[{MODULES!r}]"
        )
        return
    for file in (*_ROOT_SETTINGS, *(f"{module}/config.json" for module in modules)):
        a, b = _settings(first, file), _settings(folder, file)
        keys = sorted(
            k for k in a.keys() | b.keys() if a.get(k) != b.get(k) and k not in _NO_MATTER
        )
        if keys and not _allowed(file, allow):
            said = ", ".join(f"{k} is {a.get(k)!r:.40} and {b.get(k)!r:.40}" for k in keys[:3])
            findings.problem(
                f"{file} of {owner!r} and {name!r} differ: {said}; take models that pool alike, or "
                f"say allow=[{file!r}] to take that of {owner!r}"
            )


def _steps(folder: Path) -> list[tuple[str, str]]:
    """Folder and kind of every module; the packages of a kind were renamed over time."""
    path = folder / MODULES
    return [
        (entry["path"], str(entry.get("type", "")).rpartition(".")[2])
        for entry in parse_json(path.read_bytes(), str(path), list)
    ]


def _settings(folder: Path, file: str) -> Mapping[str, Any]:
    path = source_file(folder, file)
    return {} if path is None else read_json(path)


def _allowed(name: str, allow: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in allow)
