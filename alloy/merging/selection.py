"""Large entries of a task vector: an order that a histogram can find exactly.

Magnitudes are compared after rounding the float32 (float64) difference of model and base to the
dtype that the weights are stored in. For bfloat16 and float16 a magnitude is then one of 32,768
values, so one histogram of the task vector's absolute bits selects exactly, without a sort. Entries
of equal magnitude share their fate: both are kept or both are dropped. So a selection does not
depend on the order of entries, and may keep a few more than wanted where magnitudes tie.
"""

import torch
from torch import Tensor


def accumulator(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that merges compute in: float64 as it is, everything else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def task_vector(model: Tensor, base: Tensor) -> Tensor:
    """The task vector: model - base, in float32 (float64 for float64 weights)."""
    return accumulator(model) - accumulator(base)


def magnitudes(delta: Tensor, dtype: torch.dtype) -> Tensor:
    """|delta| rounded to the storage dtype (to nearest, ties to even), held in the dtype of
    `delta`.
    """
    return delta.abs().to(dtype).to(delta.dtype)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest value, counting from 1."""
    return values.flatten().kthvalue(values.numel() - k + 1).values


def keep_largest(values: Tensor, density: float, among: int | None = None) -> Tensor:
    """True for the int(density * n) largest of n values, at least one, and for all that tie with
    the last.

    Density 1 keeps everything, density 0 nothing. `among` is n where it is not the number of
    values.
    """
    if density >= 1 or values.numel() == 0:
        return torch.ones_like(values, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    among = values.numel() if among is None else among
    return values >= kth_largest(values, max(1, int(density * among)))


def keep_middle(values: Tensor, density: float, gamma: float) -> Tensor:
    """True for the int(density * n) largest values once the int(gamma * n) very largest are set
    aside.

    Both ends are inclusive: what ties with the first or the last that is kept is kept.
    """
    count, outliers = int(density * values.numel()), int(gamma * values.numel())
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    largest = kth_largest(values, outliers + 1)
    smallest = kth_largest(values, outliers + count)
    return (smallest <= values) & (values <= largest)


def midranks(values: Tensor) -> Tensor:
    """Rank of each value among its row (last dim), from 1; equal values share their mean rank.
    float64.
    """
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above + 1).double() / 2
