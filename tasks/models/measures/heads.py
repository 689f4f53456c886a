"""Yardsticks of members that keep heads of their own: each head by itself, and all together.

A model is then several, one for each head, in the order of the members.

With labels, the benchmark's task i is that of head i. *Per-task* accuracy is the head's own, on the
examples of its task; the *average* is the mean of the heads'; for *joint* accuracy nobody says
whose example it is, all heads answer, and the surest class of all counts. The loss is a head's own,
on its own examples.

Without labels, each head is measured as any model is (`tasks.models.measures.yardsticks`), against
its own parent alone, and all together by the mean over the heads.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tasks.evaluation import accuracy
from tasks.evaluation.score import MeanScore, Score
from tasks.models.measures.yardsticks import (
    Candidate,
    Labelled,
    Unlabelled,
    Yardstick,
    mean_over,
    unlabelled,
    yardsticks,
)
from tasks.models.shared.jobs import Job

Inputs = Mapping[str, Tensor]


def yardsticks_of(
    job: Job, parents: Sequence[Candidate], batch_size: int
) -> Mapping[str, Yardstick]:
    """The yardsticks of a set by split: of one model, or of one for each head."""
    if not job.entry.heads:
        return yardsticks(job, parents, batch_size)
    if (folder := job.benchmark) is not None:
        classes = load_file(folder / "classes.safetensors")
        return {
            split: LabelledHeads(
                job.members, load_file(folder / f"{split}.safetensors"), classes, batch_size
            )
            for split in ("validation", "test")
        }
    split, file = "calibration", job.calibration
    if job.held_out is not None:
        split, file = "held_out", job.held_out
    own = {
        name: unlabelled(job, file, [parent], batch_size)
        for name, parent in zip(job.members, parents, strict=True)
    }
    return {split: UnlabelledHeads(own)}


class LabelledHeads:
    """Accuracy and cross-entropy of each head on its own task, and of all heads on all tasks."""

    def __init__(
        self, names: Sequence[str], examples: Inputs, classes: Inputs, batch_size: int
    ) -> None:
        num_tasks = int(classes["class_tasks"].max()) + 1
        if num_tasks != len(names):
            raise ValueError(
                f"heads {[*names]} need a benchmark of as many tasks, one each; it has {num_tasks}"
            )
        self.names, self.classes = names, classes
        self.whole = Labelled(examples, classes, batch_size)

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score a model, one candidate for each head."""
        logits, labels, tasks = self._logits(candidates), self.whole.labels, self.whole.tasks
        shares = accuracy.accuracies(logits, labels, tasks, self.classes)
        own = accuracy.within_tasks(logits, tasks, self.classes["class_tasks"])
        losses = F.cross_entropy(own, labels, reduction="none")
        scores = {f"{name.replace(' ', '_')}_accuracy": score for name, score in shares.items()}
        scores["loss"] = mean_over(losses)
        for task in range(len(self.names)):
            scores[f"task_{task}_loss"] = mean_over(losses[tasks == task])
        return scores

    def by_example(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """The joint accuracy of each example, and its own head's."""
        logits, labels, tasks = self._logits(candidates), self.whole.labels, self.whole.tasks
        own = accuracy.within_tasks(logits, tasks, self.classes["class_tasks"])
        return {
            "joint accuracy": 100 * (logits.argmax(1) == labels).double(),
            "accuracy of its own head": 100 * (own.argmax(1) == labels).double(),
        }

    def _logits(self, candidates: Sequence[Candidate]) -> Tensor:
        """Each head's log-probabilities at the places of its own classes [N, C]."""
        class_tasks = self.classes["class_tasks"]
        logits = torch.full((len(self.whole.labels), len(class_tasks)), -torch.inf)
        for task, (name, candidate) in enumerate(zip(self.names, candidates, strict=True)):
            own = {key: tensor[class_tasks == task] for key, tensor in self.classes.items()}
            try:
                answer = self.whole.logits(candidate, own)
            except ValueError as error:
                raise ValueError(f"head {name!r} and task {task}: {error}") from error
            logits[:, class_tasks == task] = answer.log_softmax(1).to(logits)
        return logits


class UnlabelledHeads:
    """Each head against its own parent, and the mean over the heads."""

    def __init__(self, heads: Mapping[str, Unlabelled]) -> None:
        self.heads = heads

    def score(self, candidates: Sequence[Candidate]) -> dict[str, Score]:
        """Score a model, one candidate for each head."""
        each = {
            name: yardstick.score([candidate])
            for (name, yardstick), candidate in zip(self.heads.items(), candidates, strict=True)
        }
        scores: dict[str, Score] = {}
        for metric in next(iter(each.values())):
            if metric.endswith("_parent_0"):
                continue  # a head has one parent
            scores[metric] = _together([own[metric] for own in each.values()])
            scores |= {f"head_{name}_{metric}": own[metric] for name, own in each.items()}
        return scores

    def by_example(self, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
        """What each head is compared by, as `choice of the surest parent (head a)`."""
        return {
            f"{measure} (head {name})": values
            for (name, yardstick), candidate in zip(self.heads.items(), candidates, strict=True)
            for measure, values in yardstick.by_example([candidate]).items()
        }


def _together(scores: Sequence[Score]) -> Score:
    """The mean over the heads; of the same examples, so example by example where it can be."""
    each = [score.values_N for score in scores if isinstance(score, MeanScore)]
    if len(each) == len(scores) and len({len(values) for values in each}) == 1:
        return mean_over(torch.stack(each).double().mean(0))
    value = sum(score.value for score in scores) / len(scores)
    error = sum(score.error**2 for score in scores) ** 0.5 / len(scores)
    return Score(value, error)
