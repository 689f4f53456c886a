"""Positive definite systems: float64, or float32 and refinement where float64 is slow.

GPUs for graphics compute float64 at a 32nd or 64th of their float32 rate. There a matrix is
factored in float32, and each answer is corrected by what it leaves in float64: a few products of
cost n² bring float64's digits, as long as the matrix's condition is well below 1e7. Where it is
not, and everywhere else, the factor is one of float64.

Shape legend: N unknowns, K right sides; any leading dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alloy.devices import is_slow_in_float64

_MAX_CORRECTIONS = 10
_ENOUGH, _STALLED = (
    1e-13,
    1e-9,
)  # of the right sides: what may be left, and where it stops to shrink


class PositiveDefinite:
    """Symmetric positive definite matrices, factored once and solved with often.

    Args:
        matrix_NN: float64.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """

    def __init__(self, matrix_NN: Tensor) -> None:
        self.matrix_NN = matrix_NN
        narrow = is_slow_in_float64(matrix_NN.device)
        self._narrow = _Narrow.of(matrix_NN) if narrow else None
        self._factor_NN = torch.linalg.cholesky(matrix_NN) if self._narrow is None else None

    def solve(self, wanted_NK: Tensor) -> Tensor:
        """The X [N, K] with matrix X = wanted, to the digits of `wanted`."""
        if self._narrow is not None and wanted_NK.dtype == torch.float32:
            return self._narrow.solve(wanted_NK).float()
        solution = None if self._narrow is None else self._refined(self._narrow, wanted_NK)
        if solution is None:
            if self._factor_NN is None:
                self._narrow, self._factor_NN = None, torch.linalg.cholesky(self.matrix_NN)
            wide_NK = torch.cholesky_solve(wanted_NK.to(self._factor_NN), self._factor_NN)
            solution = wide_NK.to(wanted_NK)
        return solution

    def _refined(self, narrow: _Narrow, wanted_NK: Tensor) -> Tensor | None:
        """The solution by corrections; None if they do not shrink."""
        solution, left = torch.zeros_like(wanted_NK), wanted_NK
        size_1K = wanted_NK.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        before = float("inf")
        for _ in range(_MAX_CORRECTIONS):
            worst = float((left.norm(dim=-2, keepdim=True) / size_1K).max())
            if worst <= _ENOUGH:
                return solution
            if not worst < before / 2:  # float64's rounding is left, or the condition is too bad
                return solution if worst <= _STALLED else None
            before = worst
            solution = solution + narrow.solve(left / size_1K) * size_1K
            left = wanted_NK - self.matrix_NN @ solution
        return None


class _Narrow(NamedTuple):
    """The factor in float32 of a matrix that is scaled to a diagonal of ones."""

    factor_NN: Tensor
    scale_N1: Tensor

    @classmethod
    def of(cls, matrix_NN: Tensor) -> _Narrow | None:
        """None where rounding leaves it no factor."""
        scale_N1 = matrix_NN.diagonal(dim1=-2, dim2=-1).rsqrt()[..., None]
        factor_NN, failed = torch.linalg.cholesky_ex((scale_N1 * matrix_NN * scale_N1.mT).float())
        return None if bool(failed.any()) else cls(factor_NN, scale_N1)

    def solve(self, wanted_NK: Tensor) -> Tensor:
        """The solution with the digits of float32."""
        scaled_NK = (self.scale_N1 * wanted_NK).float()
        return self.scale_N1 * torch.cholesky_solve(scaled_NK, self.factor_NN)
