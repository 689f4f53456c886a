"""Arms whose settings are searched first, each by `python -m tasks.search` in its own process.

What a search found says all that the merge takes from it, so its code is no dependency of merge.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tasks.recipe.arm import ModelsArm
from tasks.recipe.models import ModelsRecipe
from tasks.recipe.section import ParamsError
from tasks.storage import read_json


def searched(recipe: ModelsRecipe) -> ModelsRecipe:
    """The recipe with what was found in the place of its arms' searches.

    A search that was interrupted goes on where it stopped; one that was done is not done again.

    Raises:
        ParamsError: a search that could not be done; it has said why.
    """
    arms = dict(recipe.merge.arms)
    for name, arm in arms.items():
        if arm.search is not None:
            arms[name] = _found(recipe, name)
    merge = recipe.merge.model_copy(update={"arms": arms})
    return recipe.model_copy(update={"merge": merge})


def _found(recipe: ModelsRecipe, name: str) -> ModelsArm:
    with tempfile.TemporaryDirectory() as folder:
        best = Path(folder) / "best.json"
        command = [sys.executable, "-m", "tasks.search", recipe.name, name, "--best", str(best)]
        if subprocess.run(command).returncode:
            raise ParamsError(f"{recipe.where}: merge.arms.{name}.search could not be done")
        return ModelsArm.model_validate(read_json(best))
