"""Model cards: the README.md beside the weights of every model that a stage writes.

Whoever finds the folder learns from it what the model is, what it was made of and how, and how to
load it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tasks.reports import markdown

MODALITY = "ModalityModel"  # the one architecture that transformers does not bring
FOLDER = "this/folder"  # stands for wherever a model's folder is


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
    license: str | None = "apache-2.0"


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
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    lines = ["library_name: transformers", f"tags: [{', '.join(card.tags)}]"]
    if card.license is not None:
        lines.append(f"license: {card.license}")
    return "\n".join(["---", *lines, "---"])


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
