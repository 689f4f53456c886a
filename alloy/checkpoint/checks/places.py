"""Where a merge reads and writes: sources and output apart, the output free, room on its disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from alloy.checkpoint.checks.findings import Findings

INCOMPLETE = ".incomplete"
"""Beside the output, where a merge keeps its work."""


def check_output(findings: Findings, paths: Mapping[str, Path], output: Path) -> None:
    """The output is absent or empty, and no source may be, hold or lie in what the merge writes."""
    if output.is_symlink():
        findings.problem(f"{output} is a link; name the folder itself")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        findings.problem(f"{output} is not an empty folder; choose another output or remove it")
    _check_apart(findings, paths, output)


def _check_apart(findings: Findings, paths: Mapping[str, Path], output: Path) -> None:
    """No source may be, hold, or lie in what the merge writes, whatever links lead there."""
    unfinished = output.with_name(output.name + INCOMPLETE)
    for name, path in paths.items():
        source = path.resolve()
        for place in (output, unfinished):
            target = place.resolve()
            if target == source:
                findings.problem(
                    f"{place}, which the merge writes, is the source {name!r}; choose another "
                    "output"
                )
            elif target.is_relative_to(source):
                findings.problem(
                    f"{place} lies inside the source {name!r}; choose a folder outside it"
                )
            elif source.is_relative_to(target):
                findings.problem(
                    f"the source {name!r} lies inside {place}, which the merge writes; "
                    "choose another output"
                )


def check_room(findings: Findings, output: Path, num_bytes: int) -> None:
    """The disk of the output has room for the result."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        findings.problem(
            f"{folder} has {free:,} bytes free, the result needs {num_bytes:,}; make room"
        )
