"""Places of a merge: sources and output apart, the output free, room on its disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from alloy.checkpoint.checks.findings import Findings

INCOMPLETE = ".incomplete"
"""Beside the output, where a merge keeps its work."""
_LONGEST_NAME = 255  # of every file system in use
_LONGEST_PATH = 4000  # Linux takes 4096, files within the folder included


def check_output(findings: Findings, paths: Mapping[str, Path], output: Path) -> None:
    """The output is absent or empty, and no source may be, hold or lie in what the merge writes."""
    longest = max(len(os.fsencode(part)) for part in (*output.parts, output.name + INCOMPLETE))
    whole = len(os.fsencode(output.absolute()))
    if longest > _LONGEST_NAME or whole > _LONGEST_PATH:
        findings.problem(
            f"{output.name[:60]}...: too long for a file system, which takes {_LONGEST_NAME} bytes "
            f"a name ({INCOMPLETE!r} included) and {_LONGEST_PATH} a path; choose a shorter one"
        )
        return
    if not output.name or output.name == "..":
        findings.problem(f"{output}: name the folder that the merge makes")
        return
    standing = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    if not standing.is_dir():
        findings.problem(f"{output}: {standing} is a file where a folder is due")
        return
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
