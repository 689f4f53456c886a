"""The checkpoints that a merge reads, opened: headers and configs, no tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.format import Checkpoint, open_checkpoint
from alloy.errors import MergeError

BASE = "base"
"""The name of the base among the sources."""

Paths = Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True)
class Sources:
    """Checkpoints by name, the base first if there is one."""

    checkpoints: Mapping[str, Checkpoint]

    @cached_property
    def reference(self) -> str:
        """The first source, whose names, order, sharding and config are the result's."""
        return next(name for name in self.checkpoints if name != BASE)

    @property
    def has_base(self) -> bool:
        return BASE in self.checkpoints

    @property
    def models(self) -> list[str]:
        """What is merged: all but the base."""
        return [name for name in self.checkpoints if name != BASE]

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Those that are folders; a single file has neither config nor tokenizer."""
        return {name: c.path for name, c in self.checkpoints.items() if c.path.is_dir()}

    @cached_property
    def configs(self) -> dict[str, Mapping | None]:
        """By source, the reference's first."""
        configs = {name: c.config for name, c in self.checkpoints.items()}
        return {self.reference: configs[self.reference], **configs}


def named_paths(sources: Paths, base: str | Path | None) -> dict[str, Path]:
    """The sources by name: as given, or after their folders (`#2` and so on where those repeat)."""
    if isinstance(sources, str | Path):
        raise MergeError("give several sources, as a list of paths or a mapping from name to path")
    if not sources:
        raise MergeError("no source: give at least one checkpoint")
    named: dict[str, Path] = {} if base is None else {BASE: Path(base)}
    if isinstance(sources, Mapping):
        if BASE in sources:
            raise MergeError(
                f"a source is called {BASE!r}, which means the base; give it another name"
            )
        return named | {name: Path(path) for name, path in sources.items()}
    repeated: dict[str, Path] = {}
    for path in map(Path, sources):
        stem = path.stem if path.suffix == ".safetensors" else path.name
        count = sum(name == stem or name.startswith(f"{stem}#") for name in repeated)
        repeated[f"{stem}#{count + 1}" if count or stem == BASE else stem] = path
    return named | repeated


def open_sources(findings: Findings, paths: Mapping[str, Path]) -> Sources:
    """Every checkpoint that can be opened; a problem for each that cannot."""
    opened = {name: findings.attempt(open_checkpoint, path) for name, path in paths.items()}
    return Sources({name: c for name, c in opened.items() if c is not None})
