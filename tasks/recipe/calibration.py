"""Sections of `prepare`, for recipes of kind "models": calibration data and benchmarks."""

from typing import Any

from pydantic import Field, model_validator

from tasks.recipe.section import Name, Section


class ModelsCalibration(Section):
    """Examples without labels from exactly one source, as the models' own processors make them."""

    images: str | None = None  # a folder of pictures
    texts: str | None = None  # a folder of *.txt files, or one file
    dataset: str | None = None  # of the package `datasets`, on disk; or a .parquet, .csv, .jsonl
    writer: str | None = None  # a key of tasks.data.classification.WRITERS
    examples: int = Field(ge=2)
    held_out: int = Field(default=0, ge=0)  # further ones that no merge sees: arms are judged on
    tokens: int | None = Field(default=None, gt=1)  # of each text
    column: str | None = (
        None  # of a dataset: texts or images; without one: its columns are model inputs
    )
    captions: str | None = None  # of a dataset: the texts beside the images of `column`
    options: dict[str, Any] = Field(default={})  # of a writer

    @property
    def num_examples(self) -> int:
        """All that the source gives: the calibration examples, and those held out."""
        return self.examples + self.held_out

    @model_validator(mode="after")
    def _has_one_source(self) -> "ModelsCalibration":
        sources = ("images", "texts", "dataset", "writer")
        given = [name for name in sources if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(sources)}; found {given or 'none'}")
        for key, owners in {
            "tokens": ("texts", "dataset"),
            "column": ("dataset",),
            "captions": ("dataset",),
            "options": ("writer",),
        }.items():
            if getattr(self, key) and given[0] not in owners:
                raise ValueError(f"{key!r} is of {' or '.join(owners)}, not of {given[0]!r}")
        if self.texts is not None and self.tokens is None:
            raise ValueError("texts need `tokens`, the length of an example")
        return self


class ModelsBenchmark(Section):
    """Examples with labels, from a writer."""

    writer: str  # a key of tasks.data.classification.WRITERS
    options: dict[str, Any] = Field(default={})


class ModelsPrepareParams(Section):
    """The calibration data and the benchmarks of a recipe of kind "models"."""

    seed: int
    calibration: dict[Name, ModelsCalibration] = Field(min_length=1)
    benchmarks: dict[Name, ModelsBenchmark] = Field(default={})
