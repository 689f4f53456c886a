"""Sections of both families of recipes: fetch, register, ship; and the gates of promotion."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from tasks.recipe.section import Name, Section


class CheckpointParams(Section):
    """The source of a checkpoint, with conditions; a plain string is a source without any."""

    source: str  # see `tasks/sources/place.py`
    revision: str | None = None  # the immutable revision that it must resolve to
    sha256: dict[str, str] = Field(default={})  # what the hash of a file must be

    @model_validator(mode="before")
    @classmethod
    def _from_a_source(cls, values: object) -> object:
        return {"source": values} if isinstance(values, str) else values


class FetchParams(Section):
    """The checkpoints that a recipe starts from."""

    model_type: str | None = None  # what each config.json must say; without one: anything
    checkpoints: dict[Name, CheckpointParams] = Field(min_length=1)


class RegisterParams(Section):
    """The name under which results are registered, and the model that is the result."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
    model: Literal["finetuned", "merged"]


class ShipParams(Section):
    """Target to which the result is shipped."""

    target: Annotated[str, StringConstraints(pattern=r"^s3://[^/@:]+/.+$")]
    model: Literal["finetuned", "merged"]


class Gates(Section):
    """The scores, of one model on one split, by which a challenger becomes the champion."""

    split: str
    model: str  # its name in metrics.json
    benchmarks: dict[str, str] = Field(min_length=1)  # benchmark: its metric; larger is better
    minimal_gain: float  # of the mean over the benchmarks, in its standard errors
    maximal_regression: float = Field(
        ge=0
    )  # of any benchmark, in standard errors of the difference


class PromoteParams(Section):
    """`params/promote.yaml`: the gates of each recipe."""

    gates: dict[str, Gates]
