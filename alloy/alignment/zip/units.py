"""Zip: merge units many to many, within and across models (ZipIt, arXiv:2305.03053, algorithm 1).

The pair of units, of any models, that is most similar becomes one; its similarity to others is the
smaller of the two, times `repeat`, so that what has been merged is merged again less readily. It
ends when as many clusters are left as the first model has units. A model may merge only `budget` of
its share of merges within itself. Nothing in this needs models of one width.

Shape legend: R units of all models end to end, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

_SPENT = np.float32(-1e30)
_WHOLE = 1e-4  # added before a product is cut to an integer: 100 x 0.29 is 29, not 28
"""The similarity of pairs that are beyond a budget."""


class Zipped(NamedTuple):
    """The cluster of each unit, int64 [R], numbered by their first units; the mean similarity of
    merges.
    """

    cluster_R: Tensor
    mean_similarity: float


def zip_units(
    similarity_RR: Tensor, models: int | Sequence[int], *, budget: float = 1.0, repeat: float = 0.5
) -> Zipped:
    """Merge the units of models until the first model's number is left.

    Args:
        similarity_RR: symmetric, finite, the models' units end to end.
        models: how many units each has, or how many models share the units equally.
        budget: the part b of (R - C) / num_models merges that a model may spend within itself, as
            long as there are others to make; a model wider than the first may spend the difference
            beside.
        repeat: the factor a on a merged unit's similarities; 0 lets every unit merge once.

    Raises:
        ValueError: settings with which so many merges are impossible.
    """
    size = len(similarity_RR)
    sizes = [size // models] * models if isinstance(models, int) else list(models)
    if sum(sizes) != size:
        wide = f"{models} equally wide models" if isinstance(models, int) else f"models of {sizes}"
        raise ValueError(f"{size} units cannot be those of {wide}")
    if repeat <= 0 and 2 * sizes[0] < size:
        raise ValueError(
            f"repeat 0 lets every unit merge once, too few for models of {sizes} units"
        )
    if budget < 0 or not 0 <= repeat <= 1:
        raise ValueError(f"budget {budget} must be at least 0, repeat {repeat} lie in 0..1")
    num_models, width = len(sizes), sizes[0]
    work = similarity_RR.detach().to(torch.float32, copy=True).numpy()
    origin = np.repeat(np.arange(num_models), sizes)
    surplus = np.maximum(np.array(sizes) - width, 0)  # a wider model cannot but merge within itself
    spend = surplus + int((size - width) // num_models * budget + _WHOLE)
    labels = np.arange(size)
    total = _merge(work, origin, spend, width, float(repeat), labels)
    if not np.isfinite(total):
        raise ValueError("similarities that are not finite leave no pair to merge")
    _, clusters = np.unique(labels, return_inverse=True)
    return Zipped(torch.from_numpy(clusters), total / (size - width))


def explained(similarity_RR: Tensor, cluster_R: Tensor) -> float:
    """The part of its members that a cluster's mean explains, summed over clusters: (1/k) of the
    off-diagonal sum.

    For correlations, the standardised units' variance that k-means would maximise.
    """
    member = torch.nn.functional.one_hot(cluster_R).to(similarity_RR.dtype)
    sizes = member.sum(0)
    inside = (member * (similarity_RR @ member)).sum(0) - member.T @ similarity_RR.diagonal()
    return float((inside / sizes.clamp(min=1)).sum(dtype=torch.float64))


@njit(nogil=True, cache=True, error_model="numpy")
def _merge(s, origin, budget, target, repeat, labels):
    """Greedy merging in place; the sum of the similarities at which units were merged."""
    n = s.shape[0]
    alive = np.ones(n, dtype=np.bool_)
    stale = np.ones(n, dtype=np.bool_)
    value = np.empty(n, dtype=np.float32)
    at = np.zeros(n, dtype=np.int64)
    lowest = np.float32(-np.inf)
    for i in range(n):
        s[i, i] = lowest
    for model in range(len(budget)):
        if budget[model] <= 0:
            _separate(s, origin, alive, stale, model)
    total = 0.0
    for _ in range(n - target):
        first, highest = -1, lowest
        for i in range(n):
            if not alive[i]:
                continue
            if stale[i]:
                value[i], at[i] = lowest, -1
                for j in range(n):
                    if alive[j] and j != i and s[i, j] > value[i]:
                        value[i], at[i] = s[i, j], j
                stale[i] = False
            if value[i] > highest:
                highest, first = value[i], i
        if first < 0:
            return np.inf
        low, high = min(first, at[first]), max(first, at[first])
        total += max(highest, np.float32(-1))
        labels[labels == labels[high]] = labels[low]
        alive[high] = False
        for k in range(n):
            if not alive[k] or k == low:
                continue
            merged = min(s[low, k], s[high, k])
            merged = merged * np.float32(repeat) if repeat > 0 else lowest
            s[low, k] = merged
            s[k, low] = merged
            if at[k] == low or at[k] == high:
                stale[k] = True
            elif merged > value[k] or (merged == value[k] and low < at[k]):
                value[k], at[k] = merged, low
        stale[low] = True
        if origin[low] == origin[high]:
            budget[origin[low]] -= 1
            if budget[origin[low]] == 0:
                _separate(s, origin, alive, stale, origin[low])
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _separate(s, origin, alive, stale, model):
    """No two units of a model may merge any more, unless nothing else is left to merge."""
    for i in range(s.shape[0]):
        if alive[i] and origin[i] == model:
            stale[i] = True
            for j in range(s.shape[0]):
                if origin[j] == model:
                    s[i, j] = _SPENT
