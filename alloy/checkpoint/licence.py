"""The licence of a merge: the strictest of its parents', or none where that takes a lawyer.

A checkpoint says its licence in the front matter of its README.md, as model hubs have it, or by a
LICENSE file whose text is known. Only licences of one chain are compared: what is not known, says
terms of its own (llama3, gemma, other) or binds in two directions is not guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

PERMISSIVE = (
    "cc0-1.0", "unlicense", "wtfpl", "isc", "mit", "bsd", "bsd-2-clause", "bsd-3-clause",
    "apache-2.0",
)  # fmt: skip
CHAINS: Sequence[Sequence[str]] = (
    (*PERMISSIVE, "lgpl-3.0", "gpl-3.0", "agpl-3.0"),
    (*PERMISSIVE, "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    (*PERMISSIVE, "cc-by-4.0", "cc-by-sa-4.0"),
)
"""From the freest to the strictest: each keeps the conditions of those before it."""

TEXTS: Sequence[tuple[str, str]] = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3", "agpl-3.0"),
    (r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3", "lgpl-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"\AMIT License\b", "mit"),
    (r"\ABSD 3-Clause License\b", "bsd-3-clause"),
)
"""How the text of a licence begins."""

OTHER = "other/"  # before the name of a licence that the hub does not list
HEAD_BYTES = 2000  # of a LICENSE file
CARD_BYTES = 1 << 20
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_FIELD = re.compile(r"^(license|license_name):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def licence_of(folder: Path) -> str | None:
    """The licence that a checkpoint's own files name, in the hub's spelling; None: they do not."""
    card = folder / "README.md"
    if card.is_file() and (front := _FRONT.match(_head(card, CARD_BYTES))):
        fields = {key: value.strip("'\"").lower() for key, value in _FIELD.findall(front[1])}
        name = fields.get("license")
        if name == "other":
            own = fields.get("license_name", "")
            return f"{OTHER}{own}" if re.fullmatch(r"[\w.-]+", own) else None
        if name is not None:
            return name if re.fullmatch(r"[\w.-]+", name) else None
    files = sorted(folder.glob("LICENSE*")) if folder.is_dir() else []
    for file in filter(Path.is_file, files):  # a pipe of that name would be waited for
        head = _head(file, HEAD_BYTES).strip()
        return next((name for text, name in TEXTS if re.search(text, head)), None)
    return None


def _head(file: Path, num_bytes: int) -> str:
    with file.open("rb") as opened:
        return opened.read(num_bytes).decode(errors="replace")


def strictest(licences: Mapping[str, str | None]) -> str | None:
    """The licence under which what was made of all parents may be given on; None: not clear."""
    names = {*licences.values()}
    if any("-nd" in str(name) for name in names):
        return None  # no derivatives: a merge is one
    if len(names) == 1:
        return names.pop()
    for chain in CHAINS:
        if names <= {*chain}:
            return max((str(name) for name in names), key=chain.index)
    return None


def unclear(licences: Mapping[str, str | None]) -> str:
    """The sentence that says why no licence is stated."""
    parents = ", ".join(f"{name}: {licence or 'says none'}" for name, licence in licences.items())
    return (
        f"No licence is stated, for the parents' do not settle it ({parents}). Whoever publishes "
        "this model has to find out which terms hold."
    )


def repositories(sources: Sequence[str]) -> list[str]:
    """The names on the hub of sources such as `hf://org/name@main`, those that have one."""
    names = [re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)(?:@.+)?", source) for source in sources]
    return list(dict.fromkeys(match[1] for match in names if match))


def front_matter(
    *,
    library: str = "transformers",
    licence: str | None,
    base_models: Sequence[str] = (),
    relation: str | None = "merge",
    tags: Sequence[str],
) -> str:
    """The metadata that model hubs read, at the head of a card."""
    lines = [f"library_name: {library}"]
    if licence is not None:
        named = licence.startswith(OTHER)
        lines.append(f"license: {'other' if named else licence}")
        lines += [f"license_name: {licence.removeprefix(OTHER)}"] if named else []
    if base_models:
        lines.append(f"base_model: {json.dumps([*base_models])}")
        lines += [f"base_model_relation: {relation}"] if relation else []
    return "\n".join(["---", *lines, f"tags: [{', '.join(tags)}]", "---"])
