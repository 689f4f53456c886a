"""Low-rank changes of one matrix, merged in the space that they span together.

Core Space (arXiv:2509.17786): orthonormal bases U of all B side by side and V of all A turn each
change B A into its core, U^T B A V, of at most the sum of the ranks on a side, and nothing is lost.
A method merges the cores, and U core V^T is the merged change. Inner products and singular values
of cores are those of the changes, so methods that look at no more give what they would in full.

The bases come from the eigenvectors of B^T B and A A^T, in float64: U itself is never made, and
what a merge gives is two small matrices that mix the models' own factors.

Shape legend: N matrices, O outputs, I inputs, K the sum of the ranks, R the result's rank, U and V
the bases' sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_SMALLEST = 1e-14
"""Of the largest eigenvalue: below lies what rounding to float32 left in the factors."""
_MILD = 1e4
"""Of both spreads together: float32 then loses at most two of its seven digits."""
GENTLE = 64
"""Of both spreads together: Gram matrices in float32 then lose no more."""


class Mixture(NamedTuple):
    """The merged factors of n matrices: all B side by side times `left`, `right` times all A."""

    rows: Sequence[int]
    """Which of the matrices."""
    left: Tensor
    """[n, K, R], or [n, K] where it only scales."""
    right: Tensor | None
    """[n, R, K]; None for all A as they are."""
    single: bool
    """The products may be computed in float32."""

    @property
    def rank(self) -> int:
        return self.left.shape[-1]


def merged_in_core(
    factors: Sequence[tuple[Tensor, Tensor]],
    merge: Callable[[list[Tensor]], Tensor],
    *,
    rank: int | None = None,
    single: bool = False,
) -> tuple[Tensor, Tensor]:
    """Factors of the merged change of one matrix, as `mixtures` describes them.

    Args:
        factors: B [O, r] and A [r, I] of each model; r may differ, and be 0 for no change.
        merge: merges cores, float64 [1, U, V] each.
    """
    left_OK = torch.cat([left for left, _ in factors], 1).double()
    right_KI = torch.cat([right for _, right in factors]).double()
    on_left, on_right = eigenbases((left_OK.T @ left_OK)[None], (right_KI @ right_KI.T)[None])
    sizes = [right.shape[0] for _, right in factors]
    ((_, mix_left, mix_right, _),) = mixtures(
        on_left, on_right, sizes, lambda cores, _: merge(cores), rank=rank, single=single
    )
    return left_OK @ mix_left[0], right_KI if mix_right is None else mix_right[0] @ right_KI


class Eigenbases(NamedTuple):
    """Eigenvalues and eigenvectors of the Gram matrices of N factors, in float64."""

    values_NK: Tensor
    vectors_NKK: Tensor
    kept_NK: Tensor
    """The directions that the factors have."""
    spread_N: Tensor
    """The largest eigenvalue by the smallest; inf where a direction is missing."""

    def whitening(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """W with W^T G W = 1 and W^T G, of matrices with the same number of directions."""
        roots = self.values_NK[rows].sqrt()
        vectors = self.vectors_NKK[rows]
        if len(rows) == 1:
            kept = self.kept_NK[rows[0]]
            roots, vectors = roots[:, kept], vectors[:, :, kept]
        return vectors / roots[:, None, :], (vectors * roots[:, None, :]).mT


def eigenbases(*grams_NKK: Tensor) -> list[Eigenbases]:
    """The eigenbases of B^T B, or A A^T, of N matrices each."""
    result = []
    for gram_NKK in grams_NKK:
        values, vectors = (part.double() for part in torch.linalg.eigh(gram_NKK))
        tiny = torch.finfo(values.dtype).tiny
        kept = values > _SMALLEST * values[:, -1:].clamp(min=tiny)
        if values.shape[1]:
            spread = torch.where(kept.all(1), values[:, -1] / values[:, 0], math.inf)
        else:
            spread = torch.ones(len(values), dtype=values.dtype)
        result.append(Eigenbases(values, vectors, kept, spread))
    return result


def mixtures(
    on_left: Eigenbases,
    on_right: Eigenbases,
    sizes: Sequence[int],
    merge: Callable[[list[Tensor], Sequence[int]], Tensor],
    *,
    rank: int | None = None,
    single: bool = False,
) -> list[Mixture]:
    """How the factors of N matrices mix to those of the merged changes.

    Args:
        on_left: of B^T B, of the models' B side by side, of these sizes.
        on_right: of A A^T.
        merge: merges cores, float64 [n, U, V] of each model, of the n matrices of these indices.
        rank: of the results at most, with the least error; by default all of it.
        single: the results may be float32, and are computed so where the factors are far from
            dependent.

    Returns:
        Mixtures in float64, each of matrices whose results have one rank. The rows of the merged A
        are orthonormal; with `rank` both factors have the roots of the singular values; where
        `single` allows it and no rank is asked for, A stays as it is.
    """
    spread_N = on_left.spread_N * on_right.spread_N
    mild_N = (spread_N < _MILD) & single
    alike = [
        mild_N.nonzero()[:, 0].tolist(),
        (~mild_N & spread_N.isfinite()).nonzero()[:, 0].tolist(),
        # each of these has bases of a size of its own
        *([i] for i in (~spread_N.isfinite()).nonzero()[:, 0].tolist()),
    ]
    result = []
    for rows in filter(None, alike):
        (to_left, from_left), (to_right, from_right) = (
            bases.whitening(rows) for bases in (on_left, on_right)
        )
        parts = zip(from_left.split([*sizes], 2), from_right.mT.split([*sizes], 1), strict=True)
        core_nUV = merge([one @ other for one, other in parts], rows).double()
        mild = bool(mild_N[rows[0]])
        if mild and rank is None:
            left, right = to_left @ core_nUV @ to_right.mT, None
        elif rank is None:
            left, right = to_left @ core_nUV, to_right.mT
        else:
            u, s, vt = torch.linalg.svd(core_nUV, full_matrices=False)
            root = s[:, :rank].sqrt()
            left = to_left @ (u[:, :, :rank] * root[:, None, :])
            right = (root[:, :, None] * vt[:, :rank]) @ to_right.mT
        result.append(Mixture(rows, left, right, mild))
    return result
