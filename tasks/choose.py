"""choose: make the arm that the recipe is about its model, `models/<recipe>/merged/`.

A copy of what merge made: another `merge.result` costs seconds.
"""

import shutil

from tasks.command import run_stage
from tasks.recipe.load import Recipe
from tasks.storage import write_folder


def main(recipe: Recipe) -> None:
    workspace = recipe.workspace
    with write_folder(workspace.merged) as folder:
        shutil.copytree(workspace.arms / recipe.result, folder, dirs_exist_ok=True)
    print(f"choose: {workspace.merged} is the arm {recipe.result}")


if __name__ == "__main__":
    run_stage(__doc__)
