"""Segmentation scored image by image, at the size of its label map.

Of each image three numbers a class stay, never its scores: pixels that are right, pixels that were
given, pixels that are labelled. Shapes: N images, C classes, h w sides of the scores, H W of a map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.evaluation.score import Score

_CLASSES_AT_ONCE = 16
NUM_RESAMPLES = 200


def predicted_labels(scores_Chw: Tensor, size: tuple[int, int]) -> Tensor:
    """The best class of every pixel [H, W], by scores interpolated to the map's size.

    A few classes at a time: 150 classes of a photograph of 3 megapixels would be 1.8 GB.
    """
    best_HW: Tensor | None = None
    labels_HW = torch.zeros(size, dtype=torch.long, device=scores_Chw.device)
    for start in range(0, len(scores_Chw), _CLASSES_AT_ONCE):
        some = scores_Chw[None, start : start + _CLASSES_AT_ONCE]
        scores = F.interpolate(some, size=size, mode="bilinear", align_corners=False)[0]
        value_HW, place_HW = scores.max(0)
        if best_HW is None:
            best_HW, labels_HW = value_HW, place_HW
            continue
        better = value_HW > best_HW
        best_HW = torch.where(better, value_HW, best_HW)
        labels_HW = torch.where(better, place_HW + start, labels_HW)
    return labels_HW


def counts(predicted_HW: Tensor, labels_HW: Tensor, num_classes: int) -> Tensor:
    """Pixels right, given and labelled by class [3, C]; labels below 0 are ignored."""
    shown = labels_HW >= 0
    predicted, labels = predicted_HW[shown], labels_HW[shown]
    right = labels[predicted == labels]
    return torch.stack([x.bincount(minlength=num_classes) for x in (right, predicted, labels)])


def segmentation_scores(counts_N3C: Tensor) -> dict[str, Score]:
    """`mean_iou`, `mean_accuracy` (over classes) and `pixel_accuracy`, with bootstrap errors."""
    numbers = counts_N3C.double()
    num = len(numbers)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(num, (NUM_RESAMPLES, num), generator=generator)
    times_BN = F.one_hot(drawn, num).sum(1).double()
    resampled = torch.einsum("bn,nkc->bkc", times_BN, numbers)
    whole = _scores(numbers.sum(0)[None])
    spread = _scores(resampled)
    return {
        name: Score(100 * value.item(), 100 * spread[name].std().item())
        for name, value in whole.items()
    }


def _scores(counts_B3C: Tensor) -> dict[str, Tensor]:
    right, given, labelled = counts_B3C.unbind(1)
    union = given + labelled - right
    return {
        "mean_iou": _mean_over(right / union.clamp(min=1), union > 0),
        "mean_accuracy": _mean_over(right / labelled.clamp(min=1), labelled > 0),
        "pixel_accuracy": right.sum(1) / labelled.sum(1).clamp(min=1),
    }


def _mean_over(values_BC: Tensor, present_BC: Tensor) -> Tensor:
    return (values_BC * present_BC).sum(1) / present_BC.sum(1).clamp(min=1)


def image_scores(counts_N3C: Tensor) -> Tensor:
    """The share of each image's labelled pixels that are right, [N]."""
    right, _, labelled = counts_N3C.double().unbind(1)
    return right.sum(1) / labelled.sum(1).clamp(min=1)
