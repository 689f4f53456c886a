"""Agreement of two encoders on the same examples, by measures of what their answers are used for.

Answers are compared example by example, so that a difference has a standard error. Explained
variance asks for the same numbers; neighbours and similarities for the same geometry, which search
and clustering read. A merge may gain in one and lose in the other: RegMean of two real sentence
encoders explained more variance than the plain average and found fewer of their neighbours.

Shape legend: N examples, D components of an answer, E of the other model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from alloy.errors import MeasureError

Measure = Callable[[Tensor, Tensor], Tensor]
"""Answers [N, D] and a parent's [N, E] -> a value for each example, [N]; more is better."""

_CONSTANT = 1e-12  # of the mean square: less variance is rounding, and all answers are alike
_LEVEL = 1e-9  # the norm of a row of cosines that varies by float64's rounding alone
_TINY = 1e-30  # keeps a division by zero finite


def explained_variance(answers_ND: Tensor, parent_ND: Tensor) -> Tensor:
    """The share of the spread of a parent's answers that the answers explain, by example.

    1 - |y - t|² / mean |t - mean t|², so the mean over examples is 1 for equal answers, 0 for the
    parent's mean answer and negative for worse ones. Both must be in the same units.

    Raises:
        MeasureError: answers of other shapes, of fewer than three examples or not finite; a parent
            that answers all examples alike.
    """
    answers_ND, parent_ND = _checked(answers_ND, parent_ND)
    if answers_ND.shape != parent_ND.shape:
        raise MeasureError(
            f"answers have {answers_ND.shape[1]} components, the parent's {parent_ND.shape[1]}: "
            f"explained variance compares the same units, neighbours and similarities any"
        )
    spread = (parent_ND - parent_ND.mean(0)).square().sum(1).mean()
    if spread <= _CONSTANT * parent_ND.square().sum(1).mean():
        raise MeasureError("a parent answers all examples alike: there is no variance to explain")
    return 1 - (answers_ND - parent_ND).square().sum(1) / spread


def neighbour_agreement(
    answers_ND: Tensor, parent_NE: Tensor, *, num_neighbours: int = 10
) -> Tensor:
    """The share of each example's nearest neighbours that both models agree on.

    Neighbours by cosine, the example itself left out; with fewer examples than `num_neighbours`
    allows, a third of the others. Chance is num_neighbours / (N - 1).

    Raises:
        MeasureError: answers of other examples, of fewer than three or not finite; no neighbours.
    """
    if num_neighbours < 1:
        raise MeasureError(f"num_neighbours {num_neighbours} is below 1")
    answers_ND, parent_NE = _checked(answers_ND, parent_NE)
    k = min(num_neighbours, max(1, (len(answers_ND) - 1) // 3))
    near = [torch.zeros(len(answers_ND), len(answers_ND), dtype=torch.bool) for _ in "ab"]
    for chosen, x in zip(near, (answers_ND, parent_NE), strict=True):
        similarity_NN = _cosines(x).fill_diagonal_(-torch.inf)
        chosen.scatter_(1, similarity_NN.topk(k, 1).indices, True)
    return (near[0] & near[1]).sum(1).double() / k


def similarity_agreement(answers_ND: Tensor, parent_NE: Tensor) -> Tensor:
    """The correlation of each example's similarities to all others between both models.

    Cosine similarities, the example itself left out; 0 where one of the models finds all others
    equally similar.

    Raises:
        MeasureError: answers of other examples, of fewer than three or not finite.
    """
    answers_ND, parent_NE = _checked(answers_ND, parent_NE)
    others = ~torch.eye(len(answers_ND), dtype=torch.bool)
    ours, theirs = (
        _centred(_cosines(x)[others].reshape(len(x), -1)) for x in (answers_ND, parent_NE)
    )
    return (ours * theirs).sum(1)


ENCODER_MEASURES: Mapping[str, Measure] = {
    "explained variance": explained_variance,
    "neighbours": neighbour_agreement,
    "similarities": similarity_agreement,
}
"""Measures of models without logits, by name."""

BESIDE = ("explained variance",)
"""Measures that may speak against a merge, but not alone for it.

What search and clustering read is the geometry. Of two real encoders a refit explained more of the
parents' variance, kept no more of their neighbours, and was the worse search engine.
"""


def _checked(answers: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    for x in (answers, parent):
        if x.ndim != 2:
            raise MeasureError(
                f"answers have shape {tuple(x.shape)}: give one row for each example, [N, D]"
            )
        if not torch.isfinite(x).all():
            raise MeasureError("answers have NaN or Inf: look at the models and their data")
    if len(answers) != len(parent):
        raise MeasureError(f"answers to {len(answers)} examples, the parent's to {len(parent)}")
    if len(answers) < 3:
        raise MeasureError(f"{len(answers)} examples are too few to compare: give at least 3")
    return answers.detach().cpu().double(), parent.detach().cpu().double()


def _cosines(x_ND: Tensor) -> Tensor:
    unit_ND = x_ND / x_ND.norm(dim=1, keepdim=True).clamp(min=_TINY)
    return unit_ND @ unit_ND.T


def _centred(similarity_NM: Tensor) -> Tensor:
    """Rows about their mean at norm 1; 0 where they vary by rounding alone."""
    centred = similarity_NM - similarity_NM.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(norm > _LEVEL, centred / norm.clamp(min=_TINY), 0.0)
