"""The choice of the arm that a recipe is about: the one it names, or the best on held-out data."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.recipe.load import Recipe
from tasks.recipe.shared import BEST
from tasks.storage import write_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from alloy.measures.choice import Choice

NUM_ERRORS = 2.0  # standard errors of a paired difference that count as a difference
GIVEN = "the recipe names it"


@dataclass(frozen=True)
class Measured:
    """Values of each candidate on held-out data."""

    data: str  # in words, such as "validation data"
    values: Mapping[str, Mapping[str, Tensor]]  # arm -> measure -> a value for each example


def unmeasured(arm: str) -> dict[str, Any]:
    """The account of an arm that a recipe names without comparing it."""
    return {"arm": arm, "reason": GIVEN}


def compare(named: str, measured: Measured) -> dict[str, Any]:
    """The account of a comparison: the arm, why, and by how much each gains over the simplest.

    Args:
        named: the recipe's arm, or `best` for the one that the data favour.

    Raises:
        MeasureError: as `alloy.measures.choose_by_values`.
    """
    from alloy.measures.choice import choose_by_values  # torch, which a copy needs not

    choice = choose_by_values(measured.values, num_errors=NUM_ERRORS)
    arm = choice.chosen if named == BEST else named
    return {
        "arm": arm,
        "reason": _reason(arm, named, choice),
        "data": measured.data,
        "num_errors": NUM_ERRORS,
        "favoured": choice.chosen,
        "candidates": list(measured.values),
        "measures": [[key, num] for key, num in _sizes(measured).items()],
        "scores": {name: dict(own) for name, own in choice.scores.items()},
        "gains": {
            name: {key: gain._asdict() for key, gain in own.items()}
            for name, own in choice.over_simplest.items()
        },
        "reasons": dict(choice.reasons),
    }


def _sizes(measured: Measured) -> dict[str, int]:
    first = next(iter(measured.values.values()))
    return {key: len(values) for key, values in first.items()}


def _reason(arm: str, named: str, choice: Choice) -> str:
    if named != BEST:
        agreed = "as held-out data do" if choice.chosen == arm else "held-out data favour "
        return f"{GIVEN}; {agreed}{'' if choice.chosen == arm else choice.chosen}"
    if arm in choice.reasons:
        return choice.reasons[arm]
    return "the simplest, and no other is better"


def publish(recipe: Recipe, account: Mapping[str, Any]) -> None:
    """Write `choice.json`, and the arm's copy as the recipe's model."""
    workspace = recipe.workspace
    with write_folder(workspace.merged) as folder:
        shutil.copytree(recipe.folder(account["arm"]), folder, dirs_exist_ok=True)
    write_json(workspace.choice, account)
    print(f"choose: {workspace.merged} is the arm {account['arm']}: {account['reason']}")
