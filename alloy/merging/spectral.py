"""Merges in the singular spaces of task matrices: TSV-M, boosted or not, Iso-C, Iso-CTS.

A task matrix is the task vector of one weight matrix, Δ_i = W_i - W_0 [d_out, d_in]; here each is
first scaled by its coefficient. All is computed in float64.

Shape legend: O outputs, I inputs, K directions kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alloy.merging.selection import accumulator, task_vector


def tsv_m(
    models: Sequence[Tensor], *, base: Tensor, coefficients: Sequence[float], skip: tuple[str, ...]
) -> Tensor:
    """Task singular vectors without interference (TSV-Merge, arXiv:2412.00081).

    Of each of n task matrices the share 1/n of leading singular triplets is kept; the left (right)
    singular vectors of all tasks, side by side, are replaced by the nearest orthonormal ones; W =
    W_0 + U S Vᵀ.
    """
    return boosted_tsv_m(models, base=base, coefficients=coefficients, beta=1.0, skip=skip)


def boosted_tsv_m(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    beta: float,
    skip: tuple[str, ...],
) -> Tensor:
    """TSV-M with small singular values raised (BoostedTSV-M, arXiv:2603.05354).

    In every task matrix, values below the one at which the running sum reaches the share `beta` of
    the whole are set to it, so that no task's lesser directions drown; the rest is `tsv_m`, which
    beta = 1 is. This follows summaries of the paper, whose text was out of reach: that the sum is
    of the values themselves over the full spectrum is taken from Subspace Boosting
    (arXiv:2506.16506), on which it builds. The authors are said to make vectors orthonormal by
    five steps of Newton and Schulz; here it is exact.
    """
    del skip  # decides which matrices come here
    deltas = _task_matrices(models, base, coefficients)
    kept = max(1, min(deltas[0].shape) // len(deltas))
    triplets = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left_OK = torch.cat([u[:, :kept] for u, _, _ in triplets], 1)
    values_K = torch.cat([_boosted(s, beta)[:kept] for _, s, _ in triplets])
    right_KI = torch.cat([vt[:kept] for _, _, vt in triplets])
    return _rebuilt(base, _orthogonal(left_OK), values_K, _orthogonal(right_KI))


def _boosted(values: Tensor, beta: float) -> Tensor:
    """Singular values, none below the one that completes the share `beta` of their sum."""
    if beta >= 1:
        return values
    reached = values.cumsum(0) >= beta * values.sum()
    return values.clamp(min=float(values[int(reached.int().argmax())]))


def iso_c(
    models: Sequence[Tensor], *, base: Tensor, coefficients: Sequence[float], skip: tuple[str, ...]
) -> Tensor:
    """Isotropic merging in the common subspace (Iso-C, arXiv:2502.04959).

    The singular values of the sum of task matrices are all replaced by their mean: W = W_0 + s̄ U
    Vᵀ.
    """
    del skip  # decides which matrices come here
    total = torch.stack(_task_matrices(models, base, coefficients)).sum(0)
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    return _rebuilt(base, left, values.mean().expand_as(values), right)


def iso_cts(
    models: Sequence[Tensor],
    *,
    base: Tensor,
    coefficients: Sequence[float],
    common: float,
    skip: tuple[str, ...],
) -> Tensor:
    """Isotropic merging in common and task-specific subspaces (Iso-CTS, arXiv:2502.04959).

    The share `common` of the singular directions comes from the sum of task matrices; the rest is
    divided evenly over the tasks, each giving the leading directions of its task matrix outside the
    common left space. The directions of all are made orthonormal and get the mean of their singular
    values.
    """
    del skip  # decides which matrices come here
    deltas = _task_matrices(models, base, coefficients)
    size = min(base.shape)
    specific = min(round((size - int(size * common)) / len(deltas)), size // len(deltas))
    left, values, right = torch.linalg.svd(torch.stack(deltas).sum(0), full_matrices=False)
    shared = size - specific * len(deltas)
    left, values, right = [left[:, :shared]], [values[:shared]], [right[:shared]]
    for delta in deltas:
        outside = delta - left[0] @ (left[0].T @ delta)
        u, s, vt = torch.linalg.svd(outside, full_matrices=False)
        left.append(u[:, :specific])
        values.append(s[:specific])
        right.append(vt[:specific])
    left_OK, values_K, right_KI = torch.cat(left, 1), torch.cat(values), torch.cat(right)
    flat_K = values_K.mean().expand_as(values_K)
    return _rebuilt(base, _orthogonal(left_OK), flat_K, _orthogonal(right_KI))


def _task_matrices(
    models: Sequence[Tensor], base: Tensor, coefficients: Sequence[float]
) -> list[Tensor]:
    return [c * task_vector(m, base).double() for m, c in zip(models, coefficients, strict=True)]


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows (orthogonal Procrustes)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def _rebuilt(base: Tensor, left_OK: Tensor, values_K: Tensor, right_KI: Tensor) -> Tensor:
    merged = (left_OK * values_K) @ right_KI
    return accumulator(base) + merged.to(accumulator(base).dtype)
