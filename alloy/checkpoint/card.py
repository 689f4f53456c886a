"""The card and the record of a merge: sources, revisions, hashes, method, coefficients, command."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alloy.checkpoint.hash import known_sha256, manifest, sha256
from alloy.checkpoint.plan import MergePlan


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
        "sources": _sources(plan, hash_sources),
        "command": command,
        "num_tensors": len(plan.tensors),
        "num_bytes": plan.num_bytes,
        "notes": list(plan.notes),
        "files": dict(files),
    }


def model_card(plan: MergePlan, account: Mapping[str, Any], title: str) -> str:
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
    base = f" on the base `{plan.base}`" if plan.base else ""
    written = "\n".join(f"| {name} | `{digest}` |" for name, digest in account["files"].items())
    notes = "\n".join(f"- {note}" for note in account["notes"])
    return f"""---
library_name: transformers
tags: [merge, alloy]
---
# {title}

{" + ".join(models)} merged by `{account["method"]}`{base}.

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


def _sources(plan: MergePlan, hash_all: bool) -> dict[str, dict[str, Any]]:
    """Where each source is from, and its files' hashes: known ones, the others on demand.

    Hashing three sources takes longer than merging them; without it the sizes are told.
    """
    known = {f: known_sha256(f) for source in plan.sources.values() for f in source.files}
    if hash_all:
        unknown = [file for file, digest in known.items() if digest is None]
        with ThreadPoolExecutor() as pool:
            known |= dict(zip(unknown, pool.map(sha256, unknown), strict=True))
    result = {}
    for name, source in plan.sources.items():
        told = manifest(source.path if source.path.is_dir() else source.path.parent)
        told = told or _hub_snapshot(source.path)
        result[name] = {
            "source": told.get("source") or source.path.name,
            "revision": told.get("revision"),
            "files": {file.name: known[file] or file.stat().st_size for file in source.files},
        }
    return result


def _hub_snapshot(folder: Path) -> dict[str, str]:
    """Source and revision of a folder `models--org--name/snapshots/<commit>` of the hub's cache."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return {}
    name = repository.removeprefix("models--").replace("--", "/")
    return {"source": f"hf://{name}", "revision": folder.name}


def _hashes(files: Mapping[str, str | int]) -> str:
    return "<br>".join(
        f"{name} `{value}`" if isinstance(value, str) else f"{name} ({value:,} bytes, not hashed)"
        for name, value in files.items()
    )
