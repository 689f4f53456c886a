"""Scores of the arms that may become the result, example by example, on data no merge has seen."""

import torch
from torch import Tensor

from tasks.evaluation.choice import Measured
from tasks.evaluation.loading import load_any, use_device
from tasks.models.measures.heads import yardsticks_of
from tasks.models.measures.yardsticks import as_candidate
from tasks.models.shared.heads import folders_of
from tasks.models.shared.jobs import Job
from tasks.recipe.models import ModelsRecipe

SPLITS = {"validation": "validation data", "held_out": "held-out examples without labels"}


def measure(recipe: ModelsRecipe) -> Measured:
    """Values of each candidate by the yardstick of the result's set, by example.

    Raises:
        ValueError: a candidate that is several models, which share a part of their layers.
    """
    use_device("choose", float64=True)
    torch.set_num_threads(1)  # so that the choice does not depend on the number of cores
    job = Job(recipe, recipe.named.set, recipe.named.seed)
    parents = [as_candidate(parent) for parent in job.models().values()]
    measures = yardsticks_of(job, parents, recipe.evaluate.batch_size)
    split = next(name for name in SPLITS if name in measures)
    values: dict[str, dict[str, Tensor]] = {}
    for arm in recipe.merge.candidates:
        folders = folders_of(job, recipe.folder(arm))
        if len(folders) > 1 and not job.entry.heads:
            raise ValueError(
                f"{recipe.where}: merge.candidates: {arm!r} is one model for each member, of which "
                "none is the result: leave it out"
            )
        models = [as_candidate(load_any(folder)) for folder in folders.values()]
        values[arm] = measures[split].by_example(models)
    return Measured(SPLITS[split], values)
