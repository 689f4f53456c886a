"""Model cards: the README.md beside the weights of every model that a stage writes.

Whoever finds the folder learns from it what the model is, what it was made of and how, and how to
load it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alloy.checkpoint.licence import (
    front_matter,
    licence_of,
    repositories,
    strictest,
    unclear,
)
from tasks.reports import markdown
from tasks.storage import read_json

MODALITY = "ModalityModel"  # the one architecture that transformers does not bring
FOLDER = "."  # the card's own; `alloy push` writes the hub's name there


@dataclass(frozen=True)
class Sources:
    """A table of what a model was made of: names and, word for word, where they came from."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model card; what is absent is left out."""

    title: str
    description: str  # Markdown, by the author of the card
    architecture: str  # the class that loads the model
    command: str  # that made it
    sources: Sources | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""  # Markdown, at the end
    folder: str = FOLDER
    tags: Sequence[str] = ("merge", "alloy")
    licences: Mapping[str, str | None]  # of what it was made of, or its own; the strictest holds
    base_models: Sequence[str] = ()  # names on the hub


def own_licence() -> dict[str, str | None]:
    """Of models that this project made from its own data."""
    return {"this project": "apache-2.0"}


def parents(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The licences and the names on the hub of fetched checkpoints, as a card takes them."""
    sources = []
    for folder in folders.values():
        manifest = folder / "manifest.json"
        sources.append(str(read_json(manifest)["source"]) if manifest.is_file() else "")
    licences = {name: licence_of(folder) for name, folder in folders.items()}
    return {"licences": licences, "base_models": repositories(sources)}


def render(card: Card) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    parts = [
        _front_matter(card),
        f"# {plain(card.title)}",
        card.description,
        "## Load it",
        f"```python\n{load_snippet(card.architecture, card.folder)}\n```",
        "## How it was made",
        f"By {code(card.command)}.",
    ]
    if card.sources is not None:
        names_and_origins = [[plain(row[0]), *map(code, row[1:])] for row in card.sources.rows]
        header = card.sources.header
        parts.append(markdown.table(header, names_and_origins, num_names=len(header)))
    if card.settings:
        parts.append("\n".join(f"- {key}: {code(value)}" for key, value in card.settings.items()))
    if card.notes:
        parts.append(card.notes)
    if strictest(card.licences) is None:
        parts += ["## Licence", plain(unclear(card.licences))]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    return front_matter(
        licence=strictest(card.licences), base_models=card.base_models, tags=card.tags
    )


def load_snippet(architecture: str, folder: str = FOLDER) -> str:
    """Python that loads a model; only a modality transformer has to be made known first."""
    lines = [f"from transformers import {architecture}"]
    if architecture == MODALITY:
        lines = ["import alloy.modality  # makes the architecture known"]
        lines.append("from transformers import AutoModel")
        architecture = "AutoModel"
    return "\n".join([*lines, "", f'model = {architecture}.from_pretrained("{folder}")'])


def plain(text: str) -> str:
    """Text on one line that Markdown does not take for HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def code(value: Any) -> str:
    """A value word for word, on one line; its fence is longer than any run of backticks in it."""
    text = " ".join(str(value).split())
    runs = re.findall("`+", text)
    if not runs:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, runs)))
    return f"{fence} {text} {fence}"
