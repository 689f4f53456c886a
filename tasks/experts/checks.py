"""Checks of a recipe of experts that need the stages' own modules: benchmarks, their sizes."""

from tasks.experts.finetune import check_together, plan
from tasks.experts.measures.benchmarks import TRAINING_FREE, training_free
from tasks.experts.prepare import checked
from tasks.recipe.experts import ExpertsRecipe
from tasks.recipe.section import ParamsError
from tasks.workers.together import num_processes


def check(recipe: ExpertsRecipe) -> None:
    """Refuse benchmarks that do not exist, and a fine-tuning on data that are not prepared.

    Or on batches that the processes cannot share, in a precision that the device lacks.

    Raises:
        ParamsError: names the key and what would be right.
    """
    prepared, sets = recipe.prepare.names, recipe.prepare.sets
    sizes = checked(recipe).benchmarks
    if recipe.merge.candidates and not training_free(prepared):
        raise ParamsError(
            f"{recipe.where}: merge.candidates: there are no data to compare them on: "
            f"prepare.benchmarks needs one of {', '.join(TRAINING_FREE)}"
        )
    if recipe.finetune is None:
        return
    plan(recipe)
    check_together(recipe, num_processes())
    for name, batch_size in recipe.finetune.batch_sizes.items():
        where = f"{recipe.where}: finetune.batch_sizes.{name}"
        if name not in prepared:
            raise ParamsError(
                f"{where}: prepare.benchmarks has no {name!r}, so there is nothing to learn from: "
                f"it has {', '.join(prepared)}"
            )
        if name in sizes and sizes[name].train < batch_size:
            raise ParamsError(
                f"{where}: a step of {batch_size} examples takes more than the "
                f"{sizes[name].train} that prepare.benchmarks.{name}.train gives"
            )
    squares = {name: sets[name].image_size for name in recipe.finetune.batch_sizes if name in sets}
    if recipe.finetune.joint and len({*squares.values()}) > 1:
        raise ParamsError(
            f"{recipe.where}: finetune.joint: one model for all benchmarks reads images of one "
            f"size, and prepare.sets says {squares}: give them one image_size, or write "
            "`joint: false`"
        )
