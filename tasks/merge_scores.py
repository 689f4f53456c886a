"""How good aligned models are once they are merged: the `score` that an alignment is chosen by.

    merge   how near the merge's answers are to what its parents answer together, on calibration data: no labels
    labels  joint accuracy on the validation examples of the set's benchmark

The merge is the plain mean, its batch norms estimated anew. Together the parents answer, with class tasks, as their
ensemble (`tasks.accuracy`), the most confident one; otherwise with their mean (the loss of `tasks.yardsticks`).
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from alloy import repair
from tasks import accuracy
from tasks.sets import DATA, Job, batches
from tasks.yardsticks import Candidate, Unlabelled, asked, yardsticks

Weights = Mapping[str, Tensor]
Measure = Callable[[Candidate], float]


def merge_score(job: Job, name: str) -> Callable[[Mapping[str, Weights]], float]:
    """The score of a job's aligned models by name; more is better."""
    model = job.skeleton
    parents = [asked(parent) for parent in job.models().values()]
    seen = list(batches(load_file(job.calibration), job.params.collect.batch_size))
    measure = MEASURES[name](job, parents, seen)

    def score(aligned: Mapping[str, Weights]) -> float:
        merged = repair.reestimate_norms(model, mean(list(aligned.values())), seen)
        model.load_state_dict(merged)
        return measure(asked(model))

    return score


def mean(models: Sequence[Weights]) -> dict[str, Tensor]:
    """The plain mean in float32; integers are the first model's."""
    return {
        name: torch.stack([found[name].float() for found in models]).mean(0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in models[0].items()
    }


def _by_answers(job: Job, parents: Sequence[Candidate], seen: Sequence[Weights]) -> Measure:
    if job.found.benchmark is None:
        (unlabelled,) = yardsticks(job, parents, job.params.evaluate.batch_size).values()
        assert isinstance(unlabelled, Unlabelled)
        return lambda merge: -unlabelled.score([merge])["loss"].value
    classes = load_file(
        DATA / job.recipe / "benchmarks" / job.found.benchmark / "classes.safetensors"
    )

    def logits(candidate: Candidate) -> Tensor:
        return accuracy.logits(torch.cat([candidate(batch).rows for batch in seen]), classes)

    wanted = accuracy.ensemble([logits(parent) for parent in parents], classes).softmax(1)
    return lambda merge: -F.cross_entropy(logits(merge), wanted).item()


def _by_labels(job: Job, parents: Sequence[Candidate], seen: Sequence[Weights]) -> Measure:
    del seen
    measure = yardsticks(job, parents, job.params.evaluate.batch_size)["validation"]
    return lambda merge: measure.score([merge])["joint_accuracy"].value


MEASURES: Mapping[str, Callable[[Job, Sequence[Candidate], Sequence[Weights]], Measure]] = {
    "merge": _by_answers,
    "labels": _by_labels,
}
