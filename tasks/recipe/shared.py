"""Sections of both families of recipes: fetch, register, ship; and the gates of promotion."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from alloy.errors import nearest
from tasks.recipe.section import Name, ParamsError, Section
from tasks.storage import read_json
from tasks.workspace import Workspace

BEST = "best"
"""As `merge.result`: the best of `merge.candidates` on held-out data."""


class CheckpointParams(Section):
    """The source of a checkpoint, with conditions; a plain string is a source without any.

    `adapter: SOURCE` with `base: NAME` is the checkpoint of that name with this adapter on it.
    """

    source: str  # see `tasks/sources/place.py`
    base: str | None = None  # the checkpoint of the recipe that `source`, an adapter, goes on
    revision: str | None = None  # the immutable revision that it must resolve to
    sha256: dict[str, str] = Field(default={})  # what the hash of a file must be

    @model_validator(mode="before")
    @classmethod
    def _from_a_source(cls, values: object) -> object:
        if isinstance(values, str):
            return {"source": values}
        if not isinstance(values, dict) or not {"adapter", "base"} & values.keys():
            return values
        if "source" in values or not {"adapter", "base"} <= values.keys():
            raise ValueError(
                "an adapter is {adapter: SOURCE, base: NAME}, its folder and the checkpoint of "
                "this recipe that it goes on; a checkpoint is {source: SOURCE}"
            )
        return {"source" if key == "adapter" else key: value for key, value in values.items()}


class FetchParams(Section):
    """The checkpoints that a recipe starts from."""

    model_type: str | None = None  # what each config.json must say; without one: anything
    checkpoints: dict[Name, CheckpointParams] = Field(min_length=1)

    @property
    def adapters(self) -> dict[str, str]:
        """The checkpoints that are adapters, by name, with the name of the base of each."""
        return {n: c.base for n, c in self.checkpoints.items() if c.base is not None}

    @model_validator(mode="after")
    def _bases_are_whole(self) -> "FetchParams":
        for name, base in self.adapters.items():
            whole = sorted(self.checkpoints.keys() - self.adapters.keys())
            if base not in whole:
                raise ValueError(f"checkpoints.{name}.base: {base!r}: {nearest(base, whole)}")
        return self

    def folder(self, name: str, checkpoints: Path) -> Path:
        """The source of a merge that a fetched checkpoint is: its folder, or `base+adapter`."""
        base = self.adapters.get(name)
        return (
            checkpoints / name
            if base is None
            else Path(f"{checkpoints / base}+{checkpoints / name}")
        )


class Candidates(Section):
    """The arms that `choose` compares on held-out data, from the simplest; none: no comparison.

    The simplest is the result unless another is better (`alloy.measures.choose_by_values`).
    """

    candidates: list[str] = Field(default=[])

    def check_candidates(self, where: str, named: str, arms: Collection[str]) -> None:
        """Raise ParamsError unless the result is an arm, or the best of several that are there.

        Args:
            where: the recipe's file.
            named: the result, as the recipe names it.
            arms: those that the result may be.
        """
        if BEST in arms:
            raise ParamsError(
                f"{where}: merge.arms: {BEST!r} is what `result` says to have the best of "
                "`candidates`: give the arm another name"
            )
        if named == BEST and not self.candidates:
            raise ParamsError(
                f"{where}: merge.result: {BEST!r}, of what? Name two or more arms in "
                "merge.candidates, from the simplest"
            )
        if named != BEST and named not in arms:
            raise ParamsError(f"{where}: merge.result: {named!r}: {nearest(named, [*arms, BEST])}")
        for name in self.candidates:
            if name not in arms:
                right = nearest(name, list(arms))
                raise ParamsError(f"{where}: merge.candidates: {name!r}: {right}")
        if len(self.candidates) == 1 or len({*self.candidates}) < len(self.candidates):
            raise ParamsError(
                f"{where}: merge.candidates: {self.candidates}: name two or more arms, each once"
            )


def chosen_arm(named: str, workspace: Workspace) -> str:
    """The arm that a recipe is about: the one that it names, or the one that `choose` found best.

    Raises:
        ParamsError: the recipe has the best of several, and `choose` has not run.
    """
    if named != BEST:
        return named
    if not workspace.choice.is_file():
        raise ParamsError(
            f"{workspace.choice} is missing, so no arm is the best yet: run "
            f"`dvc repro choose@{workspace.recipe}` first"
        )
    return read_json(workspace.choice)["arm"]


class ResultParams(Section):
    """The model that is the recipe's result."""

    model: Literal["finetuned", "merged"]

    def folder(self, workspace: Workspace) -> Path:
        """The folder of the model."""
        return workspace.result(self.model)


class RegisterParams(ResultParams):
    """The result, and the name under which it is registered."""

    name: Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]


class ShipParams(ResultParams):
    """Target to which the result is shipped."""

    target: Annotated[str, StringConstraints(pattern=r"^s3://[^/@:]+/.+$")]


class GateMetric(Section):
    """A metric of a benchmark, where its name alone does not say how to read it."""

    metric: str
    better: Literal["more", "less"] = "more"
    error: float | None = Field(default=None, gt=0)  # stands for a standard error nobody measures


class Gates(Section):
    """The scores, of one model on one split, by which a challenger becomes the champion."""

    split: str
    model: str  # its name in metrics.json
    benchmarks: dict[str, str | GateMetric] = Field(min_length=1)  # a string: more of it is better
    minimal_gain: float  # of the mean over the benchmarks, in its standard errors
    maximal_regression: float = Field(
        ge=0
    )  # of any benchmark, in standard errors of the difference

    @property
    def metrics(self) -> dict[str, GateMetric]:
        """The benchmarks with their metrics, all written out."""
        return {
            name: GateMetric(metric=metric) if isinstance(metric, str) else metric
            for name, metric in self.benchmarks.items()
        }


class PromoteParams(Section):
    """`params/promote.yaml`: the gates of each recipe."""

    gates: dict[str, Gates]
