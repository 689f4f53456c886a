"""The `score` that an alignment is chosen by: how good its merge is.

    merge   how often its first choice is its surest parent's, on calibration data: no labels
    blind   the same, and nobody says which classes each parent learned
    labels  joint accuracy on the validation examples of the set's benchmark

The merge is the plain mean, its batch norms estimated anew; both scores are in per cent. The surest
parent is, where a benchmark says which classes each parent learned, their ensemble
(`tasks.evaluation.accuracy`), otherwise the one with the largest probability. Language models and
outputs that are no logits are scored by the negative loss of `tasks.models.measures.yardsticks`.
The parents' mean answer would not do: a merge that answers one task alone is as near to it as one
that answers both.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor

from alloy.refit import repair
from tasks.evaluation import accuracy
from tasks.models.measures.yardsticks import (
    Candidate,
    as_candidate,
    surest,
    unlabelled,
    yardsticks,
)
from tasks.models.shared.jobs import Job

Weights = Mapping[str, Tensor]
Measure = Callable[[Candidate], float]


def merge_score(job: Job, name: str) -> Callable[[Mapping[str, Weights]], float]:
    """The score of a job's aligned models by name; more is better."""
    model = job.skeleton
    parents = [as_candidate(parent) for parent in job.models().values()]
    seen = job.seen()
    measure = MEASURES[name](job, parents, seen)

    def score(aligned: Mapping[str, Weights]) -> float:
        merged = repair.reestimate_norms(model, mean(list(aligned.values())), seen)
        model.load_state_dict(merged)
        return measure(as_candidate(model))

    return score


def mean(models: Sequence[Weights]) -> dict[str, Tensor]:
    """The plain mean in float32; integers are the first model's."""
    return {
        name: torch.stack([member[name].float() for member in models]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].items()
    }


def _by_answers(
    job: Job, parents: Sequence[Candidate], seen: Sequence[Weights], *, blind: bool = False
) -> Measure:
    classes = None
    if job.benchmark is None:
        measure = unlabelled(job, job.calibration, parents, job.recipe.evaluate.batch_size)
        if measure.words is not None or not measure.are_logits:
            return lambda merge: -measure.score([merge])["loss"].value
    else:
        folder = job.benchmark
        classes = load_file(folder / "classes.safetensors")

    def logits(candidate: Candidate) -> Tensor:
        rows = torch.cat([candidate(batch).rows for batch in seen])
        return rows if classes is None else accuracy.logits(rows, classes)

    theirs = [logits(parent) for parent in parents]
    knows = classes is not None and not blind
    together = accuracy.ensemble(theirs, classes) if knows else surest(theirs)
    choices = together.argmax(1)
    return lambda merge: 100 * (logits(merge).argmax(1) == choices).double().mean().item()


def _by_labels(job: Job, parents: Sequence[Candidate], seen: Sequence[Weights]) -> Measure:
    del seen
    measure = yardsticks(job, parents, job.recipe.evaluate.batch_size)["validation"]
    return lambda merge: measure.score([merge])["joint_accuracy"].value


MEASURES: Mapping[str, Callable[[Job, Sequence[Candidate], Sequence[Weights]], Measure]] = {
    "merge": _by_answers,
    "blind": partial(_by_answers, blind=True),
    "labels": _by_labels,
}
