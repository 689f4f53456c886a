"""Low-rank changes of one matrix, merged in the space that they span together.

Core Space (arXiv:2509.17786): orthonormal bases U of all B side by side and V of all A turn each
change B A into its core, U^T B A V, of at most the sum of the ranks on a side, and nothing is lost.
A method merges the cores, and U core V^T is the merged change. Inner products and singular values
of cores are those of the changes, so methods that look at no more give what they would in full.

The bases come from the eigenvectors of B^T B and A A^T, in float64: U itself is never made.

Shape legend: O outputs, I inputs of the matrix, K the sum of the ranks, U and V the bases' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-14
"""Of the largest eigenvalue: below lies what rounding to float32 left in the factors."""


def concatenated(
    factors: Sequence[tuple[Tensor, Tensor]], coefficients: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Factors of the exact linear combination of the products: side by side."""
    scaled = [c * left for c, (left, _) in zip(coefficients, factors, strict=True)]
    return torch.cat(scaled, 1), torch.cat([right for _, right in factors])


def merged_in_core(
    factors: Sequence[tuple[Tensor, Tensor]],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors of the merged change.

    Args:
        factors: B [O, r] and A [r, I] of each model; r may differ, and be 0 for no change.
        merge: merges cores, float64 [U, V] each.
        rank: of the result at most, with the least error; by default all of it.

    Returns:
        float64 B [O, V] and A [V, I], the rows of A orthonormal; with `rank` B [O, rank] and
        A [rank, I], which share the singular values by their roots.
    """
    left_OK = torch.cat([left for left, _ in factors], 1).double()
    right_KI = torch.cat([right for _, right in factors]).double()
    gram_left, gram_right = left_OK.T @ left_OK, right_KI @ right_KI.T
    to_left_KU, to_right_KV = _whitening(gram_left), _whitening(gram_right)
    on_left_UK, on_right_KV = to_left_KU.T @ gram_left, gram_right @ to_right_KV
    sizes = [right.shape[0] for _, right in factors]
    cores = [
        one @ other
        for one, other in zip(on_left_UK.split(sizes, 1), on_right_KV.split(sizes, 0), strict=True)
    ]
    core_UV = merge(cores).double()
    if rank is None:
        return left_OK @ (to_left_KU @ core_UV), to_right_KV.T @ right_KI
    u, s, vt = torch.linalg.svd(core_UV, full_matrices=False)
    root = s[:rank].sqrt()
    return (
        left_OK @ (to_left_KU @ (u[:, :rank] * root)),
        ((root[:, None] * vt[:rank]) @ to_right_KV.T) @ right_KI,
    )


def shortened(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of at most this rank that are closest to a product."""
    if right.shape[0] <= rank:
        return left, right
    return merged_in_core([(left, right)], lambda cores: cores[0], rank=rank)


def _whitening(gram_KK: Tensor) -> Tensor:
    """W with W^T G W = 1, over the directions that the factors have."""
    values, vectors = torch.linalg.eigh(gram_KK)
    kept = values > _SMALLEST * values[-1:].clamp(min=torch.finfo(torch.float64).tiny)
    return vectors[:, kept] / values[kept].sqrt()
