"""Means of weights: model soups, the interpolation of modality experts, Fisher merging.

All are elementwise and need no common base.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alloy.errors import MergeError
from alloy.merging.selection import accumulator


def linear(models: Sequence[Tensor], *, coefficients: Sequence[float], normalize: bool) -> Tensor:
    """W = sum_i c_i W_i; the average where every c_i is 1/n (model soups, arXiv:2203.05482).

    With `normalize` the coefficients were divided by their sum; without it they are used as they
    are.
    """
    del normalize  # done where the coefficients are checked
    return combine(models, coefficients)


def passthrough(models: Sequence[Tensor], *, scale: float) -> Tensor:
    """W = s W_1: the one model, as it is where s = 1, such as layers of a slice.

    mergekit's passthrough (github.com/arcee-ai/mergekit).
    """
    return combine(models, [scale])


def interpolation(experts: Sequence[Tensor], *, ratio: float) -> Tensor:
    """Interpolate modality experts with the paper's coefficients (arXiv:2304.14933).

    W = a W_v + (1-a) W_l for two experts; W = 2/3 a W_v + 2/3 (1-a) W_l + 1/3 W_vl for three; a
    single expert is itself. The order of the experts is v, l, vl; a is `ratio`.
    """
    pair = (ratio, 1 - ratio)
    coefficients = {1: (1.0,), 2: pair, 3: (2 / 3 * pair[0], 2 / 3 * pair[1], 1 / 3)}
    return combine(experts, coefficients[len(experts)])


def geometric_median(models: Sequence[Tensor], *, max_iterations: int, tolerance: float) -> Tensor:
    """argmin_W sum_i ||W - W_i||, tensor by tensor, by Weiszfeld's iteration (1937).

    W is the mean of the W_i weighted by 1/||W - W_i||, again and again, until it moves by less than
    the share `tolerance` of its length; it starts halfway between the mean and the median of every
    entry, as YOYO-AI's merges do (huggingface.co/YOYO-AI/Qwen3-30B-A3B-YOYO-V4). A model among
    others that agree has no pull beyond its direction.
    """
    points = torch.stack([accumulator(model).double() for model in models])
    median = points.quantile(0.5, dim=0) if points[0].numel() else points[0]
    center = (points.mean(0) + median) / 2
    for _ in range(max_iterations):
        distances = (points - center).reshape(len(points), -1).norm(dim=1)
        pull = 1 / distances.clamp(min=torch.finfo(torch.float32).eps)
        moved = torch.tensordot(pull / pull.sum(), points, dims=1)
        step, center = (moved - center).norm(), moved
        if step <= tolerance * center.norm().clamp(min=1):
            break
    return center.to(accumulator(models[0]).dtype)


def fisher(
    models: Sequence[Tensor], *, coefficients: Sequence[float], statistics: Sequence[Tensor]
) -> Tensor:
    """W = sum_i c_i F_i W_i / sum_i c_i F_i, entry by entry (Matena and Raffel, arXiv:2111.09832).

    F_i is the diagonal of model i's Fisher information, of the shape of the tensor, as
    `alloy.merging.fisher_diagonal` measures it. Entries that no model's loss depends on (all F_i =
    0) get the mean.

    Raises:
        MergeError: a Fisher diagonal of another shape, or with a negative or non-finite entry.
    """
    numerator, denominator = 0.0, 0.0
    for model, diagonal, c in zip(models, statistics, coefficients, strict=True):
        if diagonal.shape != model.shape:
            raise MergeError(
                f"a Fisher diagonal has shape {tuple(diagonal.shape)}, its weight "
                f"{tuple(model.shape)}"
            )
        if not bool((diagonal.isfinite() & (diagonal >= 0)).all()):
            raise MergeError(
                "a Fisher diagonal has a negative or non-finite entry; it is a mean of squares"
            )
        # float64: squared gradients can be far below the smallest float32
        precision = c * diagonal.double()
        numerator = numerator + precision * model.double()
        denominator = denominator + precision
    assert isinstance(denominator, Tensor)
    mean = combine([model.double() for model in models], coefficients)
    merged = torch.where(denominator > 0, numerator / denominator.clamp(min=5e-324), mean)
    return merged.to(accumulator(models[0]).dtype)


def combine(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_i c_i T_i, accumulated in float32 (float64 for float64 tensors) in the order given."""
    first, *others = zip(tensors, coefficients, strict=True)
    total = accumulator(first[0]) * first[1]
    for tensor, c in others:
        total += accumulator(tensor) * c  # an `alpha` would fuse both roundings on some machines
    return total
