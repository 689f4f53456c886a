"""Low-rank changes of one matrix, merged in the space that they span together.

Core Space (arXiv:2509.17786): orthonormal bases U of all B side by side and V of all A turn each
change B A into its core, U^T B A V, of at most the sum of the ranks on a side, and nothing is lost.
A method merges the cores, and U core V^T is the merged change. Inner products and singular values
of cores are those of the changes, so methods that look at no more give what they would in full.

The bases come from the eigenvectors of B^T B and A A^T, in float64: U itself is never made.

Shape legend: N matrices, O outputs, I inputs, K the sum of the ranks, U and V the bases' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-14
"""Of the largest eigenvalue: below lies what rounding to float32 left in the factors."""
_MILD = 1e4
"""Of both spreads together: float32 then loses at most two of its seven digits."""


def merged_in_core(
    factors: Sequence[tuple[Tensor, Tensor]],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    rank: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors of the merged change of one matrix, as `merged_in_cores` gives them.

    Args:
        factors: B [O, r] and A [r, I] of each model; r may differ, and be 0 for no change.
        merge: merges cores, float64 [U, V] each.
    """
    left_NOK = torch.cat([left for left, _ in factors], 1).double()[None]
    right_NKI = torch.cat([right for _, right in factors]).double()[None]
    sizes = [right.shape[0] for _, right in factors]
    (merged,) = merged_in_cores(left_NOK, right_NKI, sizes, [merge], rank=rank)
    return merged


def merged_in_cores(
    left_NOK: Tensor,
    right_NKI: Tensor,
    sizes: Sequence[int],
    merges: Sequence[Callable[[list[Tensor]], Tensor]],
    *,
    rank: int | None = None,
    single: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Factors of the merged changes of N matrices of one shape, for each of which one merges.

    Args:
        left_NOK, right_NKI: float64, the models' B and A side by side, of these sizes.
        rank: of the results at most, with the least error; by default all of it.
        single: the result may be float32, computed so where the factors are far from dependent.

    Returns:
        For each float64 B [O, V] and A [V, I], the rows of A orthonormal; with `rank` B [O, rank]
        and A [rank, I], which share the singular values by their roots. Where `single` allows it, a
        mixture of the models' B, and their A as they are.
    """
    gram_left, gram_right = left_NOK.mT @ left_NOK, right_NKI @ right_NKI.mT
    (to_left, spread_left), (to_right, spread_right) = (
        _whitening(gram) for gram in (gram_left, gram_right)
    )
    if to_left is None or to_right is None:  # each has bases of a size of its own
        return [
            pair
            for i, merge in enumerate(merges)
            for pair in merged_in_cores(
                left_NOK[i : i + 1], right_NKI[i : i + 1], sizes, [merge], rank=rank, single=single
            )
        ]
    on_left = (to_left.mT @ gram_left).split([*sizes], 2)
    on_right = (gram_right @ to_right).split([*sizes], 1)
    cores = [one @ other for one, other in zip(on_left, on_right, strict=True)]
    core_NUV = torch.stack(
        [merge([core[i] for core in cores]).double() for i, merge in enumerate(merges)]
    )
    if single and rank is None and spread_left * spread_right < _MILD:
        mixed = to_left @ core_NUV @ to_right.mT
        return list(zip(left_NOK.float() @ mixed.float(), right_NKI.float(), strict=True))
    if rank is None:
        mixed_left, mixed_right = to_left @ core_NUV, to_right.mT
    else:
        u, s, vt = torch.linalg.svd(core_NUV, full_matrices=False)
        root = s[:, :rank].sqrt()
        mixed_left = to_left @ (u[:, :, :rank] * root[:, None, :])
        mixed_right = (root[:, :, None] * vt[:, :rank]) @ to_right.mT
    return list(zip(left_NOK @ mixed_left, mixed_right @ right_NKI, strict=True))


def shortened(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of at most this rank that are closest to a product."""
    if right.shape[0] <= rank:
        return left, right
    return merged_in_core([(left, right)], lambda cores: cores[0], rank=rank)


def _whitening(gram_NKK: Tensor) -> tuple[Tensor | None, float]:
    """W with W^T G W = 1, over the directions that the factors have, and their spread.

    W is None for several matrices that do not all have every direction. The spread is the ratio of
    the largest eigenvalue to the smallest.
    """
    values, vectors = torch.linalg.eigh(gram_NKK)
    tiny = torch.finfo(values.dtype).tiny
    kept = values > _SMALLEST * values[:, -1:].clamp(min=tiny)
    if bool(kept.all()):
        spread = float((values[:, -1] / values[:, 0]).max()) if values.numel() else 1.0
        return vectors / values.sqrt()[:, None, :], spread
    if len(gram_NKK) > 1:
        return None, math.inf
    return vectors[:, :, kept[0]] / values[:, kept[0]].sqrt()[:, None, :], math.inf
