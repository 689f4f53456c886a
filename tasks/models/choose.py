"""choose, for recipes of kind "models": the arm that the recipe names, or the best one.

Candidates are compared on examples that no merge has seen, with labels where there are any. Writes
the arm's copy, `models/<recipe>/merged/`, and `choice.json`: another `merge.result` costs seconds.
"""

from tasks.evaluation.choice import compare, publish, unmeasured
from tasks.recipe.models import ModelsRecipe


def main(recipe: ModelsRecipe) -> None:
    account = unmeasured(recipe.named_arm)
    if recipe.merge.candidates:
        from tasks.models.measures.candidates import measure  # torch, which a copy needs not

        account = compare(recipe.named_arm, measure(recipe))
    publish(recipe, account)
