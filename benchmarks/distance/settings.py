"""Settings of the study: one YAML file per sweep."""

from typing import Literal

from pydantic import Field

from tasks.recipe.section import Section


class SweptMerge(Section):
    """One merge of a sweep: the checkpoints that were merged, and the outcomes."""

    name: str
    checkpoints: list[str] = Field(min_length=2)
    base: str | None  # null: distances of weights; otherwise of task vectors
    outcomes: dict[str, float] = Field(min_length=1)


class DistanceParams(Section):
    """A sweep of merges whose distances are compared with their outcomes."""

    keep: float = Field(gt=0, le=1)  # the share of largest magnitudes that TSSD compares
    zeros: Literal["exclude", "agree"]
    truncation: Literal["tensor", "model"]
    merges: list[SweptMerge] = Field(min_length=2)


class PermutedSweepParams(Section):
    """A sweep of merges of experts whose units were reordered."""

    keep: float = Field(gt=0, le=1)
    zeros: Literal["exclude", "agree"]
    truncation: Literal["tensor", "model"]
    recipe: str  # of kind modality; fetched, prepared and collected
    arms: list[str] = Field(min_length=1)  # its arms that neither align nor have a base
    merges: int = Field(ge=2)  # of each arm, the share of reordered units from 0 to 1
    seed: int
