"""The model card and the record of a merge: sources, revisions, hashes, method, coefficients, command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alloy.checkpoint._format import Checkpoint
from alloy.checkpoint._hash import known_sha256, manifest, sha256
from alloy.checkpoint._plan import MergePlan


def record(
    plan: MergePlan, files: Mapping[str, str], *, hash_sources: bool, command: str | None
) -> dict[str, Any]:
    """Everything about a merge, as data."""
    rows = {t.coefficients: t.name for t in plan.tensors if t.coefficients}
    return {
        "method": plan.settings.name,
        "options": {
            key: list(v) if isinstance(v, tuple) else v for key, v in plan.settings.options.items()
        },
        "coefficients": (
            list(next(iter(rows)))
            if len(rows) == 1
            else {t.name: list(t.coefficients) for t in plan.tensors if t.coefficients}
        ),
        "settings": dict(plan.choices),
        "sources": {name: _source(source, hash_sources) for name, source in plan.sources.items()},
        "command": command,
        "num_tensors": len(plan.tensors),
        "num_bytes": plan.num_bytes,
        "notes": list(plan.notes),
        "files": dict(files),
    }


def model_card(plan: MergePlan, account: Mapping[str, Any]) -> str:
    """README.md of the result."""
    models = [name for name in plan.sources if name != plan.base]
    coefficients = account["coefficients"]
    if isinstance(coefficients, list):
        weights = "\n".join(f"- `{n}`: {c:.6g}" for n, c in zip(models, coefficients, strict=True))
    else:
        weights = "by tensor, see `alloy_merge.json`" if coefficients else "none"
    options = "\n".join(
        f"- {k}: `{v}`" for k, v in (account["options"] | account["settings"]).items()
    )
    sources = "\n".join(
        f"| {name} | `{s['source']}` | {s['revision'] or 'unknown'} | {_hashes(s['files'])} |"
        for name, s in account["sources"].items()
    )
    written = "\n".join(f"| {name} | `{digest}` |" for name, digest in account["files"].items())
    notes = "\n".join(f"- {note}" for note in account["notes"])
    return f"""---
library_name: transformers
tags: [merge, alloy]
---
# {plan.output.name}

{" + ".join(models)} merged by `{account["method"]}`{f" on the base `{plan.base}`" if plan.base else ""}.

## Sources
| name | source | revision | SHA-256 |
|---|---|---|---|
{sources}

## Coefficients
{weights}

## Settings
{options or "none"}
{f"{chr(10)}## Notes{chr(10)}{notes}{chr(10)}" if notes else ""}
## Command
```
{account["command"] or "alloy.merge_checkpoints"}
```

## Files
| file | SHA-256 |
|---|---|
{written}
"""


def _source(source: Checkpoint, hash_all: bool) -> dict[str, Any]:
    folder = source.path if source.path.is_dir() else source.path.parent
    told = manifest(folder)
    return {
        "source": told.get("source") or source.path.name,
        "revision": told.get("revision"),
        "files": {
            file.name: known_sha256(file) or _fingerprint(file, hash_all) for file in source.files
        },
    }


def _fingerprint(file: Path, hash_it: bool) -> str | int:
    """The hash if asked for, else the size: hashing costs more than a merge."""
    return sha256(file) if hash_it else file.stat().st_size


def _hashes(files: Mapping[str, str | int]) -> str:
    return "<br>".join(
        f"{name} `{value}`" if isinstance(value, str) else f"{name} ({value:,} bytes, not hashed)"
        for name, value in files.items()
    )
