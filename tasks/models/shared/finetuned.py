"""The models that finetune made of a recipe's result and of arms, by their names in reports."""

from pathlib import Path

from tasks.recipe.models import ModelsRecipe


def finetuned_of(recipe: ModelsRecipe) -> dict[str, Path]:
    """`finetuned`, the result's, and `finetuned_ARM`; none without a section finetune."""
    if recipe.finetune is None:
        return {}
    workspace = recipe.workspace
    arms = {f"finetuned_{arm}": workspace.finetuned_arms / arm for arm in recipe.finetune.arms}
    return {"finetuned": workspace.finetuned, **arms}
