"""Sets whose members keep heads of their own over one merged trunk: one model for each head.

Whatever is about one model says which head it means: a benchmark, the labels of a training, the
model that is registered or shipped.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alloy.errors import nearest
from tasks.recipe.section import ParamsError
from tasks.recipe.shared import RegisterParams, ResultParams, ShipParams
from tasks.workspace import Workspace

if TYPE_CHECKING:
    from tasks.recipe.models import ModelsRecipe


class OfHead(ResultParams):
    """A result; of members with heads of their own, the model with this member's."""

    head: str | None = None

    def folder(self, workspace: Workspace) -> Path:
        return super().folder(workspace) / (self.head or "")


class ModelsRegisterParams(OfHead, RegisterParams):
    """The registered model."""


class ModelsShipParams(OfHead, ShipParams):
    """The shipped model."""


def check_heads(recipe: ModelsRecipe) -> None:
    """Refuse heads that cannot be, and whatever does not say which of them it means.

    Raises:
        ParamsError: names the key, and what would be right.
    """
    for name, entry in recipe.sets.items():
        if entry.heads:
            for key, why in _wrong(recipe, name):
                raise ParamsError(f"{recipe.where}: {key}: {why}")
    result = recipe.named
    members = recipe.sets[result.set].members[result.seed]
    known = members if recipe.sets[result.set].heads else []
    for key, head in _named(recipe):
        if head is None and known:
            raise ParamsError(
                f"{recipe.where}: {key} is missing: set {result.set!r} has heads, so say the "
                f"member whose head is meant: {', '.join(known)}"
            )
        if head is not None and head not in known:
            right = nearest(head, known) if known else f"set {result.set!r} has no heads"
            raise ParamsError(f"{recipe.where}: {key}: {head!r}: {right}")
    if known and recipe.evaluate.harness is not None:
        raise ParamsError(
            f"{recipe.where}: evaluate.harness: a harness measures one model, and set "
            f"{result.set!r} has one for each head: give benchmarks, each with its head"
        )
    _check_lessons(recipe, known)


def _wrong(recipe: ModelsRecipe, name: str) -> Iterator[tuple[str, str]]:
    """Every key that heads of a set do not go with, and why."""
    entry, key = recipe.sets[name], f"sets.{name}.heads"
    if recipe.is_trunk:
        yield key, "parts of models that become one trunk keep the rest of their models: leave out"
    elif not recipe.is_calibrated:
        yield (
            key,
            "heads stay each member's own over a trunk of aligned units: give prepare, collect "
            "and align (preset identity moves nothing)",
        )
    if both := sorted({*entry.heads} & {*entry.kept}):
        yield key, f"{both[0]!r} is in kept as well, and so the first member's: name it once"
    if recipe.evaluate.curves:
        yield (
            "evaluate.curves",
            f"between members of set {name!r} there is no one head that a path could be measured "
            "by: leave them out",
        )
    for own, alignment in recipe.alignments(name).items():
        if alignment.score is not None:
            yield (
                f"align.alignments.{own}.score",
                f"set {name!r} has heads, and no one merge to score: give a weight_share, or "
                "search it by similarity (`weight_share: search`)",
            )
    for own, arm in recipe.arms(name).items():
        if arm.repair.temperature:
            yield f"merge.arms.{own}.repair.temperature", f"scales one head; set {name!r} has more"
        if arm.search is not None:
            yield f"merge.arms.{own}.search", f"set {name!r} has heads, and no one score to search"


def _named(recipe: ModelsRecipe) -> Iterator[tuple[str, str | None]]:
    """Every key that says which head is meant, and the head."""
    for name, own in recipe.evaluate.benchmarks.items():
        yield f"evaluate.benchmarks.{name}.head", own.head
    yield "register.head", recipe.registration.head
    if recipe.ship is not None:
        yield "ship.head", recipe.ship.head


def _check_lessons(recipe: ModelsRecipe, known: Collection[str]) -> None:
    """Refuse labels of no head, and heads that would learn nothing."""
    params, where = recipe.finetune, f"{recipe.where}: finetune"
    if params is None:
        return
    if known and params.data is not None:
        raise ParamsError(
            f"{where}.data: whose labels are these? Give them by head: "
            f"heads: {{{next(iter(known))}: {{measure: labels, ...}}}}"
        )
    for name in params.heads:
        if name not in known:
            right = nearest(name, [*known]) if known else "the result's set has no heads"
            raise ParamsError(f"{where}.heads: {name!r}: {right}")
    silent = [name for name in known if name not in params.heads or not params.task_weight]
    if silent and not params.distillation.weight:
        raise ParamsError(
            f"{where}.heads: {silent[0]!r} would learn nothing: give its labels, or distillation "
            "a weight"
        )
