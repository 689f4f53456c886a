"""The best approximation of a matrix by one of low rank (Eckart and Young)."""

from __future__ import annotations

import torch
from torch import Tensor

_OVERSAMPLING = 16
_ITERATIONS = 6
_EXACT_SHARE = 4
"""Below this many times the rank a matrix is decomposed in full."""


def truncated(
    matrix: Tensor, *, rank: int | None, energy: float | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Factors B [out, r] and A [r, in] whose product is close to the matrix.

    r is at most `rank`; with `energy` the least whose squares of singular values reach this share
    of the whole. Large matrices are decomposed by subspace iteration (arXiv:0909.4061, algorithm
    4.4), which is exact to the decay of the spectrum; both factors have the roots of the singular
    values.
    """
    work = matrix.float()
    most = min(work.shape) if rank is None else min(rank, *work.shape)
    total = work.double().square().sum()
    tries = most if energy is None else min(most, 32)
    while True:
        u, s, v = _leading(work, tries, generator)
        reached = s.double().square().cumsum(0)
        if energy is None or tries >= most or reached[-1] >= energy * total:
            break
        tries = min(most, 2 * tries)
    count = most
    if energy is not None:
        enough = int((reached < energy * total).sum()) + 1
        count = min(most, enough, len(s))
    root = s[:count].sqrt()
    return u[:, :count] * root, root[:, None] * v[:, :count].T


def _leading(
    matrix: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets u [out, count], s, v [in, count]."""
    size = count + _OVERSAMPLING
    if _EXACT_SHARE * size >= min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :count], s[:count], vt[:count].T
    start = torch.randn(matrix.shape[1], size, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :count], s[:count], vt[:count].T
