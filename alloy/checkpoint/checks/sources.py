"""The checkpoints that a merge reads, opened: headers and configs, no tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alloy.checkpoint.adapter.source import open_source
from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.format import Checkpoint

BASE = "base"
"""The name of the base among the sources."""


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
        """The sources that are merged: all but the base."""
        return [name for name in self.checkpoints if name != BASE]

    @property
    def modules(self) -> set[str]:
        """Folders of modules that any source has beside its transformer."""
        return {module for c in self.checkpoints.values() for module in c.modules}

    @cached_property
    def folders(self) -> dict[str, Path]:
        """Folders among the sources; a single file has neither config nor tokenizer."""
        return {name: c.path for name, c in self.checkpoints.items() if c.path.is_dir()}

    @cached_property
    def configs(self) -> dict[str, Mapping | None]:
        """Configs by source, the reference's first."""
        configs = {name: c.config for name, c in self.checkpoints.items()}
        return {self.reference: configs[self.reference], **configs}


def open_sources(
    findings: Findings, paths: Mapping[str, Path], allow: Sequence[str] = ()
) -> Sources:
    """Every checkpoint that can be opened; a problem for each that cannot."""
    opened = {name: findings.attempt(open_source, path, allow) for name, path in paths.items()}
    for checkpoint in opened.values():
        for note in () if checkpoint is None else checkpoint.notes:
            findings.note(note)
    return Sources({name: c for name, c in opened.items() if c is not None})
