"""Parts of checkpoints that become one trunk, checked before anything is made of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alloy.errors import MergeError
from alloy.trunk.members import (
    Member,
    Part,
    common_names,
    find_parts,
    refuse_other_calls,
)
from tasks.evaluation.loading import load_any
from tasks.recipe.models import ModelsRecipe, ModelsSet

EXAMPLES = 2  # that are run through the models


def members_of(entry: ModelsSet) -> dict[str, Member]:
    """The parts of a set as the library takes them."""
    return {
        name: Member(
            part=part.part, checkpoint=part.checkpoint, layers=part.layers, names=part.names
        )
        for name, part in entry.parts.items()
    }


class FetchedParts:
    """The parts of a recipe in the checkpoints that were fetched."""

    def __init__(self, recipe: ModelsRecipe) -> None:
        """Find the parts.

        Raises:
            MergeError: parts that are not there, overlap, or are not alike.
        """
        (entry,) = recipe.sets.values()
        names = dict.fromkeys(part.checkpoint for part in entry.parts.values())
        folders = {name: Path(recipe.workspace.checkpoints) / name for name in names}
        self.models: dict[str, Any] = {name: load_any(folder) for name, folder in folders.items()}
        try:
            self.parts, self.names = matching(entry, self.models)
        except MergeError as error:
            raise MergeError(f"{recipe.where}: {error}") from error

    def refuse_other_inputs(self, where: str, inputs: Mapping[str, Tensor]) -> None:
        """Raise MergeError unless the inputs reach every part, each layer once and in one order."""
        batch = {name: tensor[:EXAMPLES] for name, tensor in inputs.items()}
        try:
            data = {
                name: {n: t.to(next(model.parameters()).device) for n, t in batch.items()}
                for name, model in self.models.items()
            }
            refuse_other_calls(self.models, self.parts, self.names, data)
        except MergeError as error:
            raise MergeError(f"{where}: {error}") from error


def matching(
    entry: ModelsSet, models: Mapping[str, nn.Module]
) -> tuple[dict[str, Part], list[str]]:
    """The parts of a set in its models, and the names of the weights that all of them have.

    Raises:
        MergeError: parts that are not there, overlap, or are not alike.
    """
    try:
        parts = find_parts(models, members_of(entry))
        return parts, common_names(parts, models)
    except MergeError as error:
        raise MergeError(f"members: {error}") from error
