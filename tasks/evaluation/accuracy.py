"""Accuracy of models of several tasks' classes: joint, per task, and averaged.

A model's outputs are compared with a fixed code of every class, the part that CLIP's text
embeddings play in ZipIt and MuDSC: heads of models with different classes then share one output
space, so that they merge. As in those papers, *joint* accuracy takes the best class of all tasks,
*per-task* accuracy the best class of the example's own task, and the *average* is the mean of the
tasks'.

Shapes: N examples, E outputs, C classes of all tasks together.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.evaluation.score import MeanScore, Score

SCALE = 16.0  # of the cosines, in training and in every loss

Classes = Mapping[str, Tensor]
"""`class_tasks` int64 [C], the task of each class, and maybe `codes` float32 [C, E]."""


def logits(outputs_NE: Tensor, classes: Classes) -> Tensor:
    """Scaled cosines of outputs and class codes [N, C]; without codes the outputs themselves.

    Raises:
        ValueError: outputs of another width than the codes, or than the number of classes.
    """
    num_classes = len(classes["class_tasks"])
    codes = classes.get("codes")
    expected = num_classes if codes is None else codes.shape[1]
    if outputs_NE.dim() != 2 or outputs_NE.shape[1] != expected:
        kind = "classes" if codes is None else "numbers in a class code"
        raise ValueError(
            f"outputs of shape {tuple(outputs_NE.shape)} do not fit {expected} {kind}: "
            f"expected [examples, {expected}]"
        )
    if codes is None:
        return outputs_NE
    codes = codes.to(outputs_NE)
    return SCALE * F.normalize(outputs_NE, dim=1) @ F.normalize(codes, dim=1).T


def within_tasks(logits_NC: Tensor, tasks_N: Tensor, class_tasks_C: Tensor) -> Tensor:
    """The logits with the classes of other tasks than the example's own at minus infinity."""
    return logits_NC.masked_fill(tasks_N[:, None] != class_tasks_C[None], -torch.inf)


def accuracies(
    logits_NC: Tensor, labels_N: Tensor, tasks_N: Tensor, classes: Classes
) -> dict[str, Score]:
    """`joint`, `task 0`, `task 1`, ... and `average`, with standard errors over the examples."""
    class_tasks = classes["class_tasks"]
    own = within_tasks(logits_NC, tasks_N, class_tasks).argmax(dim=1) == labels_N
    tasks = class_tasks.unique().tolist()
    per_task = {f"task {task}": _share(own[tasks_N == task]) for task in tasks}
    value = sum(score.value for score in per_task.values()) / len(tasks)
    error = sum(score.error**2 for score in per_task.values()) ** 0.5 / len(tasks)
    joint = _share(logits_NC.argmax(dim=1) == labels_N)
    return {"joint": joint, **per_task, "average": Score(value, error)}


def _share(correct_N: Tensor) -> Score:
    """The share of what is true, and the standard error of a mean of independent draws."""
    share = correct_N.double().mean().item()
    error = 100 * (share * (1 - share) / max(1, len(correct_N))) ** 0.5
    return MeanScore.of(100 * share, error, 100 * correct_N)


def ensemble(logits: Sequence[Tensor], classes: Classes) -> Tensor:
    """The ensemble of parents [N, C]: for each task's classes the logits of that task's parent.

    As in ZipIt: nobody says whose example it is, the most confident parent has it. It knows which
    classes each parent has learned, and costs running every parent.

    Raises:
        ValueError: another number of parents than of tasks.
    """
    rows = _parent_of_each_class(logits, classes)
    return torch.stack(list(logits)).gather(0, rows.expand(1, len(logits[0]), -1))[0]


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The ensemble that averages the parents' probabilities [N, C, ...], as their logarithms.

    Nobody says which classes a parent has learned, so each one's guesses at the others' classes
    count as well.
    """
    shares = torch.stack([of_parent.log_softmax(dim=1) for of_parent in logits])
    return shares.logsumexp(dim=0) - math.log(len(logits))


def confidence(logits: Sequence[Tensor], classes: Classes) -> Tensor:
    """Each parent's share in each example [P, N], columns of sum 1, from logits alone.

    The softmax over parents of the largest logit among their own tasks' classes: the parent that
    the ensemble would believe counts most.

    Raises:
        ValueError: another number of parents than of tasks.
    """
    rows = _parent_of_each_class(logits, classes)[0, 0]
    own = [row_NC[:, rows == parent].amax(dim=1) for parent, row_NC in enumerate(logits)]
    return torch.stack(own).softmax(dim=0)


def blind_confidence(logits: Sequence[Tensor]) -> Tensor:
    """Each parent's share in each example [P, N], by its largest log-probability of any class.

    Nobody says which classes a parent has learned.
    """
    sure = [logits_NC.log_softmax(dim=1).amax(dim=1) for logits_NC in logits]
    return torch.stack(sure).softmax(dim=0)


def _parent_of_each_class(logits: Sequence[Tensor], classes: Classes) -> Tensor:
    """The parents' numbers [1, 1, C]: the position of a parent is that of its task."""
    num_tasks = int(classes["class_tasks"].max()) + 1
    if len(logits) != num_tasks:
        raise ValueError(f"{len(logits)} parents for {num_tasks} tasks: one for each is needed")
    return classes["class_tasks"][None, None]


def loss(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """The mean cross-entropy over the classes of all tasks."""
    return F.cross_entropy(logits_NC, labels_N)
