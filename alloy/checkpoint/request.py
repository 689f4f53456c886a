"""The settings of a merge: one value that the API, the command line and recipes make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alloy.checkpoint.checks.findings import Findings
from alloy.checkpoint.checks.sources import Paths
from alloy.checkpoint.format import DTYPE_NAMES
from alloy.checkpoint.tokenizer import POLICIES
from alloy.errors import MergeError, nearest

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class MergeRequest:
    """The arguments of `merge_checkpoints`, which explains them, except how the work is done."""

    method: str
    sources: Paths
    output: str | Path
    base: str | Path | None = field(default=None, kw_only=True)
    coefficients: Sequence[float] | Mapping[str, Sequence[float]] | None = field(
        default=None, kw_only=True
    )
    statistics: Mapping[str, str | Path] | Sequence[str | Path] | None = field(
        default=None, kw_only=True
    )
    dtype: str | None = field(default=None, kw_only=True)
    shard_bytes: int | str | None = field(default=None, kw_only=True)
    tokenizer: str = field(default="same", kw_only=True)
    copy: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    drop: Sequence[str] = field(default=(), kw_only=True)
    allow: Sequence[str] = field(default=(), kw_only=True)
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The method's settings, and what a method that runs the model is given to run."""

    def check(self, findings: Findings) -> None:
        """Every argument has one of its values."""
        if self.dtype is not None and self.dtype not in DTYPE_NAMES:
            findings.problem(f"dtype={self.dtype!r}: {nearest(str(self.dtype), DTYPE_NAMES)}")
        if self.tokenizer not in POLICIES:
            findings.problem(f"tokenizer={self.tokenizer!r}: {nearest(self.tokenizer, POLICIES)}")
        if self.shard_bytes is not None and num_bytes(self.shard_bytes) < 1:
            findings.problem(f"shard_bytes={self.shard_bytes!r}: give a positive number of bytes")

    @property
    def choices(self) -> dict[str, Any]:
        """The settings that are not the defaults, for the record."""
        choices = {
            "dtype": self.dtype,
            "shard_bytes": None if self.shard_bytes is None else num_bytes(self.shard_bytes),
            "tokenizer": self.tokenizer,
            "copy": dict(self.copy),
            "drop": list(self.drop),
            "allow": list(self.allow),
        }
        return {k: v for k, v in choices.items() if v not in (None, "same", {}, [])}


def num_bytes(size: int | str) -> int:
    """A size as a number, or as people write it: `5GB`.

    Raises:
        MergeError: no number, or an unknown unit.
    """
    if isinstance(size, int):
        return size
    unit = next((unit for unit in _UNITS if size.endswith(unit)), "")
    try:
        return int(float(size.removesuffix(unit)) * _UNITS.get(unit, 1))
    except ValueError:
        raise MergeError(
            f"shard_bytes={size!r}: write a number and one of {', '.join(_UNITS)}"
        ) from None
