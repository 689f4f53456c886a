"""Sections about prepared data sets: where each lies, and how its images and texts are read."""

from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.recipe.section import Section

RAW = "data/raw"


class SetParams(Section):
    """One data set on disk; `format` is a key of `tasks.data.archives.catalogue.FORMATS`."""

    format: str
    root: str | None = None  # its folder; by default the set's own below `raw`
    held_out: int = Field(default=1000, gt=0)  # images kept for splits that the authors do not give
    options: dict[str, Any] = Field(default={})  # of format columns
    image_size: int = Field(gt=0)  # side of the squares that models read
    text_length: int = Field(default=40, gt=1)  # tokens
    answers: int = Field(default=3129, gt=0)  # the commonest of training questions
    segment_cells: int = Field(default=1, gt=0)  # labels along a side of a patch
    rerank: int = Field(default=0, ge=0)  # candidates that the matching head scores again

    def folder(self, raw: str, name: str) -> Path:
        return Path(self.root) if self.root is not None else Path(raw) / name
