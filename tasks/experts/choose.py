"""choose, for recipes of kind "experts": the arm that the recipe names, or the best one.

Candidates are compared on validation data, with labels and without any training. Writes the arm's
copy, `models/<recipe>/merged/`, and `choice.json`: another `merge.result` costs seconds.
"""

import torch
from torch import Tensor

from tasks.evaluation.choice import Measured, compare, publish, unmeasured
from tasks.evaluation.loading import use_device
from tasks.experts.measures.benchmark import load_split
from tasks.experts.measures.benchmarks import BENCHMARKS, METRIC_TITLES, training_free
from tasks.experts.shared.fitting import ready
from tasks.experts.shared.loading import load_model
from tasks.recipe.experts import ExpertsRecipe


def main(recipe: ExpertsRecipe) -> None:
    account = unmeasured(recipe.named_arm)
    if recipe.merge.candidates:
        account = compare(recipe.named_arm, measure(recipe))
    publish(recipe, account)


def measure(recipe: ExpertsRecipe) -> Measured:
    """Of each candidate what it gets right, in per cent, in benchmarks that need no training."""
    use_device("choose")
    torch.set_num_threads(1)  # so that the choice does not depend on the number of cores
    data = {
        name: load_split(recipe.name, name, "validation")
        for name in training_free(recipe.prepare.names)
    }
    values: dict[str, dict[str, Tensor]] = {}
    for arm in recipe.merge.candidates:
        model, own = load_model(recipe.folder(arm)), {}
        for name, examples in data.items():
            benchmark = BENCHMARKS[name]
            outputs = benchmark.outputs(
                ready(model, examples), examples, recipe.evaluate.batch_size
            )
            title = f"{benchmark.title}, {METRIC_TITLES[benchmark.metric]}"
            own[title] = 100 * benchmark.values(outputs, examples)
        values[arm] = own
    return Measured("validation data", values)
