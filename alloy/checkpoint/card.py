"""The card and the record of a merge: sources, revisions, hashes, method, coefficients, command.

Text that came from files or arguments is escaped: a card is a page.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alloy.checkpoint.format import Checkpoint
from alloy.checkpoint.hash import Origin, origin_of, sha256
from alloy.checkpoint.licence import (
    front_matter,
    licence_of,
    repositories,
    strictest,
    unclear,
)
from alloy.checkpoint.plan import MergePlan
from alloy.checkpoint.ranges.files import size_of
from alloy.merging.values import plain

Origins = Mapping[str, Sequence[tuple[Path, Origin]]]
"""By source its folder with its origin, then its adapter's."""

HERE = "."
"""The folder of a card, as its snippet has it; `alloy push` writes the hub's name there."""


def origins_of(plan: MergePlan, *, trust_manifests: bool) -> Origins:
    """The origin of each source, looked up before anything is written."""
    return {
        name: [
            (place, origin_of(place, _files_in(place, source), trust_manifest=trust_manifests))
            for place in (source.path, source.adapter)
            if place is not None
        ]
        for name, source in plan.sources.items()
    }


def record(
    plan: MergePlan,
    files: Mapping[str, str],
    origins: Origins,
    *,
    hash_sources: bool,
    command: str | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The record of a merge, as data."""
    rows = {t.coefficients: t.name for t in plan.tensors if t.coefficients}
    return {
        "method": plan.settings.name,
        "options": {key: plain(value) for key, value in plan.settings.options.items()},
        "coefficients": (
            list(next(iter(rows)))
            if len(rows) == 1
            else {t.name: list(t.coefficients) for t in plan.tensors if t.coefficients}
        ),
        "settings": dict(plan.choices),
        "sources": _sources(plan, origins, hash_sources),
        "command": command,
        "num_tensors": len(plan.tensors),
        "num_bytes": plan.num_bytes,
        "notes": list(notes),
        "files": dict(files),
    }


def licences_of(plan: MergePlan) -> dict[str, str | None]:
    """The licence that each source's own files name; an adapter has one beside its base's."""
    found = {}
    for name, source in plan.sources.items():
        for place in (source.path, source.adapter):
            if place is not None:
                folder = place if place.is_dir() else place.parent
                found[name if place == source.path else f"{name}, its adapter"] = licence_of(folder)
    return found


def architecture_of(plan: MergePlan) -> str | None:
    """The class that the result's config names; None where it names none of transformers' form."""
    content = plan.files.get("config.json")
    names = json.loads(content).get("architectures") if isinstance(content, bytes) else None
    name = names[0] if isinstance(names, list) and names else None
    return name if isinstance(name, str) and name.isidentifier() else None


def load_snippet(architecture: str | None) -> str:
    """Python that loads the model from the folder in which the card lies."""
    if architecture is None:
        return ""
    code = f"from transformers import {architecture}\n\n"
    return _block(f'{code}model = {architecture}.from_pretrained("{HERE}")', "python")


def model_card(plan: MergePlan, account: Mapping[str, Any], origins: Origins, title: str) -> str:
    """README.md of the result, with the metadata that model hubs read."""
    models = [name for name in plan.sources if name != plan.base]
    coefficients = account["coefficients"]
    if isinstance(coefficients, list):
        weights = "\n".join(
            f"- {_code(n)}: {c:.6g}" for n, c in zip(models, coefficients, strict=True)
        )
    else:
        weights = "by tensor, see `alloy_merge.json`" if coefficients else "none"
    options = "\n".join(
        f"- {k}: {_code(v)}" for k, v in (account["options"] | account["settings"]).items()
    )
    sources = "\n".join(
        f"| {_text(name)} | {_code(s['source'])} | {_text(s['revision'] or 'unknown')} "
        f"| {_hashes(s['files'])} |"
        for name, s in account["sources"].items()
    )
    base = f" on the base `{plan.base}`" if plan.base else ""
    written = "\n".join(
        f"| {_text(name)} | `{digest}` |" for name, digest in account["files"].items()
    )
    notes = "\n".join(f"- {_text(note)}" for note in account["notes"])
    licences = licences_of(plan)
    licence = strictest(licences)
    heading = front_matter(
        licence=licence,
        base_models=repositories(
            [origin.source for name in plan.sources for _, origin in origins[name]]
        ),
        tags=("merge", "alloy", account["method"]),
    )
    snippet = load_snippet(architecture_of(plan))
    return f"""{heading}
# {_text(title)}

{_text(" + ".join(models))} merged by `{account["method"]}`{base}.
{f"{chr(10)}## Load it{chr(10)}{snippet}{chr(10)}" if snippet else ""}
{"" if licence else f"## Licence{chr(10)}{_text(unclear(licences))}{chr(10)}{chr(10)}"}## Sources
| name | source | revision | SHA-256 |
|---|---|---|---|
{sources}

## Coefficients
{weights}

## Settings
{options or "none"}
{f"{chr(10)}## Notes{chr(10)}{notes}{chr(10)}" if notes else ""}
## Command
{_block(account["command"] or "alloy.merge_checkpoints")}

## Files
| file | SHA-256 |
|---|---|
{written}
"""


def _sources(plan: MergePlan, origins: Origins, hash_all: bool) -> dict[str, dict[str, Any]]:
    """The origin of each source, and its files' hashes: known ones, the others on demand.

    Hashing three sources takes longer than merging them; without it the record has the sizes.
    """
    known = {
        file: origin.hashes.get(_within(place, file))
        for name, source in plan.sources.items()
        for place, origin in origins[name]
        for file in _files_in(place, source)
    }
    if hash_all:
        unknown = [file for file, digest in known.items() if digest is None]
        with ThreadPoolExecutor() as pool:
            known |= dict(zip(unknown, pool.map(sha256, unknown), strict=True))
    return {
        name: {
            "source": " + ".join(origin.source for _, origin in origins[name]),
            "revision": " + ".join(
                str(origin.revision) for _, origin in origins[name] if origin.revision is not None
            )
            or None,
            "files": {
                _within(place, file): known[file] or size_of(file)
                for place, _ in origins[name]
                for file in _files_in(place, source)
            },
        }
        for name, source in plan.sources.items()
    }


def _files_in(place: Path, source: Checkpoint) -> list[Path]:
    """The files of a source that lie in its folder, or in its adapter's."""
    if source.adapter is None:
        return source.files
    own = {entry.file for entry in source.entries.values()}
    return [file for file in source.files if (file in own) == (place == source.path)]


def _within(source: Path, file: Path) -> str:
    """A file's name within its checkpoint."""
    return file.relative_to(source).as_posix() if file != source else file.name


def _hashes(files: Mapping[str, str | int]) -> str:
    return "<br>".join(
        f"{_text(name)} `{value}`"
        if isinstance(value, str)
        else f"{_text(name)} ({value:,} bytes, not hashed)"
        for name, value in files.items()
    )


def _text(value: object) -> str:
    """Text within a line of Markdown: no tag, no cell, no link, no code, no new line."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = html.escape(line, quote=False).replace("`", "'")
    return re.sub(r"([\\|\[\]*_])", r"\\\1", line)


def _code(value: object) -> str:
    """Text as inline code within a table or a list."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return f"`{line.replace('`', chr(39)).replace('|', '¦')}`"


def _block(text: str, language: str = "") -> str:
    """A block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
